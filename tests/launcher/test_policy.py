"""Decisions about restarts, stalls and room, called directly."""

import random

import pytest

from launcher.policy import (
    TEMPORARY_EXIT_CODE,
    UNSEEN_SECONDS,
    Cause,
    CoordinatorEnd,
    Ended,
    GiveUp,
    Restart,
    after_coordinator_end,
    after_gang_end,
    cause_of_exit,
    classify,
    fits,
    loss_of,
    root_cause,
    side_by_side,
    stalled,
    unseen_seconds,
)
from parallelism.budget import Budget, Burnt
from parallelism.result import STALLED_EXIT_CODE, DivergedError


def _names(error: BaseException) -> tuple[str, ...]:
    return tuple(kind.__name__ for kind in type(error).__mro__)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DivergedError(3, float("nan"), 1.0, None), Cause.DIVERGED),
        (ValueError("bad"), Cause.USER_ERROR),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), Cause.USER_ERROR),
        (TypeError("bug"), Cause.FAULT),
        (ModuleNotFoundError("bug"), Cause.FAULT),
        (MemoryError(), Cause.OUT_OF_MEMORY),
        (RuntimeError("connection closed by peer"), Cause.ERROR),
        (OSError("disk"), Cause.ERROR),
    ],
)
def test_errors_are_told_apart_by_their_class(error: BaseException, cause: Cause) -> None:
    assert classify(_names(error)) is cause


def test_a_process_that_is_gone() -> None:
    assert cause_of_exit(-9, node_alive=True) is Cause.RANK_DIED
    assert cause_of_exit(STALLED_EXIT_CODE, node_alive=True) is Cause.STALLED
    assert cause_of_exit(None, node_alive=False) is Cause.NODE_LOST


def test_the_root_cause_is_the_death_not_the_broken_collective() -> None:
    ends = [Ended(0, Cause.ERROR, "peer closed"), Ended(1, Cause.RANK_DIED, "gone"), Ended(2, None)]
    assert root_cause(ends).rank == 1
    assert root_cause([*ends, Ended(3, Cause.DIVERGED, "nan")]).rank == 3
    assert root_cause([Ended(2, Cause.ERROR), Ended(1, Cause.ERROR)]).rank == 1


def test_restarts_count_only_without_a_new_checkpoint() -> None:
    died = Ended(0, Cause.RANK_DIED, "gone")
    consecutive = 0
    for _ in range(3):
        decision = after_gang_end(died, consecutive, new_checkpoint=False, max_restarts=3)
        assert isinstance(decision, Restart)
        consecutive = decision.consecutive
    assert consecutive == 3
    given_up = after_gang_end(died, consecutive, new_checkpoint=False, max_restarts=3)
    assert isinstance(given_up, GiveUp)
    assert "after 3 restarts without a new checkpoint" in given_up.reason
    assert after_gang_end(died, consecutive, new_checkpoint=True, max_restarts=3) == Restart(0.0, 1)


def test_no_restart_is_allowed_with_max_restarts_zero() -> None:
    assert isinstance(after_gang_end(Ended(0, Cause.RANK_DIED), 0, False, 0), GiveUp)


@pytest.mark.parametrize("cause", [Cause.NODE_LOST, Cause.PREEMPTED, Cause.COORDINATOR_LOST])
def test_losses_of_the_cluster_never_use_up_restarts(cause: Cause) -> None:
    decision = after_gang_end(Ended(0, cause), 3, new_checkpoint=False, max_restarts=3)
    assert decision == Restart(after_seconds=2.0, consecutive=3)


@pytest.mark.parametrize("cause", [Cause.DIVERGED, Cause.USER_ERROR, Cause.FAULT])
def test_what_would_end_the_same_way_is_not_tried_again(cause: Cause) -> None:
    decision = after_gang_end(Ended(2, cause, "ValueError: field x"), 0, new_checkpoint=True, max_restarts=9)
    assert decision == GiveUp("ValueError: field x (rank 2; not tried again)")


def test_restarts_wait_longer_each_time() -> None:
    delays = [after_gang_end(Ended(0, Cause.RANK_DIED), count, False, 20).after_seconds for count in range(9)]
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]


def test_a_group_may_take_longer_before_its_first_step() -> None:
    assert not stalled(44.0, 10.0, first_step_done=False)
    assert stalled(46.0, 10.0, first_step_done=False)
    assert not stalled(14.0, 10.0, first_step_done=True)
    assert stalled(16.0, 10.0, first_step_done=True)


def test_coordinators_are_restarted_unless_they_ended_by_themselves_or_get_nowhere() -> None:
    assert after_coordinator_end(CoordinatorEnd(0, released=True, progressed=True), 0) is None
    assert after_coordinator_end(CoordinatorEnd(-9, False, True), 3) == Restart(0.0, 0)
    assert after_coordinator_end(CoordinatorEnd(-9, False, False), 0) == Restart(0.0, 1)
    assert after_coordinator_end(CoordinatorEnd(-9, False, False), 2) == Restart(2.0, 3)
    assert isinstance(after_coordinator_end(CoordinatorEnd(1, False, False), 3), GiveUp)
    for unknown in (-9, None):  # a signal, or nobody's child
        assert after_coordinator_end(CoordinatorEnd(unknown, False, False), 9) == Restart(30.0, 10)
        assert isinstance(after_coordinator_end(CoordinatorEnd(unknown, False, False), 10), GiveUp)
    ends = [after_coordinator_end(CoordinatorEnd(TEMPORARY_EXIT_CODE, False, False), count) for count in range(7)]
    assert [end.after_seconds for end in ends[:6]] == [5.0, 10.0, 20.0, 30.0, 30.0, 30.0]
    assert ends[6] == GiveUp("the coordinator died 7 times without getting anywhere (exit code 75)")


def test_lost_work() -> None:
    def lost(step: int, burnt: float, earlier: float, kept_step: int, kept: float) -> tuple[int, float, float]:
        loss = loss_of(step, Burnt(burnt, burnt / 2), Burnt(earlier, earlier / 2), kept_step, Burnt(kept, kept / 2))
        assert loss.burnt.wall_seconds == loss.burnt.device_seconds / 2
        return loss.steps, loss.device_seconds, loss.burnt.device_seconds

    assert lost(30, 100.0, 0.0, 20, 70.0) == (10, 30.0, 100.0)
    assert lost(30, 100.0, 50.0, 20, 70.0) == (10, 80.0, 100.0)  # the second group
    assert lost(29, 100.0, 0.0, 30, 98.0) == (0, 2.0, 100.0)  # the last steps and the checkpoint were not told
    assert lost(30, 12.0, 50.0, 30, 40.0) == (0, 12.0, 12.0)  # died while starting: the checkpoint is of another group
    assert lost(30, 10.0, 50.0, 20, 40.0) == (10, 10.0, 10.0)  # no new checkpoint: the rest was counted before
    assert lost(25, 40.0, 10.0, 90, 80.0) == (0, 0.0, 70.0)  # ran on for long after it was last heard of
    assert lost(0, 12.0, 0.0, 0, 0.0) == (0, 12.0, 12.0)  # there never was a checkpoint


def test_candidates_share_devices_but_under_a_clock_no_cores() -> None:
    assert side_by_side(Budget(tokens=5)) == "devices"
    assert side_by_side(Budget(wall_clock=5)) == "cores"
    assert fits(2, 2, 4, threads=1, cores=2, bound="devices")
    assert not fits(3, 2, 4, threads=1, cores=8, bound="devices")
    assert not fits(1, 2, 4, threads=1, cores=2, bound="cores")
    assert fits(1, 1, 4, threads=1, cores=2, bound="cores")
    assert not fits(1, 1, 4, threads=2, cores=2, bound="cores")
    assert fits(4, 0, 4, threads=1, cores=2, bound="cores")  # alone it shares with nobody


@pytest.mark.parametrize(
    ("last_sign", "now", "expected"),
    [
        (100.0, 103.0, 3.0),  # taken over at once: until then
        (102.0, 500.0, 12.0),  # left alone for long: until it must have been dead
        (0.0, 500.0, 10.0),  # no process had begun
        (60.0, 500.0, 10.0),  # its last sign was before its clock was told
        (102.0, 99.0, 0.0),  # clocks that do not agree
    ],
)
def test_what_nobody_saw_is_bounded(last_sign: float, now: float, expected: float) -> None:
    assert unseen_seconds(100.0, last_sign, now) == expected


def test_the_bound_is_never_less_than_what_was_burnt() -> None:
    """A group lives on for a while after its coordinator and shows it now and then; some time later somebody asks."""
    chooser = random.Random(3)
    for _ in range(1000):
        told = chooser.uniform(0.0, 10.0)
        death, sign = told, told
        while chooser.random() < 0.9:
            death += chooser.uniform(0.0, UNSEEN_SECONDS - 0.01)
            sign = death
        death += chooser.uniform(0.0, UNSEEN_SECONDS - 0.01)
        now = death + chooser.choice([0.0, 1.0, 1e5])
        bound = unseen_seconds(told, sign, now)
        assert death - told - 1e-9 <= bound <= death - told + UNSEEN_SECONDS + 1e-9
