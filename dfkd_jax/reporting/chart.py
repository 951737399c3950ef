"""Curves as SVG within a page: they take the page's colours, light or dark, and its width."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 420, 250  # of which a phone shows nine tenths
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 10, 34  # margins
COLOURS = 8  # of the page's style, .c0 to .c7; more lines repeat them, dashed
POINTS = 400  # the most of a line

# What the page's style must hold, beside the colours --c0 to --c7.
STYLE = """
.charts { display: grid; gap: 1.5rem;
          grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 6 4; }
svg .reference { stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.4; }
.legend { list-style: none; margin: .2rem 0 0; padding: 0; display: flex; flex-wrap: wrap;
          gap: .1rem 1rem; font-size: .85rem; }
.legend svg { width: 1.6rem; height: .7rem; display: inline-block; margin-right: .35rem; }
""" + ''.join(f'.c{i} {{ stroke: var(--c{i}); }}\n' for i in range(COLOURS))  # fmt: skip


class Line(NamedTuple):
    """A curve: numbers of one length, NaN where nothing was measured."""

    label: str
    x: np.ndarray
    y: np.ndarray


class Scale(NamedTuple):
    """An axis: values to places in [0, 1], and the values to name."""

    place: Callable[[np.ndarray], np.ndarray]
    ticks: list[float]


def figure(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    references: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """A figure with its legend; '' where no line has a point.

    references: horizontal lines, by name.
    from_zero: whether the vertical axis shows zero, wherever the values are.
    The vertical axis is logarithmic where the values are too far apart for a linear one.
    """
    known = [Line(line.label, *_known(line)) for line in lines]
    known = [line for line in known if len(line.x)]
    if not known:
        return ''
    references = references or {}
    zero = [0.0] if from_zero else []
    y = _scale(np.concatenate([*(line.y for line in known), [*references.values(), *zero]]))
    end = max(float(max(line.x.max() for line in known)), 1e-9)
    x = _linear(0.0, end, 6)
    parts = [_axes(x, y, x_label)]
    for value in references.values():
        at = _y(y, value)
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>'
        )
    for number, line in enumerate(known):
        parts.append(_drawn(line, number, x, y))
    told = f'{title}: {", ".join(line.label for line in known)}, by {x_label}'
    return (
        f'<figure><figcaption>{html.escape(title)} <small>({html.escape(y_label)})</small>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(told)}">{"".join(parts)}</svg>'
        f'{_legend(known, references)}</figure>'
    )


def _known(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """The points that were measured, at most `POINTS` of them, the last one included."""
    fine = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = line.x[fine], line.y[fine]
    if len(x) > POINTS:
        chosen = np.linspace(0, len(x) - 1, POINTS).round().astype(int)
        x, y = x[chosen], y[chosen]
    return x, y


def _scale(values: np.ndarray) -> Scale:
    """The vertical axis: linear, or logarithmic on both sides of zero."""
    sizes = np.abs(values[values != 0])
    typical = float(np.median(sizes)) if sizes.size else 1.0
    low, high = float(values.min()), float(values.max())
    if not sizes.size or sizes.max() <= 30 * typical:
        margin = 0.05 * (high - low) or 0.5
        return _linear(low - margin, high + margin, 5)
    unit = float(sizes.min()) if low > 0 else 10 ** math.floor(math.log10(typical))

    def bent(value: np.ndarray) -> np.ndarray:
        value = np.asarray(value, float)
        return np.sign(value) * np.log10(1 + np.abs(value) / unit)

    powers = range(math.floor(math.log10(unit)), math.ceil(math.log10(max(abs(low), high))) + 1)
    step = max(1, len(powers) // 4)
    ticks = [10.0**power for power in powers[::step]]
    ticks = [*ticks, *(-tick for tick in ticks), 0.0] if low <= 0 else ticks
    first, last = float(bent(np.array(low))), float(bent(np.array(high)))
    margin = 0.05 * (last - first)
    first, last = first - margin, last + margin

    def place(value: np.ndarray) -> np.ndarray:
        return (bent(value) - first) / (last - first)

    return Scale(place, sorted(tick for tick in ticks if 0 <= place(np.array(tick)) <= 1))


def _linear(low: float, high: float, number: int) -> Scale:
    """An even axis with about `number` round values named."""
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return Scale(lambda value: (np.asarray(value, float) - low) / (high - low), ticks)


def _x(scale: Scale, value: float) -> float:
    return round(LEFT + float(scale.place(np.array(value))) * (WIDTH - LEFT - RIGHT), 1)


def _y(scale: Scale, value: float) -> float:
    return round(HEIGHT - BOTTOM - float(scale.place(np.array(value))) * (HEIGHT - TOP - BOTTOM), 1)


def _axes(x: Scale, y: Scale, x_label: str) -> str:
    parts = []
    for tick in y.ticks:
        at = _y(y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4}" text-anchor="end">{short(tick)}</text>')
    for tick in x.ticks:
        at = _x(x, tick)
        parts.append(
            f'<text x="{at}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    return ''.join(parts)


def _drawn(line: Line, number: int, x: Scale, y: Scale) -> str:
    points = list(zip((_x(x, value) for value in line.x), (_y(y, value) for value in line.y)))
    style = f'line c{number % COLOURS}{" dashed" if number >= COLOURS else ""}'
    if len(points) == 1:
        (at, height) = points[0]
        points = [(at - 3, height), (at + 3, height)]  # a line of one point would not be seen
    path = ' '.join(f'{a},{b}' for a, b in points)
    return f'<polyline class="{style}" points="{path}"/>'


def _legend(lines: Sequence[Line], references: Mapping[str, float]) -> str:
    entries = [(f'{name} {short(value)}', 'reference') for name, value in references.items()]
    entries += [
        (line.label, f'line c{number % COLOURS}{" dashed" if number >= COLOURS else ""}')
        for number, line in enumerate(lines)
    ]
    items = ''.join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><line class="{style}" x1="0" x2="26" '
        f'y1="5" y2="5"/></svg>{html.escape(label)}</li>'
        for label, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def short(value: float) -> str:
    """A number for an axis: ``12.5k``, ``0.3``, ``1e-05``."""
    size = abs(value)
    if size >= 1e6:
        return f'{value / 1e6:.4g}M'
    return f'{value / 1e3:.4g}k' if size >= 1e4 else f'{value:.4g}'
