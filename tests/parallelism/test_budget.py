"""The ledger: what may start, what is spent, and where the schedule stands."""

import itertools
import math
import time

import pytest
from pydantic import ValidationError

from parallelism.budget import Budget, Burnt, Ledger, Progress, Stopwatch

STEP_TOKENS, STEP_FLOPS, STEP_SAMPLES = 4096, 3.7e9, 16


def spend_all(budget: Budget) -> Ledger:
    ledger = Ledger(budget)
    while ledger.allows_step(STEP_TOKENS, STEP_FLOPS):
        ledger.progress = ledger.progress.advanced(STEP_SAMPLES, STEP_TOKENS, STEP_FLOPS)
    return ledger


@pytest.mark.parametrize(
    ("steps", "excess"),
    [(0, 1e-9), (0, 0.999999), *itertools.product([1, 2, 3, 17, 100, 2500], [0.0, 1e-9, 0.3, 0.999999])],
)
@pytest.mark.parametrize("unit", ["flops", "tokens"])
def test_progress_budgets_are_never_exceeded_and_leave_less_than_a_step(unit, steps, excess):
    cost = {"flops": STEP_FLOPS, "tokens": STEP_TOKENS}[unit]
    limit = (steps + excess) * cost
    ledger = spend_all(Budget(**{unit: limit}))
    assert ledger.progress.step == steps
    assert ledger.spent() <= limit
    assert limit - ledger.spent() < cost
    assert ledger.progress.samples == steps * STEP_SAMPLES


def test_flops_beyond_the_exact_integers_of_a_float_still_respect_the_limit():
    """At 1e23 FLOPs sums are rounded; the limit holds for the sum that is kept."""
    ledger, cost = Ledger(Budget(flops=1.0e23)), 3.3333e20 / 7
    while ledger.allows_step(1, cost):
        ledger.progress = ledger.progress.advanced(1, 1, cost)
    assert 1.0e23 - cost < ledger.spent() <= 1.0e23
    assert ledger.progress.step == math.floor(1.0e23 / cost)


def test_clock_units_allow_the_step_that_passes_the_limit_and_no_other():
    for unit, just_below, just_above in (
        ("device_hours", Burnt(device_seconds=7199.9), Burnt(device_seconds=7200.1)),
        ("wall_clock", Burnt(wall_seconds=1.999), Burnt(wall_seconds=2.001)),
        ("cost", Burnt(device_seconds=1439.9), Burnt(device_seconds=1440.1)),  # 2 = 1440 s × 5 per hour
    ):
        ledger = Ledger(Budget(**{unit: 2.0}), price_per_device_hour=5.0, burnt=just_below)
        assert ledger.allows_step(STEP_TOKENS, 1e30), unit
        ledger.burnt = just_above
        assert not ledger.allows_step(1, 1.0), unit
        assert ledger.fraction() == 1.0


def test_burnt_counts_for_clocks_only_and_progress_for_the_rest_only():
    burnt = Burnt(device_seconds=1e9, wall_seconds=1e9)
    assert Ledger(Budget(tokens=100), burnt=burnt).spent() == 0.0
    assert Ledger(Budget(wall_clock=2e9), progress=Progress(1, 1, 10**9, 1e18), burnt=burnt).fraction() == 0.5


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_the_schedule_sees_the_middle_of_every_step(steps):
    ledger, seen = Ledger(Budget(tokens=steps * STEP_TOKENS)), []
    while ledger.allows_step(STEP_TOKENS, STEP_FLOPS):
        seen.append(ledger.step_fraction(STEP_TOKENS, STEP_FLOPS))
        ledger.progress = ledger.progress.advanced(STEP_SAMPLES, STEP_TOKENS, STEP_FLOPS)
    assert seen == pytest.approx([(step + 0.5) / steps for step in range(steps)], abs=1e-15)


def test_the_schedule_of_a_clock_budget_sees_what_is_burnt():
    ledger = Ledger(Budget(wall_clock=200.0), burnt=Burnt(wall_seconds=50.0))
    assert ledger.step_fraction(10**12, 1e30) == 0.25


def test_the_stopwatch_adds_earlier_attempts_and_counts_every_device():
    stopwatch = Stopwatch(devices=4, earlier=Burnt(device_seconds=100.0, wall_seconds=30.0))
    time.sleep(0.05)
    burnt = stopwatch.burnt()
    assert 0.05 <= burnt.wall_seconds - 30.0 < 5.0
    assert burnt.device_seconds - 100.0 == pytest.approx(4 * (burnt.wall_seconds - 30.0))


def test_cost_is_device_hours_times_the_price():
    assert Burnt(device_seconds=5400.0).cost(2.5) == pytest.approx(3.75)


@pytest.mark.parametrize("fields", [{}, {"flops": 1.0, "tokens": 1.0}])
def test_exactly_one_unit_is_given(fields):
    with pytest.raises(ValidationError, match="exactly one of flops, tokens, device_hours, wall_clock, cost"):
        Budget(**fields)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "many"])
def test_limits_are_positive_finite_numbers(value):
    with pytest.raises(ValidationError, match="flops"):
        Budget(flops=value)


def test_a_share_keeps_the_unit():
    share = Budget(device_hours=8.0).share(0.25)
    assert (share.unit, share.limit) == ("device_hours", 2.0)
