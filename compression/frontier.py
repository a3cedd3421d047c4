"""Which variants no other variant beats in both quality and size. Torch-free."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One variant: bytes, and a quality whose direction ``higher_is_better`` states."""

    bytes: int
    value: float
    higher_is_better: bool = False

    @property
    def cost(self) -> float:
        """The quality as something to make small."""
        return -self.value if self.higher_is_better else self.value


def frontier(points: Sequence[Point]) -> list[bool]:
    """For every point whether it is on the frontier.

    A point is beaten by one that is no larger and no worse, and better in one of the two; equal points do not beat each
    other. A quality that is not a number, or infinitely bad, is never on the frontier. Raises ``ValueError`` where the
    points' qualities point in different directions.
    """
    if len({point.higher_is_better for point in points}) > 1:
        raise ValueError("quality: some variants are better when it is higher, some when lower: compare one metric")
    on = [False] * len(points)
    best = math.inf
    order = sorted((point.bytes, point.cost, index) for index, point in enumerate(points) if math.isfinite(point.cost))
    previous: tuple[int, float] | None = None
    for size, cost, index in order:
        if cost < best or (size, cost) == previous:
            on[index] = True
            best, previous = cost, (size, cost)
    return on
