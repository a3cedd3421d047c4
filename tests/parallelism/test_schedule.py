"""Learning rates as functions of the fraction of the budget."""

import itertools
import math

import pytest

from parallelism.schedule import SCHEDULES, learning_rate
from parallelism.training import TrainingConfig

PEAK = 3e-3


def config(**fields):
    return TrainingConfig(
        **({"learning_rate": PEAK, "warmup_fraction": 0.1, "final_learning_rate_fraction": 0.1} | fields)
    )


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_warm_up_rises_linearly_from_zero_to_the_peak(schedule):
    training = config(schedule=schedule)
    for fraction in (0.0, 0.025, 0.05, 0.0999):
        assert learning_rate(training, fraction) == pytest.approx(PEAK * fraction / 0.1)
    assert learning_rate(training, 0.1) == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_after_the_warm_up_the_rate_never_rises_and_has_no_jumps(schedule):
    training = config(schedule=schedule)
    rates = [learning_rate(training, 0.1 + 0.9 * point / 2000) for point in range(2001)]
    drops = [earlier - later for earlier, later in itertools.pairwise(rates)]
    assert min(drops) >= -1e-18
    assert max(drops) < PEAK / 100


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_the_end_of_the_budget_has_the_final_rate(schedule, end):
    training = config(schedule=schedule)
    assert learning_rate(training, 1.0) == pytest.approx(end * PEAK)
    assert learning_rate(training, 1.5) == pytest.approx(end * PEAK)


def test_half_way_values_by_hand():
    half = 0.1 + 0.9 / 2
    assert learning_rate(config(schedule="cosine"), half) == pytest.approx(0.55 * PEAK)
    assert learning_rate(config(schedule="linear"), half) == pytest.approx(0.55 * PEAK)
    third = 0.1 + 0.9 / 3
    assert learning_rate(config(schedule="cosine"), third) == pytest.approx(
        PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)
    )


def test_warm_up_stable_decay_is_flat_until_its_last_part():
    training = config(schedule="wsd", decay_fraction=0.25)
    assert {learning_rate(training, fraction) for fraction in (0.1, 0.3, 0.6, 0.75)} == {PEAK}
    assert learning_rate(training, 0.875) == pytest.approx(0.55 * PEAK)


def test_a_decay_longer_than_what_the_warm_up_leaves_begins_after_the_warm_up():
    training = config(schedule="wsd", warmup_fraction=0.5, decay_fraction=0.9)
    assert learning_rate(training, 0.5) == pytest.approx(PEAK)
    assert learning_rate(training, 0.75) == pytest.approx(0.55 * PEAK)


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(config(warmup_fraction=0.0), 0.0) == pytest.approx(PEAK)


def test_every_schedule_that_the_options_name_exists():
    assert set(SCHEDULES) == set(TrainingConfig.model_fields["schedule"].annotation.__args__)
