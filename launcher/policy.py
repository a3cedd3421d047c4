"""Decisions about restarts, stalls and stops, as pure functions; the coordinator carries them out. Torch-free."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from parallelism.budget import Budget, Burnt
from parallelism.result import STALLED_EXIT_CODE


class Cause(StrEnum):
    """Why a process group, or a coordinator, came to an end that was not its own success."""

    RANK_DIED = "rank died"
    NODE_LOST = "node lost"
    PREEMPTED = "preempted"
    COORDINATOR_LOST = "coordinator lost"
    STALLED = "stalled"
    OUT_OF_MEMORY = "out of memory"
    ERROR = "error"
    DIVERGED = "diverged"
    USER_ERROR = "user error"
    FAULT = "fault in the code"


UNCOUNTED = frozenset({Cause.NODE_LOST, Cause.PREEMPTED, Cause.COORDINATOR_LOST})
"""Losses that say nothing about the job: they never use up ``max_restarts``."""

HOPELESS = frozenset({Cause.DIVERGED, Cause.USER_ERROR, Cause.FAULT})
"""Ends that the next try would meet again."""

EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_STALE = 0, 1, 3, 4
"""Of a coordinator: its job has succeeded, has failed, was asked to stop, or belongs to a newer attempt."""

TEMPORARY_EXIT_CODE = 75
"""``EX_TEMPFAIL``, of a coordinator: Ray did not start, or has lost the node; trying again may succeed."""

MOST_FRUITLESS, MOST_TEMPORARY, MOST_KILLED = 3, 6, 10
"""How often in a row a coordinator may end before it gets anywhere."""

FAULTS_OF_CODE = (
    "AssertionError",
    "AttributeError",
    "ImportError",
    "KeyError",
    "NotImplementedError",
    "TypeError",
    "VerificationError",
)


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its error, or none where it returned a result."""

    rank: int
    cause: Cause | None
    message: str = ""


@dataclass(frozen=True)
class Restart:
    """Start the process group again from its last checkpoint, after a pause."""

    after_seconds: float
    consecutive: int


@dataclass(frozen=True)
class GiveUp:
    """Report the candidate as failed."""

    reason: str


def classify(types: tuple[str, ...]) -> Cause:
    """The cause behind an exception, by the names of its class and bases, most derived first."""
    if "DivergedError" in types:
        return Cause.DIVERGED
    if "ValueError" in types:
        return Cause.USER_ERROR
    if any(name in types for name in FAULTS_OF_CODE):
        return Cause.FAULT
    if any(name in types for name in ("MemoryError", "OutOfMemoryError")):
        return Cause.OUT_OF_MEMORY
    return Cause.ERROR


def cause_of_exit(exit_code: int | None, node_alive: bool) -> Cause:
    """The cause behind a process that is simply gone."""
    if not node_alive:
        return Cause.NODE_LOST
    return Cause.STALLED if exit_code == STALLED_EXIT_CODE else Cause.RANK_DIED


def root_cause(ends: list[Ended]) -> Ended:
    """The end that brought the others about.

    When one rank dies, the collectives of its peers fail with errors of their own: a hopeless error explains a death,
    and a death explains an error, so the most telling cause wins, and among equals the lowest rank.
    """
    order = (
        Cause.DIVERGED,
        Cause.USER_ERROR,
        Cause.FAULT,
        Cause.PREEMPTED,
        Cause.NODE_LOST,
        Cause.OUT_OF_MEMORY,
        Cause.RANK_DIED,
        Cause.STALLED,
        Cause.COORDINATOR_LOST,
        Cause.ERROR,
    )
    failed = [end for end in ends if end.cause is not None]
    assert failed, "no rank failed"
    return min(failed, key=lambda end: (order.index(end.cause or Cause.ERROR), end.rank))


def after_gang_end(end: Ended, consecutive: int, new_checkpoint: bool, max_restarts: int) -> Restart | GiveUp:
    """What follows when a process group has ended with an error.

    ``consecutive`` counts the restarts since the last new checkpoint; a group that wrote one starts the count afresh.
    """
    assert end.cause is not None
    if end.cause in HOPELESS:
        return GiveUp(f"{end.message} (rank {end.rank}; not tried again)")
    count = 0 if new_checkpoint else consecutive
    if end.cause not in UNCOUNTED:
        count += 1
    if count > max_restarts:
        tries = "1 restart" if max_restarts == 1 else f"{max_restarts} restarts"
        return GiveUp(f"{end.cause} on rank {end.rank} after {tries} without a new checkpoint: {end.message}")
    return Restart(after_seconds=0.0 if count <= 1 else min(60.0, 2.0 ** (count - 2)), consecutive=count)


def stalled(seconds_without_progress: float, stall_seconds: float, first_step_done: bool) -> bool:
    """Whether a group counts as dead. Until the first step it may load and build for three times as long.

    The ranks' own watchdogs come first, because they know more (an evaluation is progress, too) and say where a rank
    hangs; this is for ranks that can no longer speak, so it waits for half as long again.
    """
    return seconds_without_progress > 1.5 * stall_seconds * (1 if first_step_done else 3)


@dataclass(frozen=True)
class CoordinatorEnd:
    """How a coordinator process ended, and whether its attempt got anywhere (a stage or a checkpoint)."""

    exit_code: int | None
    released: bool
    progressed: bool


def after_coordinator_end(end: CoordinatorEnd, fruitless: int) -> Restart | GiveUp | None:
    """What the dispatcher does when a coordinator has gone: nothing where it ended by itself.

    Losing a coordinator does not count against the job, but one that dies again and again before it achieves
    anything (``fruitless`` times in a row so far) will not succeed the next time either. One that says so itself, as
    Ray did not start, is given more time: the machine may be busy. So is one that a signal ended, or of which nobody
    knows how it ended: that says nothing about the job.
    """
    temporary = end.exit_code == TEMPORARY_EXIT_CODE
    if end.released:
        return None
    count = 0 if end.progressed else fruitless + 1
    killed = end.exit_code is None or end.exit_code < 0
    if count > (MOST_TEMPORARY if temporary else MOST_KILLED if killed else MOST_FRUITLESS):
        return GiveUp(f"the coordinator died {count} times without getting anywhere (exit code {end.exit_code})")
    if temporary:
        return Restart(after_seconds=min(30.0, 5.0 * 2.0 ** max(0, count - 1)), consecutive=count)
    return Restart(after_seconds=0.0 if count <= 1 else min(30.0, 2.0 ** (count - 2)), consecutive=count)


UNSEEN_SECONDS = 10.0
"""A process that lives gives a sign of it within this time, however busy its machine is."""


def unseen_seconds(told: float, last_sign: float, now: float) -> float:
    """How long a group may have gone on, at most, after its coordinator last told its clock and was then lost.

    ``told`` is when that was, ``last_sign`` when a rank last showed that it lived, and ``now`` when its successor has
    the devices; all in seconds since 1970. The time in which nobody took the job up again is not counted: whoever gave
    no sign for :data:`UNSEEN_SECONDS` was dead by then.
    """
    return max(0.0, min(now, max(told, last_sign) + UNSEEN_SECONDS) - told)


@dataclass(frozen=True)
class Loss:
    """What a dead process group burnt in all, and what of its work has to be done again."""

    burnt: Burnt
    steps: int
    device_seconds: float


def loss_of(step: int, burnt: Burnt, earlier: Burnt, kept_step: int, kept: Burnt) -> Loss:
    """The loss when a group that is known to have reached ``step`` is continued from the checkpoint of ``kept_step``.

    ``burnt`` is what the group is known to have burnt, ``earlier`` what all groups before it had, and ``kept`` what all
    had when the state of the checkpoint was taken (nothing without a checkpoint). A group may have run on after it was
    last heard of; what its checkpoint says counts then. What earlier groups lost is not counted again.
    """
    device = max(burnt.device_seconds, kept.device_seconds - earlier.device_seconds)
    wall = max(burnt.wall_seconds, kept.wall_seconds - earlier.wall_seconds)
    useful = max(0.0, kept.device_seconds - earlier.device_seconds)
    return Loss(Burnt(device, wall), max(0, step - kept_step), device - useful)


def side_by_side(budget: Budget) -> Literal["devices", "cores"]:
    """What bounds the candidates that train at once: under a clock budget they never share physical cores."""
    return "devices" if budget.counts_progress else "cores"


def fits(needed: int, in_use: int, total: int, threads: int, cores: int, bound: Literal["devices", "cores"]) -> bool:
    """Whether one more group of ``needed`` devices may start beside those that hold ``in_use`` of ``total``.

    A group that is alone may always start: a layout larger than the cluster was refused before the job was queued.
    """
    if in_use + needed > total:
        return False
    return bound == "devices" or in_use == 0 or (in_use + needed) * threads <= cores
