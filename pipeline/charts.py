"""Small SVG charts as strings: lines, bars, the graph of stages. No script, no network.

Colours, fonts and dark mode come from the page's style sheet by class name, so a chart
follows the reader's theme. Every text that comes from data is escaped here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 14, 44
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y), ordered by x; `style` names a class of the style sheet."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "s1"
    dots: bool = False
    """Mark each point and give its values on hover (for series of few points)."""


@dataclass(frozen=True)
class Level:
    """A horizontal reference line, labelled at its right end."""

    label: str
    value: float


@dataclass(frozen=True)
class Mark:
    """A vertical reference line, named in the legend: something that happened at `x`."""

    label: str
    x: float


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers spread over [low, high] (1, 2 or 5 times a power of ten apart)."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A figure as a person writes it: 1,500 or 2.31 or 3.2e-05."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e7:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    if abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"


def thin(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple]:
    """At most `most` points: means over equal runs, so that noise shrinks and no trend moves."""
    if len(points) <= most:
        return list(points)
    run = math.ceil(len(points) / most)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _line(style: str, x1: float, y1: float, x2: float, y2: float, tip: str = "") -> str:
    title = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">'
        f"{title}</line>"
    )


def _text(style: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(text)}</text>'


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
) -> str:
    """A figure with axes, units, legend and one line a series; "" if there is no point.

    Marks that lie outside the series' x are left out.
    """
    drawn = [
        (s, thin([(x, y) for x, y in s.points if math.isfinite(x) and math.isfinite(y)]))
        for s in series
    ]
    drawn = [(s, points) for s, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    ys += [level.value for level in levels if math.isfinite(level.value)]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(ys), max(ys)
    pad = (y_high - y_low) * 0.06 or abs(y_high) * 0.1 or 1.0
    y_low, y_high = y_low - pad, y_high + pad

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in nice_ticks(y_low, y_high):
        parts.append(_line("grid", LEFT, py(tick), right, py(tick)))
        parts.append(_text("tick", LEFT - 8, py(tick) + 4, number(tick), "end"))
    for tick in nice_ticks(x_low, x_high, 6):
        parts.append(_line("axis", px(tick), base, px(tick), base + 4))
        parts.append(_text("tick", px(tick), base + 18, number(tick), "middle"))
    parts.append(_line("axis", LEFT, base, right, base))
    parts.append(_text("label", (LEFT + right) / 2, HEIGHT - 6, x_label, "middle"))
    middle = (TOP + base) / 2
    parts.append(
        f'<g transform="rotate(-90 14 {middle:.0f})">'
        f"{_text('label', 14, middle, y_label, 'middle')}</g>"
    )
    for level in levels:
        if math.isfinite(level.value):
            parts.append(
                _line(
                    "level",
                    LEFT,
                    py(level.value),
                    right,
                    py(level.value),
                    f"{level.label}: {number(level.value)}",
                )
            )
    marks = [mark for mark in marks if x_low <= mark.x <= x_high]
    for mark in marks:
        tip = f"{mark.label}: {x_label} {number(mark.x)}"
        parts.append(_line("level", px(mark.x), TOP, px(mark.x), base, tip))
    for s, points in drawn:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {escape(s.style)}" points="{path}"/>')
        if s.dots or len(points) == 1:
            parts += [
                f'<circle class="dot {escape(s.style)}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3.5">'
                f"<title>{escape(f'{s.label}, {x_label} {number(x)}: {number(y)}')}</title>"
                "</circle>"
                for x, y in points
            ]
    keys = [
        f'<span class="key"><i class="swatch {escape(s.style)}"></i>{escape(s.label)} '
        f"<b>{number(points[-1][1])}</b></span>"
        for s, points in drawn
    ]
    keys += [
        f'<span class="key"><i class="swatch level"></i>{escape(level.label)} '
        f"<b>{number(level.value)}</b></span>"
        for level in levels
    ]
    keys += [
        f'<span class="key"><i class="swatch level"></i>{escape(mark.label)} '
        f"<b>{escape(x_label)} {number(mark.x)}</b></span>"
        for mark in marks
    ]
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<div class="legend">{"".join(keys)}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def bar_chart(
    title: str, bars: Mapping[str, float], unit: str, emphasis: Sequence[str] = ()
) -> str:
    """Horizontal bars from zero, each with its figure; `emphasis` names those drawn in colour."""
    finite = {label: value for label, value in bars.items() if math.isfinite(value)}
    if not finite:
        return ""
    row, left, right = 28, 190, 90
    height = row * len(finite) + 6
    longest = max(max(finite.values()), 1e-12)
    parts = []
    for i, (label, value) in enumerate(finite.items()):
        y = 4 + i * row
        width = max(value / longest * (WIDTH - left - right), 1.0)
        style = "s1" if label in emphasis else "other"
        parts += [
            _text("bar-label", left - 10, y + 16, label, "end"),
            f'<rect class="bar {style}" x="{left}" y="{y + 2}" width="{width:.1f}" '
            f'height="{row - 8}" rx="3"/>',
            _text("bar-value", left + width + 8, y + 16, number(value)),
        ]
    return (
        f'<figure class="chart"><figcaption>{escape(title)} <small>({escape(unit)})'
        "</small></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


@dataclass(frozen=True)
class Node:
    """A stage in the graph: its name, lines under it, a state (a class of the style sheet)."""

    name: str
    lines: Sequence[str]
    state: str
    inputs: Sequence[str] = field(default_factory=tuple)


BOX_W, BOX_H, GAP_X, GAP_Y = 180, 74, 30, 20


def graph(nodes: Sequence[Node]) -> str:
    """Stages from left to right, each a column past its last input; curves from input to stage."""
    if not nodes:
        return ""
    places = _places(nodes)
    total_w = (max(column for column, _ in places.values()) + 1) * (BOX_W + GAP_X) - GAP_X + 4
    total_h = (max(row for _, row in places.values()) + 1) * (BOX_H + GAP_Y) - 2
    edges, boxes = [], []
    for node in nodes:
        edges += [_edge(places[i], places[node.name]) for i in node.inputs if i in places]
        x, y = _corner(places[node.name])
        text = "".join(
            f'<text class="node-line" x="{x + 14}" y="{y + 41 + 17 * i}">{escape(line)}</text>'
            for i, line in enumerate(node.lines)
        )
        shown = node.name if len(node.name) <= 17 else node.name[:16] + "…"
        boxes.append(
            f'<g class="node {escape(node.state)}">'
            f"<title>{escape(node.name)}: {escape(node.state)}</title>"
            f'<rect x="{x}" y="{y}" width="{BOX_W}" height="{BOX_H}" rx="8"/>'
            f'<circle class="mark" cx="{x + BOX_W - 14}" cy="{y + 16}" r="4.5"/>'
            f'<text class="node-name" x="{x + 14}" y="{y + 21}">{escape(shown)}</text>{text}</g>'
        )
    return (
        f'<svg class="chain" viewBox="0 0 {total_w} {total_h}" '
        f'style="min-width:{total_w * 0.72:.0f}px;max-width:{total_w}px" role="img" '
        f'aria-label="The chain of stages">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _places(nodes: Sequence[Node]) -> dict[str, tuple[int, int]]:
    """(column, row) of each stage; a branch stands below the branches before it."""
    by_name = {node.name: node for node in nodes}
    column: dict[str, int] = {}

    def depth(name: str, above: tuple[str, ...] = ()) -> int:
        if name not in column:
            inputs = [i for i in by_name[name].inputs if i in by_name and i not in above]
            column[name] = max((depth(i, (*above, name)) + 1 for i in inputs), default=0)
        return column[name]

    places: dict[str, tuple[int, int]] = {}
    below = 0
    for branch in _branches(nodes):
        free: dict[int, int] = {}
        for name in branch:
            at = depth(name)
            places[name] = (at, free.get(at, below))
            free[at] = places[name][1] + 1
        below = max(free.values())
    return places


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return 2 + place[0] * (BOX_W + GAP_X), 2 + place[1] * (BOX_H + GAP_Y)


def _edge(source: tuple[int, int], target: tuple[int, int]) -> str:
    """A curve to the next column; to a later one through the lane under the source's row."""
    (sx, sy), (tx, ty) = _corner(source), _corner(target)
    x1, y1, x2, y2 = sx + BOX_W, sy + BOX_H / 2, tx, ty + BOX_H / 2
    half = GAP_X / 2
    if target[0] - source[0] == 1:
        path = f"M{x1},{y1} C{x1 + half},{y1} {x2 - half},{y2} {x2},{y2}"
    else:
        lane, r = sy + BOX_H + GAP_Y / 2, 9
        turn = -r if y2 < lane else r
        path = (
            f"M{x1},{y1} Q{x1 + r},{y1} {x1 + r},{y1 + r} V{lane - r} "
            f"Q{x1 + r},{lane} {x1 + 2 * r},{lane} H{x2 - half - r} "
            f"Q{x2 - half},{lane} {x2 - half},{lane + turn} "
            f"V{y2 - turn} Q{x2 - half},{y2} {x2 - half + r},{y2} H{x2}"
        )
    return f'<path class="edge" d="{path}"/>'


def _branches(nodes: Sequence[Node]) -> list[list[str]]:
    """Connected groups of stages, in the order in which each group's first stage stands."""
    group = {node.name: node.name for node in nodes}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for node in nodes:
        for source in node.inputs:
            if source in group:
                group[root(node.name)] = root(source)
    branches: dict[str, list[str]] = {}
    for node in nodes:
        branches.setdefault(root(node.name), []).append(node.name)
    return list(branches.values())
