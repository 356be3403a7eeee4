"""Line and bar charts as inline SVG: no library, no script, colours from the page's own variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 40
MAX_POINTS = 600
LARGEST = 1e30  # what lies beyond has diverged and would leave the rest of the curve a flat line
TICKS = 5
COLOURS, DASHES = 8, 4

BAR, GAP, HEAD = 16, 6, 22  # pixels: a bar, below it, a group's title
NAME_WIDTH, TEXT_WIDTH = 176, 150  # left and right of the bars
NAME_LENGTH = 24

Point = tuple[float, float]


@dataclass(frozen=True)
class Bar:
    """A value with its name and what is written beside it; not `sure`: drawn pale."""

    name: str
    value: float
    text: str
    sure: bool = True


@dataclass(frozen=True)
class Group:
    """Bars under a title; `mark` is a value that a line is drawn at."""

    title: str
    bars: tuple[Bar, ...]
    mark: float | None = None


@dataclass(frozen=True)
class Curve:
    """One line of several, with its name; `strong`: drawn above the others, and wider."""

    name: str
    points: Sequence[Point]
    strong: bool = False


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        share = 0.5 if high == low else (at - low) / (high - low)
        return self.start + share * (self.end - self.start)


def line_chart(
    title: str,
    points: Sequence[Point],
    *,
    also: tuple[str, Sequence[Point]] | None = None,
    x_label: str = "step",
    log: bool = False,
) -> str:
    """An `<svg>` of one line, or with `also` (its name and points) of two.

    Points that are not finite or huge (or not positive, for `log`) are left out.
    """
    drawn = _drawable(points, log)
    if not drawn:
        return f'<p class="none">{escape(title)}: nothing was measured.</p>'
    name, others = also or ("", ())
    beside = _drawable(others, log)
    x_scale, y_scale, axes = _axes([*drawn, *beside], x_label, log)
    return "".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">',
            *axes,
            *_line(drawn, x_scale, y_scale, x_label, ""),
            *(_line(beside, x_scale, y_scale, f"{name}, {x_label}", " second") if beside else ()),
            *(_legend(name) if beside else ()),
            "</svg>",
        ]
    )


def curves_chart(title: str, curves: Sequence[Curve], *, x_label: str = "step", log: bool = False) -> str:
    """An `<svg>` of several lines on the same axes; each has its colour by its place, as `swatch` has it."""
    drawn = [(at, curve, _drawable(curve.points, log)) for at, curve in enumerate(curves)]
    drawn = sorted((one for one in drawn if one[2]), key=lambda one: one[1].strong)
    if not drawn:
        return f'<p class="none">{escape(title)}: nothing was measured.</p>'
    x_scale, y_scale, axes = _axes([point for _, _, points in drawn for point in points], x_label, log)
    lines = []
    for at, curve, points in drawn:
        kind = f" of-many {colour(at)}{' strong' if curve.strong else ''}"
        path = f'<path class="line{kind}" d="{_path(points, x_scale, y_scale)}"/>'
        end = _dot(x_scale(points[-1][0]), y_scale(points[-1][1]), f"{curve.name}: {points[-1][1]:.4g}", kind)
        lines.append(f"<g><title>{escape(curve.name)}</title>{path}{end}</g>")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
    return "".join([head, *axes, *lines, "</svg>"])


def swatch(at: int) -> str:
    """A piece of the line that `curves_chart` draws in this place: its legend, to stand beside a name."""
    line = f'<path class="line {colour(at)}" d="M0 4h28"/>'
    return f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true">{line}</svg>'


def colour(at: int) -> str:
    """The classes of the line in a place: eight colours, then these again with dashes of another kind."""
    return f"c{at % COLOURS} d{at // COLOURS % DASHES}"


def _axes(points: Sequence[Point], x_label: str, log: bool) -> tuple[Scale, Scale, list[str]]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_scale = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_ticks = log_ticks(min(ys), max(ys)) if log else linear_ticks(min(ys), max(ys))
    y_scale = Scale(min(*y_ticks, *ys), max(*y_ticks, *ys), HEIGHT - BOTTOM, TOP, log)
    drawn = [
        *(_y_tick(y_scale(tick), tick) for tick in y_ticks),
        *(_x_tick(x_scale(tick), tick) for tick in whole_ticks(min(xs), max(xs))),
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_label)}</text>',
    ]
    return x_scale, y_scale, drawn


def _drawable(points: Sequence[Point], log: bool) -> list[Point]:
    shown = [p for p in points if all(abs(value) <= LARGEST for value in p)]  # false for nan too
    return thinned([p for p in shown if p[1] >= 1 / LARGEST] if log else shown)


def _line(points: Sequence[Point], x_scale: Scale, y_scale: Scale, label: str, kind: str) -> list[str]:
    path = _path(points, x_scale, y_scale)
    dots = [_dot(x_scale(x), y_scale(y), f"{label} {x:g}: {y:.4g}", kind) for x, y in points if len(points) <= 120]
    return [f'<path class="line{kind}" d="{path}"/>', *dots]


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    return " ".join(f"{'L' if i else 'M'}{x_scale(x):.1f} {y_scale(y):.1f}" for i, (x, y) in enumerate(points))


def _legend(name: str) -> list[str]:
    right = WIDTH - RIGHT
    return [
        f'<text class="axis" x="{right}" y="{TOP + 10}" text-anchor="end">{escape(name)}</text>',
        f'<path class="line second" d="M{right - 96 - 24} {TOP + 6}h20"/>',
    ]


def bar_chart(title: str, groups: Sequence[Group]) -> str:
    """An `<svg>` of horizontal bars from zero, all on one scale. Values that are not positive or huge are left out."""
    shown = [Group(g.title, tuple(b for b in g.bars if 0 < b.value <= LARGEST), g.mark) for g in groups]
    shown = [group for group in shown if group.bars]
    if not shown:
        return f'<p class="none">{escape(title)}: nothing was measured.</p>'
    scale = Scale(0.0, max(bar.value for group in shown for bar in group.bars), NAME_WIDTH, WIDTH - TEXT_WIDTH)
    parts, y = [], 0
    for group in shown:
        parts.append(f'<text class="axis" x="{NAME_WIDTH}" y="{y + 15}">{escape(group.title)}</text>')
        top = y = y + HEAD
        for bar in group.bars:
            parts.append(_bar(bar, scale, y))
            y += BAR + GAP
        if group.mark is not None and 0 <= group.mark <= scale.high:
            at = f"{scale(group.mark):.1f}"
            parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="{top - 3}" y2="{y - GAP + 3}"/>')
    head = f'<svg viewBox="0 0 {WIDTH} {y}" role="img" aria-label="{escape(title, quote=True)}">'
    return "".join([head, *parts, "</svg>"])


def _bar(bar: Bar, scale: Scale, y: int) -> str:
    width = max(1.0, scale(bar.value) - NAME_WIDTH)
    base = y + BAR - 4
    name = bar.name if len(bar.name) <= NAME_LENGTH else bar.name[: NAME_LENGTH - 1] + "…"
    return (
        f'<text class="name" x="{NAME_WIDTH - 8}" y="{base}" text-anchor="end">{escape(name)}</text>'
        f'<path class="{"bar" if bar.sure else "bar unsure"}" d="M{NAME_WIDTH} {y}h{width:.1f}v{BAR}h-{width:.1f}z"/>'
        f'<text class="axis" x="{NAME_WIDTH + width + 8:.1f}" y="{base}">{escape(bar.text)}</text>'
    )


def thinned(points: list[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points, evenly taken, the first and last among them."""
    if len(points) <= most:
        return points
    step = (len(points) - 1) / (most - 1)
    return [points[round(i * step)] for i in range(most)]


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers that span the values: 1, 2 or 5 times a power of ten apart."""
    if high == low:
        return [low]
    raw = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(raw)) if raw else 0.0
    if power == 0:
        return [low, high]
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.floor(low / step)
    if (first + 1) * step == first * step:
        return [low, high]
    return [(first + i) * step for i in range(math.ceil(high / step) - first + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from below the lowest to above the highest value; both positive."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // TICKS)
    return [10.0**exponent for exponent in range(first, last + 1, stride)]


def whole_ticks(low: float, high: float) -> list[float]:
    """Ticks of a step axis: whole numbers inside the range."""
    return sorted({float(round(tick)) for tick in linear_ticks(low, high) if low <= round(tick) <= high} | {low, high})


def _y_tick(y: float, value: float) -> str:
    line = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text class="axis" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'


def _x_tick(x: float, value: float) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'


def _dot(x: float, y: float, told: str, kind: str) -> str:
    return f'<circle class="dot{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(told)}</title></circle>'
