"""docs/mutants.md: spoilt chat templates against kinds of conversations, judged by the oracle.

`python scripts/mutant_table.py` writes the page; `--check` compares it instead; `mutants`, `own`,
`spoilt` or `official` does a part of it. The official templates and the models lie beside the
checkout where truetune is developed; where they do not, their parts of the page stay as they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import oracle_rows as judged  # noqa: E402
import template_corpus as corpus  # noqa: E402
import template_mutants  # noqa: E402
from truetune import PromptContract, UnfaithfulTemplate  # noqa: E402

PAGE = ROOT / "docs" / "mutants.md"
NUMBER, NUMBER_OFFICIAL = 200, 108
MUTANTS, SPOILT = "## Mutants", "## Official templates, deliberately broken"
OWN, OFFICIAL = "## Our own templates", "## Official templates and models"
HEADS = (MUTANTS, SPOILT, OWN, OFFICIAL)
CELLS = {
    judged.EXACT: "e",
    judged.REFUSED: "r",
    judged.FALSE: "f",
    judged.WRONG: "WRONG",
    judged.CRASHED: "CRASH",
}
INTRO = """# Mutants of chat templates

This page shows what truetune does with deliberately broken chat templates, called mutants, and with
unchanged ones. `python scripts/mutant_table.py` makes it. The judge is an oracle that shares no
code with truetune (`tests/oracle.py`). It renders only with transformers' `apply_chat_template`,
and requires that the trained sequence begins with the served prompt of every trained turn. It then
parses the supervised text back into reasoning, content and calls. These must be the parts of the
row, in order, exactly once, with nothing added but what counts as format.

| cell | the row is |
|---|---|
| e | trained, and exact |
| r | refused |
| f | refused, although the template's rendering of it is exact |
| WRONG | trained wrongly, without any message |
| CRASH | stopped by an error in the program |

A change may have no effect on a kind of conversation; such a row is then trained or refused as with
the unchanged template. In *edges*, texts begin or end with spaces and line breaks, and contain
braces. The order of the keys in the arguments of a call has no meaning and may change."""
Outcomes = Mapping[str, judged.Outcome]


def mutant_outcomes(mutant: template_mutants.Mutant) -> dict[str, judged.Outcome]:
    """The oracle's verdict on each kind of conversation under a mutant."""
    if mutant.template in corpus.CONTROL:
        tokenizer = corpus.own_tokenizer(mutant.template)
    else:
        tokenizer = corpus.official_tokenizer(corpus.SHARED / f"templates/{mutant.template}.jinja")
    tokenizer.chat_template = mutant.source
    try:
        contract = PromptContract.load(tokenizer)
    except UnfaithfulTemplate as error:
        refused = judged.Outcome(judged.REFUSED, str(error))
        return {row.name: refused for row in judged.ROWS}
    return judged.outcomes(contract)


def own_outcomes() -> dict[str, dict[str, judged.Outcome]]:
    """The same for our own templates as they are."""
    rows = (*judged.ROWS, *judged.MORE_ROWS)
    return {
        name: judged.outcomes(PromptContract.load(corpus.own_tokenizer(name)), rows)
        for name in corpus.CONTROL
    }


def official_outcomes() -> dict[str, dict[str, judged.Outcome]]:
    """The same for official templates, on a tokenizer with their markers, and for models."""
    rows = (*judged.ROWS, *judged.MORE_ROWS)
    found = {}
    for path in corpus.OFFICIAL:
        contract = replace(corpus.official_contract(path), date=None)
        contract.tokenizer.chat_template = contract.chat_template
        found[path.stem] = judged.outcomes(contract, rows)
    for folder in corpus.MODELS:
        found[folder.name] = judged.outcomes(PromptContract.load(folder), rows)
    return found


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], Outcomes]]) -> str:
    names = list(rows[0][1])
    lines = ["| " + " | ".join([*head, *names]) + " |", "|---" * (len(head) + len(names)) + "|"]
    for first, found in rows:
        cells = [CELLS[found[name].verdict] for name in names]
        lines.append("| " + " | ".join([*map(_escaped, first), *cells]) + " |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sums(found: Sequence[Outcomes]) -> str:
    count = Counter(outcome.verdict for some in found for outcome in some.values())
    whole = sum(count.values())
    return (
        f"{whole} rows: {count[judged.EXACT]} exact, {count[judged.REFUSED]} refused, "
        f"{count[judged.FALSE]} refused though the rendering is exact, "
        f"{count[judged.WRONG]} silently wrong, {count[judged.CRASHED]} crashes."
    )


def spoilt(head: str) -> list[template_mutants.Mutant]:
    """The mutants of a part of the page."""
    if head == MUTANTS:
        return template_mutants.chosen(NUMBER)
    return template_mutants.chosen(NUMBER_OFFICIAL, template_mutants.official_mutants)


def mutant_part(head: str, found: Sequence[tuple[template_mutants.Mutant, Outcomes]]) -> str:
    sums = _sums([outcomes for _, outcomes in found])
    rows = [((m.template, m.change), outcomes) for m, outcomes in found]
    return f"{head}\n\n{len(found)} mutants. {sums}\n\n{_table(('template', 'change'), rows)}"


def template_part(head: str, found: Mapping[str, Outcomes]) -> str:
    rows = [((name,), outcomes) for name, outcomes in found.items()]
    return f"{head}\n\n{_sums(list(found.values()))}\n\n{_table(('template',), rows)}"


def parts() -> dict[str, str]:
    """The parts of the page as it is, by their headings."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    begins = sorted(at for head in HEADS if (at := text.find(f"{head}\n")) >= 0)
    made = {}
    for head in HEADS:
        at = text.find(f"{head}\n")
        end = next((other for other in begins if other > at), len(text))
        made[head] = text[at:end].strip() if at >= 0 else head
    return made


def reasons(name: str, found: Outcomes) -> list[str]:
    """What is not exact or refused for a reason, a line each."""
    bad = (judged.WRONG, judged.CRASHED, judged.FALSE)
    return [
        f"{name} / {row}: {outcome.verdict}: {outcome.why}"
        for row, outcome in found.items()
        if outcome.verdict in bad
    ]


def made(head: str) -> str:
    """A part of the page anew; what is not exact or refused for a reason is written to stderr."""
    if head in (MUTANTS, SPOILT):
        found = [(m, mutant_outcomes(m)) for m in spoilt(head)]
        named = [(f"{m.template}, {m.change}", outcomes) for m, outcomes in found]
        text = mutant_part(head, found)
    else:
        outcomes_of = own_outcomes() if head == OWN else official_outcomes()
        named = list(outcomes_of.items())
        text = template_part(head, outcomes_of)
    for name, outcomes in named:
        for line in reasons(name, outcomes):
            sys.stderr.write(f"{line}\n")
    return text


def main() -> int:
    heads = [head for head in HEADS if head in (MUTANTS, OWN) or corpus.OFFICIAL]
    asked = [head for head in heads if any(a in head.lower() for a in sys.argv[1:])]
    different = False
    for head in asked or heads:
        part = made(head)
        before = parts()
        different = different or before[head] != part
        if "--check" not in sys.argv:
            whole = [INTRO, *(before | {head: part}).values()]
            PAGE.write_text("\n\n".join(whole) + "\n", encoding="utf-8")
    return int(different and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
