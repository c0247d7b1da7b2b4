"""Write the page of a run: verdict, replies, losses, data and settings."""

from __future__ import annotations

import functools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from truetune.data.rows import evenly
from truetune.findings import LEVELS, counted, escaped, percent
from truetune.reporting.facts import RunFacts
from truetune.reporting.html import (
    clipped,
    document,
    facts_table,
    finding_cards,
    folded,
    legend,
    lengths_section,
    token_spans,
    words,
    write_document,
)
from truetune.reporting.svg import Line, chart
from truetune.reporting.verdict import LOSSES, SHARES, Answer, verdict
from truetune.run_dir import RunDir

# Characters of a reply and of a prompt's message; prompts side by side; steps of one prompt; places
# of dropped rows of one kind; rows of the table of vital signs.
_REPLY, _PROMPT, _PROMPTS, _STEPS, _PLACES, _ROWS = 1000, 600, 8, 8, 20, 60
# Prompts that stand open.
_OPEN = 3

_COLOURS = {"yes": "good", "no": "bad", "doubtful": "doubt"}
_STATES = {
    "finished": ("finished", "good"),
    "running": ("running", "doubt"),
    "unfinished": ("not finished", "doubt"),
    "failed": ("failed", "bad"),
}


def page(run: RunFacts, *, refresh: int | None = None) -> str:
    """The HTML of a run.

    Args:
        refresh: seconds after which a browser asks for it again.
    """
    sections: tuple[tuple[str, Callable[[RunFacts], Iterable[str]]], ...] = (
        ("", _head),
        ("", _verdict),
        ("", _problems),
        ("Replies", _replies),
        ("Curves", _curves),
        ("Findings", _findings),
        ("Samples over time", _samples),
        ("Tokens of a few examples", _tokens),
        ("Lengths in tokens", _lengths),
        ("Rows", _rows),
        ("Prompt and answer", _contract),
        ("Saved and verified", _checks),
        ("Recipe", _recipe),
        ("Environment", _environment),
    )
    body = [part for title, section in sections for part in _guarded(title, section, run)]
    return document(f"truetune report: {run.path.absolute().name}", body, refresh=refresh)


@dataclass(frozen=True)
class Written:
    """A page on disk.

    Attributes:
        path: the file.
        answers: trained as served, saved as trained, behaves.
    """

    path: Path
    answers: tuple[Answer, ...]


def write_report(run: RunDir, path: Path) -> Written:
    """Write the page of a run as its files are now.

    Raises:
        UsageError: the file cannot be written.
    """
    facts = RunFacts.read(run)
    write_document(path, page(facts), "--output")
    return Written(path, verdict(facts))


def _guarded(title: str, section: Callable[[RunFacts], Iterable[str]], run: RunFacts) -> list[str]:
    """A section, or one line if the files behind it are damaged."""
    try:
        parts = [part for part in section(run) if part]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        parts = [
            '<p class="refused">This part cannot be shown: the files behind it are damaged '
            f"({escaped(type(error).__name__)}).</p>"
        ]
    if parts and title:
        parts.insert(0, f"<h2>{title}</h2>")
    return parts


def _head(run: RunFacts) -> Iterator[str]:
    name, css = _STATES[run.state]
    if run.state == "failed" and run.behaviour("error"):
        name = "stopped by a probe"
    yield (
        f'<h1>{escaped(run.path.absolute().name)}: <span class="verdict {css}">{name}</span></h1>'
    )
    method = "QLoRA" if run.setting("qlora") else "LoRA" if run.setting("lora") else "all weights"
    made = [words(run.setting("model")), words(run.setting("data")), method]
    taken = f"step {run.done:,} of {run.total:,}" if run.total else f"step {run.done:,}"
    shown = " \u00b7 ".join(clipped(part, 300) for part in made if part)
    yield (f'<p class="sub">{shown}<br>{taken}{_losses_in_words(run)}</p>')
    for found in run.findings:
        if found.get("code") == "best-step-saved":
            what = str(found.get("what", ""))
            yield f"<p>{clipped(what[:1].upper() + what[1:], 300)}.</p>"
    if run.state in ("unfinished", "failed"):
        yield f"<p>{_ended(run)}</p>"


def _ended(run: RunFacts) -> str:
    """Describe how an unfinished run ended, and how to continue it."""
    if run.state == "failed" and run.behaviour("error"):
        return "A probe stopped the run early; its finding is shown below."
    ended = "failed" if run.state == "failed" else "was stopped or killed"
    since = "its last checkpoint" if RunDir(run.path).checkpoints() else "its beginning"
    command = f"truetune train --resume {shlex.quote(str(run.path))}"
    return (
        f"The run {ended} before its end. Continue it from {since} with "
        f"<code>{escaped(command)}</code>."
    )


def _losses_in_words(run: RunFacts) -> str:
    said = []
    for name, words_ in (("loss", "loss"), ("eval_loss", "held-out loss")):
        if points := run.series(name):
            said.append(f"{words_} {points[-1][1]:.4g}")
    return f", {', '.join(said)} nats per token" if said else ""


def _verdict(run: RunFacts) -> Iterator[str]:
    lines = "".join(
        f'<dt>{escaped(answer.question)}</dt><dd><b class="{_COLOURS.get(answer.word, "dim")}">'
        f"{answer.word}</b>. {clipped(answer.why, 1200)}</dd>"
        for answer in verdict(run)
    )
    yield f'<dl class="verdicts">{lines}</dl>'
    if run.state == "failed":
        # What ended the run stands last.
        grave = [f for f in run.findings if f.get("level") == "error"]
        yield from finding_cards(grave[-1:])


def _problems(run: RunFacts) -> Iterator[str]:
    for problem in run.problems:
        yield f'<p class="refused">{clipped(problem, 400)}</p>'


# ----------------------------------------------------------------------------------- replies


def _prompts(run: RunFacts) -> dict[str, list[Mapping[str, Any]]]:
    """Place of a prompt -> its samples, in the order of the steps."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in run.samples:
        found.setdefault(str(sample.get("where", "")), []).append(sample)
    for samples in found.values():
        samples.sort(key=lambda s: s.get("step", 0))
    return found


def _replies(run: RunFacts) -> Iterator[str]:
    prompts = _prompts(run)
    if not prompts:
        yield '<p class="dim">samples.jsonl contains no replies.</p>'
        return
    shown = [_prompt(where, samples) for where, samples in list(prompts.items())[:_PROMPTS]]
    yield from shown[:_OPEN]
    if rest := shown[_OPEN:]:
        yield folded(f"{len(rest)} more prompts", "".join(rest))
    if (left := len(prompts) - _PROMPTS) > 0:
        yield f'<p class="dim">and {left:,} more prompts, in samples.jsonl</p>'


def _prompt(where: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """One prompt: the reply before the first step, the reply now, and the row's answer."""
    first, last = samples[0], samples[-1]
    kind = {True: ", held out", False: ", trained"}.get(last.get("held_out"), "")  # type: ignore[arg-type]
    boxes = []
    if first.get("step") == 0:
        boxes.append(_reply("before the first step", first))
    if last is not first or not boxes:
        boxes.append(_reply(f"tuned, step {int(last.get('step', 0)):,}", last))
    if expected := last.get("expected"):
        text = clipped(expected, _REPLY)
        boxes.append(
            f'<div class="reply"><span class="dim">answer in the row</span>'
            f'<div class="turn">{text}</div></div>'
        )
    return (
        f'<h3>{_place(where)}<span class="dim">{kind}</span></h3>{_asked(last)}'
        f'<div class="pair">{"".join(boxes)}</div>'
    )


def _place(where: str) -> str:
    """A row without the folders of its file, which stand with the rows."""
    return clipped(where.rpartition("/")[2], 300)


def _asked(sample: Mapping[str, Any]) -> str:
    """The messages of a prompt; of one that is known by its tokens alone, the text that is
    served."""
    if messages := sample.get("messages"):
        return _messages(messages)
    served = str(sample.get("prompt") or "")
    return f'<p class="turn"><code>{clipped(served, _PROMPT)}</code></p>' if served else ""


def _messages(messages: Sequence[Mapping[str, Any]]) -> str:
    shown = []
    for message in messages[-3:]:
        content = message.get("content")
        text = content if isinstance(content, str) else words(content)
        shown.append(
            f'<p class="turn"><span class="dim">{clipped(message.get("role", ""), 40)}</span> '
            f"{clipped(text, _PROMPT)}</p>"
        )
    if (left := len(messages) - 3) > 0:
        shown.insert(0, f'<p class="dim">{left:,} earlier messages</p>')
    return "".join(shown)


def _reply(name: str, sample: Mapping[str, Any]) -> str:
    text = str(sample.get("answer") or "")
    ended = "" if sample.get("stopped") else ' <b class="doubt">not ended</b>'
    shown = clipped(text, _REPLY) if text.strip() else '<span class="dim">(empty)</span>'
    return (
        f'<div class="reply"><span class="dim">{escaped(name)}</span>{ended}'
        f'<div class="turn">{shown}</div></div>'
    )


def _samples(run: RunFacts) -> Iterator[str]:
    for where, samples in list(_prompts(run).items())[:_PROMPTS]:
        if len(samples) < 3:
            continue
        kept = evenly(samples, _STEPS, last=True)
        boxes = "".join(_reply(f"step {int(s.get('step', 0)):,}", s) for s in kept)
        left = len(samples) - len(kept)
        more = f'<p class="dim">{left:,} more steps, in samples.jsonl</p>' if left else ""
        yield folded(
            f"{where.rpartition('/')[2]}: {len(samples):,} steps",
            f'{_asked(samples[-1])}<div class="pair">{boxes}</div>{more}',
        )


# ------------------------------------------------------------------------------------ curves


def _curves(run: RunFacts) -> Iterator[str]:
    series, marks = run.series, run.marks()
    # Not each evaluation asks the probes.
    held = max(series("eval_loss"), series("held_out_loss"), key=len)
    draw = functools.partial(
        chart, marks=marks, until=max((step for step, _ in series("loss")), default=0)
    )
    nats = "nats per token"
    figures = [
        draw(
            "Loss",
            nats,
            [
                Line("training", series("loss")),
                Line("held-out", held),
                Line("trained rows as served", series("trained_loss")),
            ],
            log=run.state == "failed",
        ),
        draw("Text to keep", nats, [Line("loss", series("keep_loss"))]),
        draw(
            "Replies that end by themselves",
            "",
            [Line("stop rate", series("stop_rate"))],
            share=True,
        ),
        draw(
            "Replies that go wrong",
            "",
            [
                Line(name.replace("_", " "), series(name))
                for name in SHARES
                if name != "stop_rate" and (name == "repetition" or any(y for _, y in series(name)))
            ],
            share=True,
        ),
        draw("Stop tokens", nats, [Line("loss", series("stop_loss"))]),
        draw("Length of replies", "tokens", [Line("mean", series("reply_tokens"))]),
        draw(
            "Gradient norm",
            "",
            [Line("before clipping", series("grad_norm"))],
            log=True,
        ),
        draw("Learning rate", "", [Line("rate", series("learning_rate"))]),
    ]
    drawn = [figure for figure in figures if figure]
    if not drawn:
        yield '<p class="dim">No step was taken yet.</p>'
        return
    yield f'<div class="grid">{"".join(drawn)}</div>'
    for step, text in marks:
        yield f'<p class="dim">Red line at step {step:,}: {clipped(text, 400)}</p>'
    broken = [line for line in run.steps if not _is_number(line.get("loss"))]
    if broken:
        at = ", ".join(f"{int(line['step']):,}" for line in broken[:5])
        yield f'<p class="bad">{len(broken):,} losses are not finite, the first at step {at}.</p>'
    yield _vital_table(run)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def _vital_table(run: RunFacts) -> str:
    """The vital signs in numbers: the same as the curves, for whoever reads them."""
    if not run.vitals:
        return ""
    names = [n for n in (*LOSSES, *SHARES, "reply_tokens") if any(n in v for v in run.vitals)]
    heads = "".join(f"<th>{escaped(n.replace('_', ' '))}</th>" for n in ("step", *names))
    rows = [f"<tr>{heads}</tr>"]
    for line in evenly(run.vitals, _ROWS, last=True):
        cells = [f"{int(line['step']):,}", *(_cell(name, line.get(name)) for name in names)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    left = max(len(run.vitals) - _ROWS, 0)
    more = f'<p class="dim">{left:,} more, in metrics.jsonl</p>' if left else ""
    return folded(
        f"vital signs (losses in nats per token{_time(run)})",
        f'<div class="scroll"><table>{"".join(rows)}</table></div>{more}',
    )


def _time(run: RunFacts) -> str:
    """What the vital signs cost, where both were timed."""
    probing, training = (
        [float(line["seconds"]) for line in lines if _is_number(line.get("seconds"))]
        for lines in (run.vitals, run.steps)
    )
    if not probing or not sum(training):
        return ""
    # Not every step has a line.
    whole = sum(training) / len(training) * max(int(line["step"]) for line in run.steps)
    times = "once" if len(probing) == 1 else f"{len(probing):,} times"
    return f"; measured {times}, in {percent(sum(probing) / whole)} of the step time"


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, int | float):
        return "\u2013"
    return percent(value) if name in SHARES else f"{value:.4g}"


# --------------------------------------------------------------------------- what was trained


def _findings(run: RunFacts) -> Iterator[str]:
    if not run.findings:
        yield '<p class="dim">Nothing was found.</p>'
    order = {level: place for place, level in enumerate(LEVELS)}
    yield from finding_cards(
        sorted(run.findings, key=lambda f: order.get(str(f.get("level")), len(order)))  # type: ignore[call-overload]
    )


def _tokens(run: RunFacts) -> Iterator[str]:
    pictures = run.data.get("pictures") or ()
    if not pictures:
        return
    kinds = {piece["kind"] for picture in pictures for piece in picture["pieces"]}
    yield legend(
        kind for kind in ("shared", "prompt", "context", "supervised", "stop") if kind in kinds
    )
    yield (
        '<p class="dim">Only supervised tokens are learned. Hover over a token to see its id.</p>'
    )
    for picture in pictures[:8]:
        spans = "".join(token_spans(p["kind"], p["ids"], p["texts"]) for p in picture["pieces"])
        shown = sum(len(p["ids"]) for p in picture["pieces"])
        left = int(picture["tokens"]) - shown
        more = f'<span class="dim"> \u2026 and {left:,} more tokens</span>' if left > 0 else ""
        several = int(picture.get("sequences") or 1)
        of = f", the longest of {several:,} sequences" if several > 1 else ""
        yield (
            f'<p class="dim">{_place(str(picture.get("where", "")))}: {picture["tokens"]:,} '
            f"tokens, {picture['supervised']:,} supervised{of}</p><pre>{spans}{more}</pre>"
        )


def _lengths(run: RunFacts) -> Iterator[str]:
    if lengths := run.data.get("lengths"):
        yield from lengths_section(lengths)


def _rows(run: RunFacts) -> Iterator[str]:
    if not run.data:
        return
    table = []
    for name, title in (("train", "trained"), ("held_out", "held out")):
        count = run.data.get(name) or {}
        table.append(
            (
                title,
                f"{counted(count.get('examples', 0), 'example')}, {count.get('tokens', 0):,} "
                f"tokens, {count.get('supervised_tokens', 0):,} of them supervised; longest "
                f"{count.get('longest', 0):,}",
            )
        )
    cut = sum(
        (run.data.get(name) or {}).get("truncated_prompts", 0) for name in ("train", "held_out")
    )
    split = sum((run.data.get(name) or {}).get("split_texts", 0) for name in ("train", "held_out"))
    dropped = run.data.get("dropped") or ()
    files = "; ".join(
        f"{file.get('path')} ({counted(file.get('num_rows', 0), 'row')}, sha256 "
        f"{str(file.get('sha256', ''))[:12]}\u2026)"
        for file in (run.data.get("files") or ())[:50]
    )
    yield facts_table(
        [
            ("files", files),
            ("schema", run.data.get("schema")),
            ("rows read", run.data.get("rows_read")),
            *table,
            ("prompts cut", cut or None),
            ("texts split", split or None),
            ("dropped", f"{len(dropped):,}"),
        ]
    )
    for code, count in Counter(str(drop.get("code")) for drop in dropped).most_common():
        some = [drop for drop in dropped if str(drop.get("code")) == code]
        places = "".join(
            f"<li>{clipped(drop.get('where', ''), 300)}: {clipped(drop.get('what', ''), 300)}</li>"
            for drop in some[:_PLACES]
        )
        more = f'<p class="dim">and {count - _PLACES:,} more</p>' if count > _PLACES else ""
        what = clipped(some[0].get("what", ""), 300)
        yield f"<p>{count:,} dropped, <code>{clipped(code, 80)}</code>: {what}</p>"
        yield folded(f"places of {min(count, _PLACES):,}", f"<ol>{places}</ol>{more}")


def _contract(run: RunFacts) -> Iterator[str]:
    if not run.contract:
        return
    template = run.contract.get("template") or {}
    stops = "; ".join(f"{s.get('token')} ({s.get('id')})" for s in run.contract.get("stop") or ())
    yield facts_table(
        [
            ("template", template.get("origin")),
            ("template arguments", _json(run.contract.get("template_kwargs"))),
            ("answers end on", stops),
            ("tokenizer", run.contract.get("tokenizer")),
            ("fingerprint", run.contract.get("fingerprint")),
        ]
    )
    if source := template.get("source"):
        yield folded("the chat template", f"<pre>{clipped(source, 20_000)}</pre>")


def _json(value: Any) -> str:
    """A mapping as it is written in a recipe, false values too."""
    return json.dumps(value, ensure_ascii=False, default=str) if value else ""


def _checks(run: RunFacts) -> Iterator[str]:
    # The page is written before the manifest, with which files are compared.
    checks = [
        check
        for check in run.verdict.get("checks") or ()
        if (check.get("name"), check.get("state")) != ("files", "not-checked")
    ]
    if checks:
        yield facts_table(
            (
                check.get("name"),
                ". ".join(str(check[part]) for part in ("state", "what", "fix") if check.get(part)),
            )
            for check in checks
        )


def _recipe(run: RunFacts) -> Iterator[str]:
    rows = [
        (name.replace("_", " "), row.get("value"), str(row.get("origin", "")))
        for name, row in run.recipe.items()
        if isinstance(row, Mapping)
    ]
    heads = ("setting", "value", "origin")
    given = [row for row in rows if row[2] != "default"]
    rest = [row for row in rows if row[2] == "default"]
    if given:
        yield f'<div class="scroll">{facts_table(given, heads)}</div>'
    if rest:
        yield folded(f"{len(rest)} settings at their defaults", facts_table(rest, heads))


def _environment(run: RunFacts) -> Iterator[str]:
    rows = []
    for name, value in run.env.items():
        if name == "choices":
            rows += [(c.get("name"), f"{c.get('value')} ({c.get('reason')})") for c in value]
        elif name == "command" and isinstance(value, list) and value:
            start, *rest = map(str, value)
            # As `python -m truetune` is recorded, and everything else by its file.
            program = PurePath(start).name.replace("__main__.py", "truetune")
            rows.append((name, shlex.join([program, *rest])))
        else:
            rows.append((name.replace("_", " "), value))
    if rows:
        yield facts_table(rows)
