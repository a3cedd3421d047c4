"""The frontier against its definition."""

import random

import pytest

from compression.frontier import Point, frontier


def _by_definition(points: list[Point]) -> list[bool]:
    def beats(first: Point, second: Point) -> bool:
        no_worse = first.bytes <= second.bytes and first.cost <= second.cost
        return no_worse and (first.bytes < second.bytes or first.cost < second.cost)

    return [not any(beats(other, point) for other in points) for point in points]


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_random_points(seed: int, higher_is_better: bool) -> None:
    # Few distinct values, so that ties in either direction and equal points occur.
    source = random.Random(seed)
    points = [
        Point(source.randint(1, 8), float(source.randint(1, 8)), higher_is_better) for _ in range(source.randint(0, 30))
    ]
    assert frontier(points) == _by_definition(points)


def test_equal_points_stand_side_by_side() -> None:
    assert frontier([Point(10, 2.0), Point(10, 2.0), Point(10, 2.5), Point(12, 2.0)]) == [True, True, False, False]


def test_what_is_no_number_is_never_on_it() -> None:
    assert frontier([Point(1, float("nan")), Point(2, float("inf")), Point(3, 5.0)]) == [False, False, True]


def test_two_directions_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="compare one metric"):
        frontier([Point(1, 1.0), Point(1, 1.0, higher_is_better=True)])
