"""Draw a page's pictures as inline SVG: curves and histograms, each with axes, units and
alternative text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from truetune.findings import escaped

Point = tuple[float, float]

_WIDE, _HIGH = 420, 210
_LEFT, _RIGHT, _TOP, _FOOT = 52, 10, 20, 34
# Points of a line that are drawn; of more, the lowest and the highest of each stretch.
_MOST = 240
# A line of so few points shows each.
_FEW = 40
# Largest value over smallest above which the axis counts in powers of ten.
_LOG = 1000.0
_COLOURS = ("var(--bar)", "var(--cut)", "var(--third)", "var(--good)")
_DASHES = ("", ' stroke-dasharray="6 3"', ' stroke-dasharray="2 3"', ' stroke-dasharray="8 3 2 3"')


@dataclass(frozen=True)
class Line:
    """A curve: (step, value), in the order of the steps; values that are not finite are omitted."""

    name: str
    points: Sequence[Point]

    @property
    def finite(self) -> list[Point]:
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    share: bool = False,
    log: bool = False,
    marks: Sequence[tuple[int, str]] = (),
    until: float = 0,
) -> str:
    """Curves over the steps in one figure; empty if there is no point.

    Args:
        unit: of the values; "" if they have none.
        share: values are parts of 1, shown in percent of the whole.
        log: use a logarithmic axis.
        marks: (step, text) of what happened.
        until: the last step of the run, which a curve may not have come to yet.
    """
    drawn = [(i, line, line.finite) for i, line in enumerate(lines) if line.finite]
    if not drawn:
        return ""
    every = [point for _, _, points in drawn for point in points]
    last = max([until, *(x for x, _ in every), *(step for step, _ in marks)])
    first = min(x for x, _ in every)
    axis = _Axis.of([y for _, y in every], share=share, log=log)
    right = last if last > first else first + 1
    steps = _ticks(first, right, 5)

    def x_of(step: float) -> float:
        return _LEFT + (_WIDE - _LEFT - _RIGHT) * (step - first) / (right - first)

    def y_of(value: float) -> float:
        return _TOP + (_HIGH - _TOP - _FOOT) * (1 - axis.place(value))

    parts = []
    for value in axis.ticks:
        y = y_of(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="var(--line)"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{axis.word(value)}</text>'
        )
    bottom = _HIGH - _FOOT
    for step in steps:
        if step != int(step):
            continue
        x = x_of(step)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}" '
            'stroke="var(--dim)"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{int(step):,}</text>'
        )
    unit_shown = "share" if share else unit
    parts.append(f'<text x="{_LEFT - 44}" y="11">{escaped(unit_shown)}</text>')
    parts.append(
        f'<text x="{_WIDE - _RIGHT}" y="{_HIGH - 3}" text-anchor="end">optimizer step</text>'
    )
    for step, text in marks:
        if first <= step <= right:
            x = x_of(step)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}" stroke="var(--error)" '
                f'stroke-dasharray="3 3"><title>step {step:,}: {escaped(text)}</title></line>'
            )
    for index, line, points in drawn:
        colour = _COLOURS[index % len(_COLOURS)]
        dash = _DASHES[index % len(_DASHES)]
        kept = [(x_of(x), y_of(y)) for x, y in thinned(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in kept)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
            f'stroke-linejoin="round"{dash}/>'
        )
        if len(points) <= _FEW:
            parts += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6" fill="{colour}">'
                f"<title>{escaped(line.name)}, step {int(x):,}: {axis.word(y)}</title></circle>"
                for x, y in points
            ]
    said = f"{title}{f', {unit_shown}' if unit_shown else ''}: " + "; ".join(
        _in_words(line.name, points, axis) for _, line, points in drawn
    )
    keys = "".join(
        f' <span class="name"><span class="key" style="background:'
        f'{_COLOURS[index % len(_COLOURS)]}"></span>'
        f"{escaped(line.name)} {axis.word(points[-1][1])}</span>"
        for index, line, points in drawn
    )
    powers = ", powers of ten" if axis.log else ""
    unit_in_words = f", {escaped(unit)}" if unit else ""
    return (
        f"<figure><figcaption><b>{escaped(title)}</b>{unit_in_words}{powers}{keys}</figcaption>"
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escaped(said)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _in_words(name: str, points: Sequence[Point], axis: _Axis) -> str:
    """A curve in words."""
    (start, begin), (end, now) = points[0], points[-1]
    if len(points) == 1:
        return f"{name} {axis.word(now)} at step {int(end):,}"
    low, high = min(points, key=lambda p: p[1]), max(points, key=lambda p: p[1])
    return (
        f"{name} from {axis.word(begin)} at step {int(start):,} to {axis.word(now)} at step "
        f"{int(end):,}, lowest {axis.word(low[1])} at step {int(low[0]):,}, highest "
        f"{axis.word(high[1])} at step {int(high[0]):,}"
    )


def thinned(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """Reduce the points but keep peaks: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for at in range(0, len(points), size):
        part = range(at, min(at + size, len(points)))
        ends = {min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(ends)]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


@dataclass(frozen=True)
class _Axis:
    """The upright axis: its range, its ticks, how it writes a value."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool
    share: bool

    @classmethod
    def of(cls, values: Sequence[float], *, share: bool, log: bool) -> _Axis:
        low, high = min(values), max(values)
        if share:
            return cls(0.0, max(high, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0), False, True)
        if log and low > 0 and high / low >= _LOG:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            every = max(math.ceil((last - first) / 5), 1)
            ticks = tuple(10.0**power for power in range(first, last + 1, every))
            return cls(10.0**first, 10.0**last, ticks, True, False)
        low = min(low, 0.0)
        high = max(high, 0.0)
        if low == high:
            high = 1.0
        ticks = tuple(_ticks(low, high, 5, outside=True))
        return cls(min(low, ticks[0]), max(high, ticks[-1]), ticks, False, False)

    def place(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def word(self, value: float) -> str:
        if self.share:
            return f"{100 * value:.0f} %"
        if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
            mantissa, _, power = f"{value:.2e}".partition("e")
            return f"{float(mantissa):g}e{int(power)}"
        return f"{value:.4g}"


def _ticks(low: float, high: float, about: int, *, outside: bool = False) -> list[float]:
    """Round numbers over a range; with `outside` the first and the last enclose it."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if n * power >= rough * 0.999)
    first = math.floor(low / step) if outside else math.ceil(low / step)
    last = math.ceil(high / step - 1e-9) if outside else math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def histogram(bins: Sequence[Mapping[str, int]], limit: int) -> str:
    """Rows by their length; those beyond the limit in another colour."""
    # No wider than a curve: on a telephone its words are as large as theirs.
    wide, high, foot = _WIDE, 150, 36
    most = max((b["rows"] for b in bins), default=0) or 1
    step = wide / max(len(bins), 1)
    shapes = []
    for index, part in enumerate(bins):
        tall = (high - 32) * part["rows"] / most
        colour = "var(--cut)" if limit and part["from"] > limit else "var(--bar)"
        shapes.append(
            f'<rect x="{index * step + 1:.1f}" y="{high - tall:.1f}" width="{step - 2:.1f}" '
            f'height="{tall:.1f}" fill="{colour}"><title>{part["from"]:,} to {part["to"]:,} '
            f"tokens: {part['rows']:,} rows</title></rect>"
        )
        every = max(len(bins) // 6, 1)
        if index % every == 0 and len(bins) - index > every // 2:
            shapes.append(f'<text x="{index * step:.1f}" y="{high + 15}">{part["from"]:,}</text>')
    last = bins[-1]["to"] if bins else 0
    shapes.append(f'<text x="{wide}" y="{high + 15}" text-anchor="end">{last:,}</text>')
    shapes.append(f'<text x="{wide}" y="{high + 31}" text-anchor="end">tokens of a row</text>')
    shapes.append(f'<text x="2" y="10">{most:,} rows</text>')
    shapes += _limit_line(limit, last, wide, high)
    rows = sum(b["rows"] for b in bins)
    said = f"{rows:,} rows by length in tokens, up to {last:,}"
    if limit:
        over = sum(b["rows"] for b in bins if b["from"] > limit)
        said += f"; the limit is {limit:,}; {over:,} rows are in ranges above it"
    return (
        f'<svg viewBox="0 0 {wide} {high + foot}" style="max-width:36rem" role="img" '
        f'aria-label="{escaped(said)}">{"".join(shapes)}</svg>'
    )


def _limit_line(limit: int, last: int, wide: int, high: int) -> Iterator[str]:
    if not limit or limit >= last:
        return
    at = wide * limit / last
    # Near the right end the words stand on the left of their line.
    place = f'x="{at - 4:.1f}" text-anchor="end"' if at > wide - 90 else f'x="{at + 4:.1f}"'
    yield (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{high}" stroke="var(--error)" '
        f'stroke-dasharray="4 3"/><text {place} y="24">limit {limit:,}</text>'
    )


@dataclass(frozen=True)
class Dots:
    """One measure of several things: a panel of `dot_plot`.

    Attributes:
        title: of the panel.
        unit: of the values; "" if they have none.
        values: a thing each: (value, low, high, the values that it is the mean of); None if it
            has none.
        share: values are parts of 1.
    """

    title: str
    unit: str
    values: Sequence[tuple[float, float, float, Sequence[float]] | None]
    share: bool = False


_LETTER, _PANEL, _ROW, _GAP = 6.3, 180, 24, 60


def dot_plot(title: str, names: Sequence[str], panels: Sequence[Dots]) -> str:
    """Measures of several things side by side: a dot with its interval, and a ring for each value
    that it is the mean of."""
    side = 16 + _LETTER * max(map(len, names), default=0)
    wide = round(side + len(panels) * (_PANEL + _GAP))
    bottom = _TOP + 18 + _ROW * len(names)
    parts = []
    for row, name in enumerate(names):
        y = _TOP + 18 + _ROW * (row + 0.5)
        parts.append(
            f'<text x="{side - 8:.0f}" y="{y + 4}" text-anchor="end">{escaped(name)}</text>'
        )
    said = []
    for number, panel in enumerate(panels):
        known = [value for value in panel.values if value is not None]
        if not known:
            continue
        left = side + number * (_PANEL + _GAP) + _GAP / 2
        axis = _Axis.of([v for value in known for v in value[:3]], share=panel.share, log=False)
        parts.append(
            f'<text x="{left + _PANEL / 2}" y="14" text-anchor="middle" '
            f'style="fill:var(--ink);font-weight:600">{escaped(panel.title)}</text>'
        )

        def x_of(value: float, left: float = left, axis: _Axis = axis) -> float:
            return left + _PANEL * min(max(axis.place(value), 0.0), 1.0)

        for tick in axis.ticks:
            x = x_of(tick)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP + 8}" y2="{bottom}" '
                'stroke="var(--line)"/>'
                f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{axis.word(tick)}</text>'
            )
        unit = "share" if panel.share else panel.unit
        parts.append(
            f'<text x="{left + _PANEL / 2}" y="{bottom + 31}" text-anchor="middle">'
            f"{escaped(unit)}</text>"
        )
        for row, value in enumerate(panel.values):
            if value is None:
                continue
            middle, low, high, each = value
            y = _TOP + 18 + _ROW * (row + 0.5)
            words = f"{axis.word(middle)}, 95 % {axis.word(low)} to {axis.word(high)}"
            parts.append(
                f'<line x1="{x_of(low):.1f}" x2="{x_of(high):.1f}" y1="{y}" y2="{y}" '
                'stroke="var(--bar)" stroke-width="2"/>'
            )
            parts += [
                f'<circle cx="{x_of(one):.1f}" cy="{y}" r="5" fill="none" stroke="var(--dim)" '
                'stroke-opacity=".6"/>'
                for one in each[:12]
            ]
            parts.append(
                f'<circle cx="{x_of(middle):.1f}" cy="{y}" r="3.2" fill="var(--bar)">'
                f"<title>{escaped(names[row])}: {words}</title></circle>"
            )
            said.append(f"{panel.title} of {names[row]} {words}")
    high = bottom + 38
    return (
        f'<svg viewBox="0 0 {wide} {high}" role="img" '
        f'aria-label="{escaped(title)}: {escaped("; ".join(said))}">{"".join(parts)}</svg>'
    )
