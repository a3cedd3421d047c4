"""The least sum of errors for a total: which matrices give how much. Torch-free, pure.

Every matrix has an error at some costs (weights that go, bytes, bits). Only the lower convex hull of these points
counts: on it, every further step is worth less, so that the least sum for a total takes the pieces of all hulls
together by their slope (Everett 1963: equal marginal errors, with the slope as the Lagrange multiplier).
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

Point = tuple[int, float]
"""Cost and error."""
Choice = TypeVar("Choice", bound=Hashable)


@dataclass(frozen=True)
class Piece:
    """A straight piece of a matrix's hull, from one cost to the next."""

    name: str
    start: int
    end: int
    slope: float


def pieces(name: str, points: Sequence[Point]) -> Iterator[Piece]:
    """The lower convex hull of points with ascending costs, piece by piece; slopes ascend."""
    hull: list[Point] = []
    for point in points:
        if hull and hull[-1][0] == point[0]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    for start, end in pairwise(hull):
        yield Piece(name, start[0], end[0], _slope(start, end))


def spread(curves: Mapping[str, Sequence[Point]], total: int) -> dict[str, int] | None:
    """Name → its share of ``total``, met exactly, for the least sum of errors; None where the curves end before.

    A curve's costs start at 0; its error is linear between its points, so that one of the pieces may be taken in part.
    """
    taken = dict.fromkeys(curves, 0)
    for piece in _by_slope(curves):
        share = min(total, piece.end - piece.start)
        taken[piece.name] += share
        total -= share
    return taken if total == 0 else None


def choose(curves: Mapping[str, Mapping[Choice, Point]], budget: float) -> dict[str, Choice] | None:
    """Name → one of its choices, for a small sum of errors at a sum of costs within ``budget``; None where it is less.

    From the cheapest choice on, every name goes along its hull, those first that gain most per cost; one whose next
    piece does not fit any more stays where it is. At the totals where no piece is passed over, no choice is better.
    """
    at = {name: {point: choice for choice, point in by_choice.items()} for name, by_choice in curves.items()}
    points = {name: sorted(by_point) for name, by_point in at.items()}
    cost = {name: each[0][0] for name, each in points.items()}
    budget -= sum(cost.values())
    if budget < 0:
        return None
    stopped: set[str] = set()
    for piece in _by_slope(points):
        more = piece.end - piece.start
        if piece.slope >= 0 or more > budget:
            stopped.add(piece.name)
        if piece.name not in stopped:
            cost[piece.name] = piece.end
            budget -= more
    # Of points with the same cost, the first in order has the smaller error.
    return {name: at[name][next(p for p in each if p[0] == cost[name])] for name, each in points.items()}


def _by_slope(curves: Mapping[str, Sequence[Point]]) -> list[Piece]:
    """The pieces of all hulls; those of one hull stay in their order."""
    found = [piece for name, points in curves.items() for piece in pieces(name, points)]
    return sorted(found, key=lambda piece: piece.slope)


def _slope(start: Point, end: Point) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
