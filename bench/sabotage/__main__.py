"""Run the sabotage suite and print, or write, its table.

python -m bench.sabotage                    both houses, what can be run here
python -m bench.sabotage --house small S01  one case, on tokenizers made here
python -m bench.sabotage --write            docs/sabotage.md
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from bench.sabotage.case import Case, Negative
from bench.sabotage.cases import CASES
from bench.sabotage.house import MODELS, House
from bench.sabotage.negatives import NEGATIVES
from bench.sabotage.run import Verdict, judge, quiet

PAGE = Path(__file__).parents[2] / "docs" / "sabotage.md"
_TWICE = (
    "The scripts run twice: with the tokenizers and templates of published models, and with",
    "tokenizers that the suite makes itself, so that anyone can repeat it without downloads.",
)
_YES = {True: "yes", False: "**no**", None: "n/a"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a case is missed, or something healthy alarms."""
    parser = argparse.ArgumentParser(prog="python -m bench.sabotage", description=__doc__)
    parser.add_argument("ids", nargs="*", help="cases and negatives to run; all of them if none")
    parser.add_argument("--house", choices=("real", "small", "both"), default="both")
    parser.add_argument("--write", action="store_true", help="write docs/sabotage.md")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    import datasets
    from datasets.fingerprint import generate_random_fingerprint

    datasets.disable_progress_bars()
    # Each `map` of a trainer would serialise the tokenizer to name a cache that nobody reads.
    datasets.fingerprint.update_fingerprint = lambda *_: generate_random_fingerprint()
    houses = [House(real=True), House(real=False)]
    if chosen.house != "both":
        houses = [house for house in houses if house.name == chosen.house]
    if not MODELS.is_dir():
        houses = [house for house in houses if not house.real]
        print(f"{MODELS} is absent: tokenizers made here only", file=sys.stderr)
    known = {case.id for case in CASES} | {negative.id for negative in NEGATIVES}
    if unknown := set(chosen.ids) - known:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    good, pages = True, []
    for house in houses:
        verdicts = [_told(judge(c, house), house) for c in CASES if _wanted(c, house, chosen.ids)]
        alarms = {
            n: _whispered(n, quiet(n, house), house)
            for n in NEGATIVES
            if _wanted(n, house, chosen.ids)
        }
        good = good and all(map(_passed, verdicts)) and not any(alarms.values())
        pages.append((house, verdicts, alarms))
    if chosen.write and not chosen.ids:
        command = "python -m bench.sabotage --write"
        if chosen.house != "both":
            command += f" --house {chosen.house}"
        PAGE.write_text(page(pages, command), encoding="utf-8")
    return 0 if good else 1


def _wanted(item: Case | Negative, house: House, ids: Sequence[str]) -> bool:
    if item.real_only and not house.real:
        return False
    if item.needs_trl and importlib.util.find_spec("trl") is None:
        return False
    return not ids or item.id in ids


def _passed(verdict: Verdict) -> bool:
    return (
        verdict.detected
        and verdict.cause
        and verdict.rows is not False
        and verdict.fix
        and not verdict.false_alarms
    )


def _told(verdict: Verdict, house: House) -> Verdict:
    parts = [
        f"detected {_YES[verdict.detected]}",
        f"cause {_YES[verdict.cause]}",
        f"rows {_YES[verdict.rows]}",
        f"fix {_YES[verdict.fix]}",
        f"false alarms {len(verdict.false_alarms)}",
    ]
    print(f"{house.name} {verdict.case.id:6} {'  '.join(parts)}  [{', '.join(verdict.found)}]")
    print(f"       {verdict.case.title}; the libraries: {verdict.peers}", flush=True)
    return verdict


def _whispered(negative: Negative, codes: tuple[str, ...], house: House) -> tuple[str, ...]:
    said = f"FALSE ALARM: {', '.join(codes)}" if codes else "quiet"
    print(f"{house.name} {negative.id:6} {said}  {negative.title}", flush=True)
    return codes


# ------------------------------------------------------------------ the page


def page(
    parts: Sequence[tuple[House, Sequence[Verdict], dict[Negative, tuple[str, ...]]]],
    command: str = "python -m bench.sabotage --write",
) -> str:
    """docs/sabotage.md, with the command that makes it."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "peft", "trl")
        if importlib.util.find_spec(name)
    )
    lines = [
        "# The sabotage suite",
        "",
        "This page shows which tools notice deliberately broken training scripts. Each script has",
        "a healthy twin, which is the same script after the fix that the finding suggests.",
        *(_TWICE if len(parts) > 1 else ()),
        f"The page was written by `{command}` on {time.strftime('%Y-%m-%d')} with {versions}.",
        "",
        "* *detected*: before the first step, `truetune.audit` (for saved models, `truetune check",
        "  MODEL`) reports a warning or an error;",
        "* *cause*: the finding names the cause and not only a symptom;",
        "* *rows*: the finding lists exactly the broken rows (n/a if no row is broken);",
        "* *fix*: the audit of the twin, which applies the finding's fix, is clean;",
        "* *alarms*: the number of warnings and errors on the healthy twin;",
        "* *the libraries*: what TRL, transformers, peft, accelerate and datasets report for the",
        "  broken script but not for its twin, from building the trainer to the end of one step.",
        "  In a custom training loop (`by hand`), there is no library that could report anything.",
    ]
    for house, verdicts, alarms in parts:
        silent = sum(v.peers == "silent" for v in verdicts)
        asked = [v for v in verdicts if v.peers != "by hand"]
        raised = sum(v.peers.startswith("raised") for v in verdicts)
        lines += [
            "",
            "## Tokenizers and templates of published models"
            if house.real
            else "## Tokenizers made by the suite itself (no files needed)",
            "",
            f"truetune finds {sum(v.detected for v in verdicts)} of {len(verdicts)}, names the "
            f"cause of {sum(v.cause for v in verdicts)}, and raises "
            f"{sum(len(v.false_alarms) for v in verdicts)} false alarms on the twins and "
            f"{sum(map(len, alarms.values()))} on {len(alarms)} healthy scripts that resemble a "
            "broken one.",
            f"The libraries are silent on {silent} of the {len(asked)} scripts that use them, "
            f"raise an error on {raised} and warn on {len(asked) - silent - raised}.",
            "",
            "| case | what is broken | finding | detected | cause | rows | fix | alarms | "
            "the libraries |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {v.case.id} | {_cell(v.case.title)} | "
            f"{', '.join(f'`{c}`' for c in v.found if c in v.case.codes)} | {_YES[v.detected]} | "
            f"{_YES[v.cause]} | {_YES[v.rows]} | {_YES[v.fix]} | {len(v.false_alarms)} | "
            f"{_cell(v.peers)} |"
            for v in verdicts
        ]
        lines += ["", "| hard negative | truetune |", "|---|---|"]
        lines += [
            f"| {n.id} {_cell(n.title)} | {', '.join(codes) or 'quiet'} |"
            for n, codes in alarms.items()
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())
