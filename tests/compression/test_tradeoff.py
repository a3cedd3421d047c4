"""The least sum of errors for a total, against trying everything."""

import itertools
import random

import pytest

from compression.tradeoff import choose, pieces, spread


def test_the_hull_leaves_out_what_lies_above_it() -> None:
    points = [(0, 10.0), (1, 9.0), (2, 4.0), (3, 3.5), (5, 1.0), (5, 0.0), (6, 3.0)]
    assert [(piece.start, piece.end, piece.slope) for piece in pieces("a", points)] == [
        (0, 2, -3.0),
        (2, 5, -1.0),
        (5, 6, 2.0),
    ]
    assert list(pieces("a", [(3, 1.0)])) == []


def _convex(generator: random.Random, steps: int) -> list[tuple[int, float]]:
    """Whole steps with errors that grow faster and faster."""
    slopes = sorted(generator.random() for _ in range(steps))
    return [(step, sum(slopes[:step])) for step in range(steps + 1)]


@pytest.mark.parametrize("seed", range(8))
def test_shares_have_the_least_error_of_all_shares(seed: int) -> None:
    generator = random.Random(seed)
    curves = {name: _convex(generator, 4 + place) for place, name in enumerate("abc")}
    for total in range(16):
        shares = itertools.product(*(range(len(curve)) for curve in curves.values()))
        least = min(
            sum(curve[share][1] for curve, share in zip(curves.values(), each, strict=True))
            for each in shares
            if sum(each) == total
        )
        found = spread(curves, total)
        assert found is not None
        assert sum(found.values()) == total
        assert sum(curves[name][share][1] for name, share in found.items()) == pytest.approx(least)
    assert spread(curves, 16) is None


def test_a_piece_is_taken_in_part() -> None:
    curves = {"a": [(0, 0.0), (10, 1.0), (20, 5.0)], "b": [(0, 0.0), (10, 2.0), (20, 9.0)]}
    assert spread(curves, 7) == {"a": 7, "b": 0}
    assert spread(curves, 24) == {"a": 14, "b": 10}


@pytest.mark.parametrize("seed", range(8))
def test_choices_stay_within_the_budget_and_are_best_at_their_own_cost(seed: int) -> None:
    generator = random.Random(seed)
    curves = {}
    for name in "abcd":
        errors = sorted((generator.random() for _ in range(4)), reverse=True)
        size = generator.randint(1, 5)
        curves[name] = {bits: (bits * size, error) for bits, error in zip((2, 3, 4, 8), errors, strict=True)}
    every = [dict(zip(curves, each, strict=True)) for each in itertools.product((2, 3, 4, 8), repeat=4)]

    def cost(choice: dict[str, int]) -> int:
        return sum(curves[name][bits][0] for name, bits in choice.items())

    def error(choice: dict[str, int]) -> float:
        return sum(curves[name][bits][1] for name, bits in choice.items())

    least, most = min(map(cost, every)), max(map(cost, every))
    assert choose(curves, least - 1) is None
    for budget in range(least, most + 1):
        found = choose(curves, budget)
        assert found is not None
        assert cost(found) <= budget
        best = min(error(choice) for choice in every if cost(choice) <= budget)
        # Nothing is better by more than one step of one matrix.
        assert error(found) - best <= max(by[2][1] - by[8][1] for by in curves.values())
    steps = sorted(
        (piece for name, by in curves.items() for piece in pieces(name, sorted(by.values()))), key=lambda p: p.slope
    )
    for taken in range(len(steps) + 1):
        budget = least + sum(piece.end - piece.start for piece in steps[:taken])
        found = choose(curves, budget)
        assert found is not None
        assert cost(found) == budget
        assert error(found) == pytest.approx(min(error(choice) for choice in every if cost(choice) <= budget))


def test_what_makes_it_worse_is_not_chosen() -> None:
    assert choose({"a": {2: (2, 1.0), 3: (3, 0.1), 8: (8, 0.2)}}, 100) == {"a": 3}
    assert choose({"a": {2: (2, 1.0), 3: (3, 0.1)}, "b": {2: (20, 1.0), 3: (30, 0.0)}}, 23) == {"a": 3, "b": 2}
