"""The building blocks of every page: one file without scripts or external resources, in which all
foreign text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.contract.view import KINDS, Kind
from truetune.errors import SaveError, UsageError
from truetune.findings import LEVELS, escaped, percent
from truetune.reporting.svg import histogram
from truetune.run_dir import write_text

# What a page may do; `truetune watch` sends it as a header, too.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_LIGHT = """--ink:#1c2430;--dim:#5b6675;--line:#dde3ea;--page:#fff;--soft:#f5f7fa;--error:#b3261e;
--warning:#8a5800;--note:#0b6478;--good:#1a7f37;--bar:#4472a8;--cut:#c2564a;--third:#7b5aa6;
--shared:#d9d9d9;--prompt:#cfe2ff;--context:#e2d9f3;--supervised:#c7eed0;--stop:#ffb3ab"""
_DARK = """--ink:#e4e8ee;--dim:#9aa6b5;--line:#333d4a;--page:#14181e;--soft:#1b2129;--error:#ff8a80;
--warning:#e8b04c;--note:#66c3d6;--good:#6fcf87;--bar:#7aa9e0;--cut:#e08b80;--third:#b79be0;
--shared:#3c424b;--prompt:#1f3a5f;--context:#3d3057;--supervised:#1d4a2b;--stop:#7d2a22"""

_STYLE = (
    f":root{{color-scheme:light dark;{_LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    """*{box-sizing:border-box}
body{margin:2rem auto;max-width:60rem;padding:0 1rem;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:0 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:2.2rem 0 .6rem}h3{font-size:.95rem;margin:1.2rem 0 .4rem}
h2,h3,summary{overflow-wrap:anywhere}
p{margin:.5rem 0;overflow-wrap:anywhere}
p.sub{color:var(--dim);margin:0 0 1.2rem}.dim{color:var(--dim)}
.good{color:var(--good)}.bad{color:var(--error)}.doubt{color:var(--warning)}
.verdict{font-weight:600}
article{border:1px solid var(--line);border-left:4px solid;border-radius:6px;padding:.6rem .9rem;
margin:.6rem 0}
article.error{border-left-color:var(--error)}article.warning{border-left-color:var(--warning)}
article.note{border-left-color:var(--note)}
article h3{margin:0;font-weight:600;overflow-wrap:anywhere}
.level{text-transform:uppercase;font-size:.72rem;letter-spacing:.05em;margin-right:.5rem}
.error .level{color:var(--error)}.warning .level{color:var(--warning)}
.note .level{color:var(--note)}
code{font:.86em ui-monospace,monospace;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:4.2rem 1fr;gap:.15rem .6rem;margin:.5rem 0 0}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere;white-space:pre-wrap;min-width:0}
dl.verdicts{grid-template-columns:max-content 1fr;gap:.45rem 1rem;margin:.8rem 0;padding:.8rem 1rem;
background:var(--soft);border:1px solid var(--line);border-radius:6px}
dl.verdicts dt{color:var(--ink);font-weight:600}dl.verdicts dd{white-space:normal}
summary{color:var(--dim);cursor:pointer;font-size:.88rem;margin-top:.4rem}
details ol{margin:.3rem 0 0;padding-left:1.4rem;font-size:.86rem;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--dim);font-weight:500;font-size:.86rem}
th:first-child,td:first-child,table.facts td,table.facts th{text-align:left}
tr.now td{font-weight:600}table:not(.facts) td{white-space:nowrap}
table.facts td{overflow-wrap:anywhere}table.facts td:first-child{color:var(--dim);width:11rem}
table.facts td:nth-child(2){min-width:6.5rem}
table.facts td:nth-child(3){overflow-wrap:break-word}
.scroll{overflow-x:auto}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font:11px system-ui,sans-serif}
figure{margin:0;min-width:0}figcaption{font-size:.88rem;color:var(--dim);margin-bottom:.3rem}
figcaption b{color:var(--ink)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));
gap:1.2rem 1.6rem}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 .7em;
border:1px solid var(--line)}
.turn{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0}
.reply{border:1px solid var(--line);border-radius:6px;padding:.5rem .8rem;min-width:0}
@media screen{.reply .turn{max-height:14rem;overflow-y:auto}}
.name{white-space:nowrap}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.6rem;
margin:.4rem 0 1.2rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.7 ui-monospace,monospace;
border:1px solid var(--line);border-radius:6px;padding:.8rem 1rem;margin:.4rem 0}
pre span{border-radius:2px;padding:1px 0}pre span:hover{outline:1px solid var(--dim)}
.legend span{padding:2px 6px;margin-right:6px;border-radius:3px;white-space:nowrap}
.refused{border-left:4px solid var(--warning);padding-left:1em;white-space:pre-wrap}
.break{color:var(--dim)}
@media (max-width:34rem){dl.verdicts{grid-template-columns:1fr;gap:0}
dl.verdicts dd{margin-bottom:.5rem}table.facts td:first-child{width:8rem}
th,td,table.facts td,table.facts th{padding-left:.3rem;padding-right:.3rem}
.scroll table.facts td:first-child{width:auto;overflow-wrap:break-word}}
@media print{body{max-width:none;margin:0;font-size:10pt}.grid{grid-template-columns:1fr 1fr}
figure,article,tr,.reply{
break-inside:avoid}h2,h3{break-after:avoid}
details::details-content{content-visibility:visible;display:block;height:auto}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
""" + "".join(f".{kind}{{background:var(--{kind})}}" for kind in KINDS)
)


def document(title: str, body: Iterable[str], *, refresh: int | None = None) -> str:
    """A whole page.

    Args:
        title: escaped here.
        body: HTML, escaped already.
        refresh: seconds after which a browser asks for it again.
    """
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{again}'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def picture(svg: str) -> str:
    """A picture of this kit as a file of its own, which a Markdown page can show."""
    style = (
        f"svg{{{_LIGHT};background:var(--page)}}"
        f"@media (prefers-color-scheme:dark){{svg{{{_DARK}}}}}"
        "text{fill:var(--dim);font:11px system-ui,sans-serif}"
    )
    start, rest = svg.removeprefix("<svg").split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg"{start}><style>{style}</style>{rest}\n'


def write_document(path: Path, text: str, option: str = "--html") -> None:
    """Write a page and create its folder; if that fails, an existing page is unchanged.

    Args:
        option: that named the file.

    Raises:
        UsageError: the file cannot be written, or exists and is not a page.
    """
    if path.is_file() and not _is_page(path):
        raise UsageError(
            f"{path} exists and is not a page; it was not changed",
            where=str(path),
            fix=f"choose another file with {option} FILE",
            code="page-not-written",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except (SaveError, OSError) as error:
        cause = error.__cause__ or error
        raise UsageError(
            f"the page cannot be written: {getattr(cause, 'strerror', None) or cause}",
            where=str(path),
            fix=f"choose another file with {option} FILE",
            code="page-not-written",
        ) from error


def _is_page(path: Path) -> bool:
    """Whether a file may be replaced by a page."""
    try:
        with open(path, "rb") as file:
            return file.read(64).lstrip().lower().startswith((b"<!doctype html", b"<html")) or (
                path.stat().st_size == 0
            )
    except OSError:
        return False


def clipped(value: Any, most: int) -> str:
    """Escaped text for a page; of a longer text its beginning and the number of characters left."""
    text = value if isinstance(value, str) else str(value)
    if len(text) <= most:
        return escaped(text)
    more = len(text) - most
    return f'{escaped(text[:most])}<span class="dim">\u2026 and {more:,} more characters</span>'


def words(value: Any) -> str:
    """A value of a recipe or of a summary in plain text; empty if there is nothing to say."""
    if isinstance(value, Mapping):
        shown = {name: part for name, part in value.items() if part and name != "sha256"}
        return ", ".join(f"{str(name).replace('_', ' ')} {words(v)}" for name, v in shown.items())
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return "; ".join(words(item) for item in value)
    if isinstance(value, bool) or value is None:
        return "" if value is None else "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# An option; a browser would break the line behind its dashes.
_OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]{0,30}")


def _unbroken(text: Any) -> str:
    """Escaped text, its options in one piece each."""
    return _OPTION.sub(r'<span class="name">\g<0></span>', clipped(text, 2000))


def facts_table(rows: Iterable[Sequence[Any]], heads: Sequence[str] = ()) -> str:
    """Return a table of names and values, without entries that have no value."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in heads)
    lines = [f"<tr>{head}</tr>"] if heads else []
    for row in rows:
        cells = [words(cell) for cell in row]
        if any(cells[1:]):
            lines.append("<tr>" + "".join(f"<td>{_unbroken(c)}</td>" for c in cells) + "</tr>")
    return f'<table class="facts">{"".join(lines)}</table>' if lines else ""


def folded(summary: str, body: str) -> str:
    """Content that is folded on the screen and always printed."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


# Findings of a page, and places of a finding; what is left out is counted.
_MOST_FINDINGS, _MOST_PLACES = 200, 100


def finding_cards(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Findings as `Finding.as_dict` has them."""
    for finding in findings[:_MOST_FINDINGS]:
        level = finding.get("level") if finding.get("level") in LEVELS else "note"
        more = int(finding.get("count") or 1) - 1
        where = str(finding.get("where") or "")
        if more > 0 and where:
            where += f" (and {more:,} more)"
        parts = (("where", where), ("why", finding.get("why")), ("fix", finding.get("fix")))
        listed = "".join(f"<dt>{k}</dt><dd>{_unbroken(v)}</dd>" for k, v in parts if v)
        rows = list(finding.get("rows") or ())
        places = ""
        if len(rows) > 1:
            shown = "".join(f"<li>{clipped(row, 300)}</li>" for row in rows[:_MOST_PLACES])
            places = folded(f"{len(rows):,} places", f"<ol>{shown}</ol>")
        yield (
            f'<article class="{level}"><h3><span class="level">{level}</span>'
            f"{_unbroken(finding.get('what', ''))} "
            f"<code>{clipped(finding.get('code', ''), 80)}</code></h3>"
            f"<dl>{listed}</dl>{places}</article>"
        )
    if (left := len(findings) - _MOST_FINDINGS) > 0:
        yield f'<p class="dim">and {left:,} more findings</p>'


# ------------------------------------------------------------------------------------ tokens

_BREAK = '<i class="break">\u21b5</i>\n'
# A token that holds a part of a character.
_PART = "\u00b7"


def legend(kinds: Iterable[Kind] = tuple(KINDS)) -> str:
    """Return the legend for the colours of tokens."""
    spans = "".join(f'<span class="{k}">{escaped(KINDS[k])}</span> ' for k in kinds)
    return f'<p class="legend">{spans}</p>'


def token_spans(kind: str, ids: Sequence[int], texts: Sequence[str]) -> str:
    """Tokens of one kind, each with its id as a tooltip."""
    css = kind if kind in KINDS else "context"
    spans = []
    for token, text in zip(ids, texts, strict=False):
        shown = escaped(str(text)).replace("\n", _BREAK) or _PART
        spans.append(f'<span class="{css}" title="{int(token)}">{shown}</span>')
    return "".join(spans)


# ----------------------------------------------------------------------------------- lengths


def lengths_section(lengths: Mapping[str, Any]) -> Iterator[str]:
    """A length report as `checks.lengths.length_report` makes it."""
    limit = lengths.get("limit") or {}
    share = "all" if lengths["keeps_99_percent"] >= lengths["longest"] else "99 % of the"
    yield histogram(lengths["histogram"], int(limit.get("limit") or 0))
    yield (
        f"<p>Half of the rows have up to {lengths['p50']:,} tokens, 95 % up to {lengths['p95']:,}, "
        f"99 % up to {lengths['p99']:,}; the longest has {lengths['longest']:,}. A limit of "
        f"{lengths['keeps_99_percent']:,} tokens keeps {share} rows whole.</p>"
    )
    yield (
        '<div class="scroll"><table><tr><th>cut after</th><th>rows cut</th>'
        "<th>lose the end token</th><th>lose the whole answer</th>"
        "<th>never close their reasoning</th><th>tokens kept</th></tr>"
    )
    for damage in lengths["limits"]:
        rows, thoughts = max(damage["rows"], 1), damage["with_thoughts"]
        now = ' class="now"' if damage["limit"] == limit.get("limit") else ""
        unclosed = percent(damage["thoughts"] / thoughts) if thoughts else "\u2013"
        cells = [
            f"{damage['limit']:,}",
            *(percent(damage[name] / rows) for name in ("cut", "stops", "gone")),
            unclosed,
            percent(damage["tokens_kept"]),
        ]
        yield f"<tr{now}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"
