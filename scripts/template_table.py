"""docs/templates.md: each chat template against each kind of conversation, from what the code does.

`python scripts/template_table.py` writes the page; `--check` compares it instead. The official
templates and the models lie beside the checkout where truetune is developed; where they do not,
their part of the page stays as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import template_corpus as corpus  # noqa: E402
from truetune import PromptContract, UnfaithfulTemplate  # noqa: E402
from truetune.data.conversation import Conversation  # noqa: E402

PAGE = ROOT / "docs" / "templates.md"
OWN, OFFICIAL, MODELS = "## Our own", "## Official templates", "## Models"
SHORT = {
    "target-dropped": "drops",
    "target-behind-stop": "after stop",
    "template-refuses": "refuses",
    "thinking-only": "thinks",
    "thinking-off": "off",
    "target-invented": "invents",
    "no-stop": "no stop",
    "prompt-differs": "differs",
}
INTRO = """# Chat templates

`python scripts/template_table.py` makes this page by running the code. Each template renders each
kind of conversation, with the template arguments that truetune chooses for that row. A number means
that the row can be trained on exactly: each trained turn follows, token for token, what a server
sends, and ends on the first stop token. The number counts the sequences: 1 means one sequence with
all turns; if the template rewrites history, there are more, in a tree that shares prefixes. A
letter names the template argument that was chosen. If no faithful completion exists, the row is
refused, and the cell has one of these words:

| word | code | what the template does |
|---|---|---|
| drops | `target-dropped` | omits reasoning or a tool call |
| after stop | `target-behind-stop` | writes a stop token before the end of the turn |
| refuses | `template-refuses` | raises an error |
| thinks | `thinking-only` | opens a think block before an answer without reasoning |
| off | `thinking-off` | closes the think block before an answer with reasoning |
| invents | `target-invented` | writes something that is not in the data |
| no stop | `no-stop` | does not end the turn |
| differs | `prompt-differs` | begins a conversation differently from what a server sends |

*train: false* is a conversation whose first answer is not trained on; *last only* trains on the
last answer alone; in *call, answer*, the call's result and an answer follow the call. The last
column names the field that carries the reasoning, or how it is passed without one: *markers in
content* puts think markers inside the content, *opened* continues in the think block that the
prompt opens, and *filled* fills the block that the template leaves empty. A *thinking part* is one
part of the content, with the type *thinking*.

Some refusals can be avoided with an option. `--reasoning inline` writes dropped reasoning between
markers, and `--reasoning drop` removes it from the rows. `--reasoning empty` trains on rows without
reasoning if the template opens or invents a think block."""


@dataclass(frozen=True)
class Outcome:
    """What became of one row.

    Attributes:
        sequences: number of examples; 0 where it was refused.
        code: of the refusal.
        arguments: chosen template arguments, as text.
        route: how reasoning reached the template.
        why: the refusal's sentence.
    """

    sequences: int
    code: str = ""
    arguments: str = ""
    route: str = ""
    why: str = ""


def outcome(contract: PromptContract, kind: corpus.Kind) -> Outcome:
    """Fit the contract to the row, encode it, and see that each prompt is the served one."""
    row = Conversation(tuple(dict(m) for m in kind.messages), where="", tools=kind.tools)
    fitted = contract.fit([row], loss_on=kind.loss_on)
    chosen = ", ".join(f"{k}={json.dumps(v)}" for k, v in fitted.template_kwargs.items())
    try:
        encoded = fitted.encode(row, loss_on=kind.loss_on)
    except UnfaithfulTemplate as error:
        return Outcome(0, error.code, why=error.what)
    for example, turns in zip(encoded, encoded.turns, strict=True):
        mask, end = [0] * len(example.ids), 0
        for turn in turns:
            served = fitted.prompt_ids(row.messages[:turn], row.tools)
            stops = (
                i for i in range(len(served), len(example.ids)) if example.ids[i] in fitted.stop_ids
            )
            end = next(stops) + 1
            mask[len(served) : end] = [1] * (end - len(served))
            if example.ids[: len(served)] != served:
                raise AssertionError(f"{kind.name}: the prompt of message {turn} is not served")
        if mask != example.mask or end != len(example.ids):
            raise AssertionError(f"{kind.name}: something else than completions is supervised")
    return Outcome(len(encoded), arguments=chosen, route=encoded.route)


def outcomes(contract: PromptContract) -> dict[str, Outcome]:
    return {kind.name: outcome(contract, kind) for kind in corpus.KINDS}


def table(found: Iterable[tuple[str, dict[str, Outcome]]]) -> str:
    """A table of templates by kinds, and the refusals' sentences under it."""
    names = [kind.name for kind in corpus.KINDS]
    lines = [
        "| template | " + " | ".join(names) + " | template arguments; how reasoning is passed |"
    ]
    lines += ["|---" * (len(names) + 2) + "|"]
    for name, row in found:
        letters = {
            a: "abcdef"[i] for i, a in enumerate(_distinct(o.arguments for o in row.values()))
        }
        cells = [_cell(row[kind], letters) for kind in names]
        notes = [f"{letter}: `{argument}`" for argument, letter in letters.items()]
        notes += [f"*{route}*" for route in _distinct(o.route for o in row.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {'; '.join(notes)} |")
    return "\n".join(lines)


def _cell(made: Outcome, letters: dict[str, str]) -> str:
    if not made.sequences:
        return SHORT.get(made.code, made.code)
    return f"{made.sequences}{' ' + letters[made.arguments] if made.arguments else ''}"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def own_part() -> str:
    about = (
        "Each of these templates, in tests/templates, shows one behaviour. They use a tiny\n"
        "tokenizer that has most of their markers as control tokens."
    )
    found = [(name, outcomes(corpus.own_contract(name))) for name in corpus.CONTROL]
    return f"{OWN}\n\n{about}\n\n{table(found)}"


def official_part(
    templates: Sequence[tuple[str, dict[str, Outcome]]],
    models: Sequence[tuple[str, dict[str, Outcome]]],
) -> str:
    about = (
        "These templates are used as published. Those that write a begin-of-text token use Llama\n"
        "3.2's tokenizer, the others Qwen2.5's, with their own markers added as control tokens."
    )
    with_models = "These models use their own tokenizer, template and stop tokens."
    return (
        f"{OFFICIAL}\n\n{about}\n\n{table(templates)}\n\n"
        f"{MODELS}\n\n{with_models}\n\n{table(models)}"
    )


def official() -> tuple[list[tuple[str, dict[str, Outcome]]], list[tuple[str, dict[str, Outcome]]]]:
    """What became of every kind under the official templates and under the models."""
    templates = [(p.stem, outcomes(corpus.official_contract(p))) for p in corpus.OFFICIAL]
    return templates, [(p.name, outcomes(corpus.model_contract(p))) for p in corpus.MODELS]


def parts() -> tuple[str, str]:
    """The parts of the page as it is: (our own, official and models)."""
    text = PAGE.read_text(encoding="utf-8")
    _, _, rest = text.partition(OWN)
    own, _, others = rest.partition(OFFICIAL)
    return f"{OWN}{own}".strip(), f"{OFFICIAL}{others}".strip()


def main() -> int:
    others = official_part(*official()) if corpus.OFFICIAL else parts()[1]
    page = f"{INTRO}\n\n{own_part()}\n\n{others}\n"
    if "--check" in sys.argv:
        return int(PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
