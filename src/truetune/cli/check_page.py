"""A checkup as one HTML file: no script, no link, nothing fetched; all text escaped.

input   what `--json` prints
does    findings as cards, the lengths as a picture, the numbers as tables
output  HTML
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from truetune.checks.fit import duration
from truetune.cli.html import document
from truetune.findings import LEVELS, escaped, gib, percent

_STYLE = """
:root{--ink:#1c2430;--dim:#5b6675;--line:#dde3ea;--page:#fff;--error:#b3261e;--warning:#9a6200;
--note:#0b6478;--good:#1a7f37;--bar:#4472a8;--cut:#c96a5f}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ee;--dim:#9aa6b5;--line:#333d4a;--page:#14181e;
--error:#ff8a80;--warning:#e8b04c;--note:#66c3d6;--good:#6fcf87;--bar:#6f9fd8;--cut:#d98a80}}
body{margin:2rem auto;max-width:58rem;padding:0 1rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0 0 .3rem}h2{font-size:1.05rem;margin:2rem 0 .6rem}
p.sub{color:var(--dim);margin:0 0 1.2rem;overflow-wrap:anywhere}
.verdict{font-weight:600}.ok{color:var(--good)}.bad{color:var(--error)}
article{border:1px solid var(--line);border-left:4px solid;border-radius:6px;padding:.6rem .9rem;
margin:.6rem 0}
article.error{border-left-color:var(--error)}article.warning{border-left-color:var(--warning)}
article.note{border-left-color:var(--note)}
article h3{font-size:.95rem;margin:0;font-weight:600;overflow-wrap:anywhere}
.level{text-transform:uppercase;font-size:.72rem;letter-spacing:.05em;margin-right:.5rem}
.error .level{color:var(--error)}.warning .level{color:var(--warning)}
.note .level{color:var(--note)}
code{font:.86em ui-monospace,monospace}
dl{display:grid;grid-template-columns:4.2rem 1fr;gap:.15rem .6rem;margin:.5rem 0 0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap}
details summary{color:var(--dim);cursor:pointer;font-size:.88rem;margin-top:.4rem}
details ol{margin:.3rem 0 0;padding-left:1.4rem;font-size:.86rem;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line)}
th{color:var(--dim);font-weight:500;font-size:.86rem}
th:first-child,td:first-child{text-align:left}tr.now td{font-weight:600}
table.facts td{text-align:left;overflow-wrap:anywhere}table.facts td:first-child{color:var(--dim);
width:11rem}
svg{width:100%;height:auto}svg text{fill:var(--dim);font:11px system-ui,sans-serif}
.scroll{overflow-x:auto}
"""


def page(facts: Mapping[str, Any]) -> str:
    """The HTML of a checkup.

    Args:
        facts: `Checkup.as_dict()`.
    """
    summary = facts["summary"]
    body = [
        *_head(facts, summary),
        *_findings(facts["findings"]),
        *_lengths(summary.get("lengths")),
        *_topics(summary),
    ]
    return document("truetune check", _STYLE, body)


def _text(value: Any) -> str:
    return escaped(str(value))


def _head(facts: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[str]:
    run = summary.get("run") or summary.get("model") or {}
    counts = summary["counts"]
    told = ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts.items() if n)
    name, css = ("ok", "ok") if facts["ok"] else ("not ok", "bad")
    yield f'<h1>truetune check: <span class="verdict {css}">{name}</span></h1>'
    looked = " \u00b7 ".join(_text(run[key]) for key in ("model", "data") if run.get(key))
    yield f'<p class="sub">{looked}<br>{told or "nothing found"}</p>'


def _findings(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for finding in findings:
        level = finding["level"] if finding["level"] in LEVELS else "note"
        yield f'<article class="{level}"><h3><span class="level">{level}</span>'
        yield f"{_text(finding['what'])} <code>{_text(finding['code'])}</code></h3><dl>"
        more = finding["count"] - 1
        where = finding["where"] + (
            f" (and {more:,} more)" if more > 0 and finding["where"] else ""
        )
        for label, value in (("where", where), ("why", finding["why"]), ("fix", finding["fix"])):
            if value:
                yield f"<dt>{label}</dt><dd>{_text(value)}</dd>"
        yield "</dl>"
        if len(finding.get("rows", ())) > 1:
            rows = "".join(f"<li>{_text(row)}</li>" for row in finding["rows"])
            summary = f"<summary>{len(finding['rows'])} places</summary>"
            yield f"<details>{summary}<ol>{rows}</ol></details>"
        yield "</article>"


# ------------------------------------------------------------------ lengths


def _lengths(lengths: Mapping[str, Any] | None) -> Iterator[str]:
    if not lengths:
        return
    yield "<h2>Lengths in tokens</h2>"
    yield _picture(lengths["histogram"], int(lengths["limit"]["limit"]))
    yield (
        f"<p>Half of the rows have up to {lengths['p50']:,} tokens, 95 % up to {lengths['p95']:,}, "
        f"99 % up to {lengths['p99']:,}; the longest has {lengths['longest']:,}. "
        f"{lengths['keeps_99_percent']:,} tokens keep 99 % of the rows whole.</p>"
    )
    yield (
        '<div class="scroll"><table><tr><th>cut after</th><th>rows cut</th>'
        "<th>lose the end token</th><th>lose all of the answer</th>"
        "<th>never close their reasoning</th><th>tokens kept</th></tr>"
    )
    for damage in lengths["limits"]:
        rows, thoughts = max(damage["rows"], 1), damage["with_thoughts"]
        now = ' class="now"' if damage["limit"] == lengths["limit"]["limit"] else ""
        unclosed = percent(damage["thoughts"] / thoughts) if thoughts else "\u2013"
        cells = [
            f"{damage['limit']:,}",
            *(percent(damage[name] / rows) for name in ("cut", "stops", "gone")),
            unclosed,
            percent(damage["tokens_kept"]),
        ]
        yield f"<tr{now}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


def _picture(bins: Sequence[Mapping[str, int]], limit: int) -> str:
    """The histogram; rows beyond the limit in another colour."""
    wide, high, foot = 760, 170, 22
    most = max((b["rows"] for b in bins), default=0) or 1
    step = wide / max(len(bins), 1)
    shapes = []
    for index, part in enumerate(bins):
        tall = (high - 14) * part["rows"] / most
        colour = "var(--cut)" if part["from"] > limit else "var(--bar)"
        shapes.append(
            f'<rect x="{index * step + 1:.1f}" y="{high - tall:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}" fill="{colour}"><title>{part["from"]:,} to {part["to"]:,} '
            f"tokens: {part['rows']:,} rows</title></rect>"
        )
        if index % max(len(bins) // 6, 1) == 0:
            shapes.append(f'<text x="{index * step:.1f}" y="{high + 15}">{part["from"]:,}</text>')
    last = bins[-1]["to"] if bins else 0
    shapes.append(f'<text x="{wide}" y="{high + 15}" text-anchor="end">{last:,}</text>')
    shapes.append(f'<text x="2" y="10">{most:,} rows</text>')
    if limit < last:
        at = wide * limit / last
        # Near the right end the words stand on the left of their line.
        place = f'x="{at - 4:.1f}" text-anchor="end"' if at > wide - 90 else f'x="{at + 4:.1f}"'
        shapes.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{high}" stroke="var(--error)" '
            f'stroke-dasharray="4 3"/><text {place} y="24">limit {limit:,}</text>'
        )
    return (
        f'<svg viewBox="0 0 {wide} {high + foot}" role="img" '
        f'aria-label="histogram of row lengths">{"".join(shapes)}</svg>'
    )


# ------------------------------------------------------------------ the rest


def _topics(summary: Mapping[str, Any]) -> Iterator[str]:
    titles = {
        "model": "Model",
        "verdict": "Base or instruct",
        "run": "Run",
        "contract": "Prompt and answer",
        "plan": "Memory and time",
        "rehearsal": "Smoke test",
    }
    for name, title in titles.items():
        values = summary.get(name)
        if not values:
            continue
        yield f'<h2>{title}</h2><table class="facts">'
        for key, value in (_readable(values) if name == "plan" else values).items():
            shown = _value(value)
            if shown:
                yield f"<tr><td>{_text(key.replace('_', ' '))}</td><td>{_text(shown)}</td></tr>"
        yield "</table>"


def _readable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes and seconds in units that people read."""
    told: dict[str, Any] = {
        "device": plan["device"],
        "memory": f"{gib(plan['low'])} to {gib(plan['high'])}",
        "free": None if plan["available"] is None else gib(plan["available"]),
        "of it": ", ".join(f"{name} {gib(size)}" for name, size in plan["parts"].items()),
        "time": duration(plan["seconds"]) if plan["seconds"] else "",
    }
    for option, size, cost in plan["ways"]:
        told[f"with {option}"] = f"{gib(size)} ({cost})"
    return told


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        shown = {name: part for name, part in value.items() if part and name != "sha256"}
        return ", ".join(f"{name.replace('_', ' ')} {_value(v)}" for name, v in shown.items())
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "; ".join(_value(item) for item in value)
    if isinstance(value, bool) or value is None:
        return "" if value is None else "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}"
