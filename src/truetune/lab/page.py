"""Write the results of experiments as a page of Markdown with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from truetune.lab.experiment import Experiment
from truetune.lab.failures import table
from truetune.reporting.html import picture as standalone
from truetune.reporting.svg import Dots, dot_plot

Result = Mapping[str, Any]

# The folder of the pictures of docs/lab.md, whose texts speak of its results alone.
_SHIPPED = "lab"
# In a picture; the table has all of them.
_MOST_PANELS = 4
_INTRODUCTION = """# The laboratory

Courses and forums make many claims about supervised fine-tuning. This page tests them on the
embedded base and its invented world, where the model's knowledge can be measured exactly. A model
of 5M weights shows mechanisms; the effects in large models may have another size.

## How claims are tested

Each experiment trains several variants, called arms, and compares them. Its claim, its bounds, its
seeds, and what would refute it were committed before the first run; a section says so if an arm was
added later, and ends with the commit since which its bounds have not changed. Some wordings were
edited afterwards, but no bounds. The verdict depends only on the bounds. An expectation *holds* if
its whole 95 % interval, and each seed, lies within the bound; it is *refuted* if the whole interval
lies outside. *Refuted by* is the sentence that was committed with the bounds. Where it says more or
less than they do, the bounds decide, and the section says so.

* **reproduced**: every expectation holds;
* **not reproduced**: every expectation that states a direction is refuted. One with bounds on both
  sides states a value and not a direction; it can hold even if the claim is wrong, and does not
  count;
* **different**: some expectations are refuted, but not all that state a direction;
* **not decided**: no expectation is refuted, but at least one does not hold either: its interval
  crosses the bound, or a seed lies outside.

The rule for *not reproduced* was made exact on 2026-11-23, after the runs; before, it asked for the
refutation of every expectation. One verdict changed, that of model-size, which was *different*.

A verdict from one seed is preliminary; each section says how many seeds it has.

Unless a section says otherwise, an arm is full fine-tuning of the embedded base for 150 steps of 16
rows at a learning rate of 1e-4, on the 97 hand-written instructions of the quickstart, in the
built-in template `chatml-lite` (markers `<|system|>`, `<|user|>` and `<|assistant|>`). With greedy
decoding, the model then answers a hundred questions about places that occur in no row. The tables
use these measures:

* *ended*: the share of replies that end by themselves within 40 tokens.
* *right*: the share of replies that end and contain the fact.
* *role leak*: the share of replies that write the header of another turn: the user's, or, after
  some text, the assistant's own once more.
* *repeats*: the share of replies that repeat themselves.
* *prose*: the loss on 30 documents about the world that the base has not read. `quickstart`,
  the model card and other pages use other documents, so their numbers differ.
* *recall in prose*: the share of 200 sentences of facts, cut before the value, that the model
  completes correctly.
* *training loss*: the mean of the last ten steps.

Losses are in nats per token. Square brackets contain 95 % intervals. For a share, it is Wilson's
interval for the number of questions of one seed, with counts averaged over the seeds; for a
difference of shares, Newcombe's, paired by question and seed; for losses, it comes from a
bootstrap. These intervals do not contain the variation between seeds, and so an expectation holds
only if each seed lies within the bound as well. In the pictures, dots and bars are means and their
intervals, and rings are the seeds.

Two things changed on 2026-11-23. Before, role leak counted only the user's header; every table in
which this makes a difference is from a new run. And mean counts were rounded to whole questions,
which can move an end of an interval by up to a point; the two experiments with an expectation that
this could decide, template-drift and prompting, were run again. Results since then keep the outcome
of each question, and `make docs` computes intervals, judgements and verdicts from these again.

`truetune lab run NAME` runs an experiment and writes its result and a page like this one; `make
docs` makes this page from the results in `docs/lab/*.json`. `--quick` uses one seed, a quarter of
the rows per step, and only the arms that an expectation names; the bounds are the same. `truetune
lab evaluate` measures what the base itself knows.

The commit and the CPU seconds under an experiment are those of its last run. Arms that were in the
folder by then are not trained again, so the first seed of some experiments was trained on the same
day at an earlier commit; [log.md](log.md) says which. *From scratch* is the measured time of a run
in an empty folder: training of every arm and measuring. `truetune lab list` shows the CPU time of
the quick and of the full form.

## The verdicts
"""

# Chapters that are read and run, besides those that are measured.
_NOTEBOOKS = (
    ("First SFT: rows, a run, a chat", "first_sft"),
    ("ChatTemplate, render_with_mask, pad_and_collate, masked_cross_entropy by hand",
     "masks_by_hand"),
    ("Reasoning traces: markers, steps and the length limit", "reasoning_traces"),
)  # fmt: skip


def page(
    results: Sequence[Result], experiments: Sequence[Experiment], pictures: str = _SHIPPED
) -> str:
    """The whole page.

    Args:
        results: in their order.
        experiments: their declarations, by name.
        pictures: the folder of NAME.svg, as the page names it.
    """
    found = {result["name"]: result for result in results}
    lines = [_INTRODUCTION, "| | experiment | verdict | seeds |", "|---|---|---|---|"]
    for experiment in experiments:
        result = found.get(experiment.name)
        verdict, seeds = ("not run yet", "") if result is None else _judged(result)
        lines.append(
            f"| {experiment.number} | {_link(experiment, found)}: {experiment.title} "
            f"| {verdict} | {seeds} |"
        )
    lines += ["", *_exercises(experiments, found, pictures)]
    lines += table(results, number, pictures == _SHIPPED)
    for experiment in experiments:
        if experiment.name in found:
            lines += [*_section(found[experiment.name], experiment, pictures), ""]
    return "\n".join(lines).rstrip() + "\n"


def _judged(result: Result) -> tuple[str, str]:
    """Verdict and number of seeds, for a table."""
    form = ", quick form" if result.get("quick") else ""
    return str(result["verdict"]), f"{len(result['seeds'])}{form}"


def _link(experiment: Experiment, found: Mapping[str, Result]) -> str:
    """To the section of an experiment, where it has one."""
    linked = f"[{experiment.name}](#{_anchor(experiment)})"
    return linked if experiment.name in found else experiment.name


def _exercises(
    experiments: Sequence[Experiment], found: Mapping[str, Result], pictures: str
) -> Iterator[str]:
    """From the names of a course to those of experiments and notebooks."""
    yield "## The exercises of a course on fine-tuning"
    yield ""
    yield "| exercise | experiment or notebook |"
    yield "|---|---|"
    # A user's own page lies beside no notebooks.
    if pictures == _SHIPPED:
        for exercise, notebook in _NOTEBOOKS:
            yield f"| {exercise} | [{notebook}.ipynb](notebooks/{notebook}.ipynb) |"
    for experiment in experiments:
        for exercise in experiment.exercises:
            yield f"| {exercise} | {_link(experiment, found)} |"
    yield ""


def _anchor(experiment: Experiment) -> str:
    heading = f"{experiment.number}. {experiment.title}".lower()
    kept = "".join(c for c in heading if c.isalnum() or c in " -")
    return kept.replace(" ", "-")


def _section(result: Result, experiment: Experiment, pictures: str) -> Iterator[str]:
    declared = result["declared"]
    yield f"## {experiment.number}. {experiment.title}"
    yield ""
    yield f"> {declared['claim']}"
    yield ""
    code = f"truetune/lab/experiments/{experiment.name.replace('-', '_')}.py"
    yield f"Source: {experiment.source}. `truetune lab run {experiment.name}` ({code})"
    yield ""
    yield f"Set-up: {experiment.setup}."
    yield ""
    yield f"Expected: {declared['expected']}. Refuted by: {declared['refuted']}."
    yield ""
    yield f"**{str(result['verdict']).capitalize()}.**"
    yield ""
    yield "| expectation | bound | found [95 %] | each seed | holds |"
    yield "|---|---|---|---|---|"
    for one in result["expectations"]:
        seeds = ", ".join(number(value, one["unit"]) for value in one["seeds"])
        yield (f"| {one['label']} | {_bound(one)} | {_interval(one)} | {seeds} | {one['held']} |")
    yield ""
    names = [
        name for name in experiment.shown if any(name in a["measures"] for a in result["arms"])
    ]
    yield f"| arm | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)
    for arm in result["arms"]:
        cells = [_interval(arm["measures"].get(name)) for name in names]
        yield f"| {arm['name']} | {' | '.join(cells)} |"
    yield ""
    yield f"![{experiment.title}]({pictures}/{experiment.name}.svg)"
    yield ""
    yield from _samples(result)
    if experiment.remark and pictures == _SHIPPED:
        yield experiment.remark
        yield ""
    elif experiment.remark:
        yield "docs/lab.md has the run of three seeds, with remarks on its numbers."
        yield ""
    seeds = ", ".join(map(str, result["seeds"]))
    form = "quick form; " if result.get("quick") else ""
    trained = f"{result['trained']} arms trained, " if "trained" in result else ""
    fresh = result.get("fresh_seconds")
    from_scratch = f" (from scratch {fresh:,})" if fresh else ""
    since = result.get("declared_in")
    declared = f" Bounds since commit {since['commit']} of {since['date']}." if since else ""
    yield (
        f"Seeds {seeds}; {form}{result['date']}; commit {result['commit']}; {result['machine']}; "
        f"{trained}{result['processor_seconds']:,} CPU seconds{from_scratch}.{declared}"
    )


def _samples(result: Result) -> Iterator[str]:
    """What each arm replied to the first question."""
    asked = result["arms"][0]["samples"][0]["asked"]
    yield f"<details><summary>Replies to: {_plain(asked)}</summary>"
    yield ""
    yield "| arm | reply |"
    yield "|---|---|"
    for arm in result["arms"]:
        yield f"| {arm['name']} | {_plain(arm['samples'][0]['said'])} |"
    yield ""
    yield "</details>"
    yield ""


def _plain(text: str) -> str:
    """Text of a model as a cell of a table."""
    shown = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]|":
        shown = shown.replace(sign, f"&#{ord(sign)};")
    return " ".join(shown.split())


def number(value: float, unit: str) -> str:
    """A value of a table."""
    if unit == "share":
        return f"{round(100 * value) or 0} %"
    return f"{value:.3f}" if unit == "nats per token" else f"{value:.3g}"


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    unit = found["unit"]
    low, high = (number(found[name], unit).removesuffix(" %") for name in ("low", "high"))
    return f"{number(found['value'], unit)} [{low}, {high}]"


def _bound(one: Mapping[str, Any]) -> str:
    if one["unit"] != "share":
        return str(one["bound"])
    words = str(one["bound"]).split()
    return " ".join(word if word.isalpha() else number(float(word), "share") for word in words)


def draw(result: Result, experiment: Experiment) -> str:
    """The picture of a result, as an SVG file."""
    arms = result["arms"]
    panels: list[Dots] = []
    for name in experiment.shown:
        found = [arm["measures"].get(name) for arm in arms]
        units = {one["unit"] for one in found if one is not None}
        if not units or len(panels) == _MOST_PANELS:
            continue
        unit = units.pop()
        values = [
            None if one is None else (one["value"], one["low"], one["high"], one["seeds"])
            for one in found
        ]
        panels.append(Dots(name, unit, values, share=unit == "share"))
    names = [arm["name"] for arm in arms]
    return standalone(dot_plot(experiment.title, names, panels))


def files(
    results: Sequence[Result], experiments: Sequence[Experiment], pictures: str = _SHIPPED
) -> dict[str, str]:
    """The page and its pictures, by their path beside the page."""
    known = {experiment.name: experiment for experiment in experiments}
    drawn = {
        f"{pictures}/{result['name']}.svg": draw(result, known[result["name"]])
        for result in results
        if result["name"] in known
    }
    return {"lab.md": page(results, experiments, pictures), **drawn}
