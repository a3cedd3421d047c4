"""A job's metrics as lines of an SVG picture. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compression.report import COLORS
from services.measures import Points, thin
from services.tables import counted

LEFT, RIGHT, TOP, BOTTOM = 52.0, 410.0, 10.0, 196.0
MOST_POINTS = 300


@dataclass(frozen=True)
class Tick:
    """A value on the axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One candidate."""

    name: str
    color: str
    points: str


@dataclass(frozen=True)
class Chart:
    """One metric."""

    name: str
    first: int
    last: int
    ticks: Sequence[Tick]
    lines: Sequence[Line]


def chart(name: str, series: Mapping[str, Points]) -> Chart | None:
    """The metric against the step, in the picture's coordinates; None where there is nothing finite to draw."""
    rows = {one: _finite(points) for one, points in series.items()}
    known = [row for some in rows.values() for row in some]
    if not known:
        return None
    first, last = min(step for step, _ in known), max(step for step, _ in known)
    low, high = _bounds([value for _, value in known])

    def place(step: int, value: float) -> str:
        x = LEFT + (RIGHT - LEFT) * (step - first) / max(1, last - first)
        return f"{x:.1f},{_height(value, low, high):.1f}"

    lines = [
        Line(one, COLORS[index % len(COLORS)], " ".join(place(step, value) for step, value in rows[one]))
        for index, one in enumerate(sorted(rows))
    ]
    ticks = [Tick(_height(value, low, high), _short(value)) for value in (low, (low + high) / 2, high)]
    return Chart(name.replace("_", " "), first, last, ticks, lines)


def _finite(points: Points) -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in thin(points, MOST_POINTS) if math.isfinite(value)]


def _short(value: float) -> str:
    """A value on the axis, in a few signs."""
    if abs(value) >= 1000:
        return counted(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}"


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _height(value: float, low: float, high: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)
