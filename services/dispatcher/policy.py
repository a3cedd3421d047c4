"""Decisions of the dispatcher, as pure functions: whose turn it is, and what one job needs next. Torch-free."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher.backends.base import Phase
from launcher.policy import CoordinatorEnd, GiveUp, Restart, after_coordinator_end
from launcher.states import FINAL, RESTING, JobState

SILENT_SECONDS = 900.0
"""A coordinator writes every ten seconds; one that is alive and says nothing for this long hangs or was stopped."""

CUT_OFF = "stopped before the last checkpoint"


@dataclass(frozen=True)
class Intent:
    """What the store says is wanted of a job, and what the dispatcher knows of its submission."""

    desired: str
    desired_at: float
    resumed_epoch: int
    submitted: bool
    """There is a submission at the back-end, or was when the dispatcher last looked."""
    epoch_before: int = 0
    milestones_before: int = 0
    fruitless: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Seen:
    """What the journal and the back-end say."""

    state: JobState
    epoch: int = 0
    released: bool = True
    milestones: int = 0
    last_time: float = 0.0
    """When it last gave a sign: the journal's last event, or the start of a submission that had to wait."""
    phase: Phase | None = None
    exit_code: int | None = None
    reason: str = ""
    final: bool = False
    """The submission ended in a way after which it is not tried again."""


@dataclass(frozen=True)
class Nothing:
    """All is as it should be."""


@dataclass(frozen=True)
class Queue:
    """The job wants to run when it is its turn."""


@dataclass(frozen=True)
class Submit:
    """A job that had its turn goes on with another coordinator, from ``not_before`` on."""

    not_before: float
    fruitless: int


@dataclass(frozen=True)
class HardStop:
    """The coordinator is ended by force."""

    why: str


@dataclass(frozen=True)
class Released:
    """The coordinator has ended by itself: the job gives its devices back."""


@dataclass(frozen=True)
class Settle:
    """Nobody works on the job: write down how it rests."""

    state: JobState
    error: str | None


Action = Nothing | Queue | Submit | HardStop | Released | Settle


def next_action(intent: Intent, seen: Seen, now: float, grace_seconds: float) -> Action:
    """What one job needs. ``now`` and the times of ``intent`` and ``seen`` are seconds since 1970."""
    if intent.submitted:
        return _of_submitted(intent, seen, now, grace_seconds)
    if seen.state in FINAL:
        return Nothing()
    if intent.desired == "cancel":
        return Settle(JobState.CANCELLED, None)
    if intent.desired == "pause":
        rests = seen.state in RESTING or seen.state is JobState.SUBMITTED
        return Nothing() if rests else Settle(JobState.INTERRUPTED, CUT_OFF)
    return Queue() if _may_start(intent, seen) else Nothing()


def _of_submitted(intent: Intent, seen: Seen, now: float, grace_seconds: float) -> Action:
    if seen.phase is Phase.WAITING:
        # Nothing of it runs, so there is nothing to wait for.
        return Nothing() if intent.desired == "run" else HardStop(f"it waits, and is asked to {intent.desired}")
    if seen.phase is Phase.RUNNING:
        if intent.desired != "run" and now > intent.desired_at + grace_seconds:
            return HardStop(f"it did not {intent.desired} within {grace_seconds:g} s")
        if seen.epoch > intent.epoch_before and now > seen.last_time + SILENT_SECONDS:
            return HardStop(f"it has said nothing for {SILENT_SECONDS:g} s")
        return Nothing()
    if seen.phase is None:  # decided, but not carried out
        return Submit(intent.not_before, intent.fruitless) if intent.desired == "run" else Released()
    if seen.final and intent.desired == "run" and seen.state not in FINAL:
        return Settle(JobState.FAILED, f"{seen.reason}: continue it when that is put right")
    if seen.epoch > intent.epoch_before and seen.released:
        return Released()
    if intent.desired == "cancel":
        return Settle(JobState.CANCELLED, None)
    if intent.desired == "pause":
        return Settle(JobState.INTERRUPTED, f"{CUT_OFF}: {seen.reason}")
    return _after_death(intent, seen, now)


def _after_death(intent: Intent, seen: Seen, now: float) -> Action:
    progressed = seen.milestones > intent.milestones_before
    decision = after_coordinator_end(CoordinatorEnd(seen.exit_code, False, progressed), intent.fruitless)
    if isinstance(decision, GiveUp):
        return Settle(JobState.FAILED, decision.reason)
    assert isinstance(decision, Restart)
    return Submit(now + decision.after_seconds, decision.consecutive)


def _may_start(intent: Intent, seen: Seen) -> bool:
    """A job that rests by itself goes on only when it is asked to; one that was cut off goes on."""
    if seen.state is JobState.SUBMITTED or seen.state is JobState.INTERRUPTED or seen.state not in RESTING:
        return True
    return intent.resumed_epoch >= seen.epoch


@dataclass(frozen=True)
class Waiting:
    """A job in the queue. ``running_jobs``: its account's quota; None: none."""

    id: str
    account: str
    owner: str
    priority: int
    sequence: int
    devices: int
    running_jobs: int | None = None
    hours_left: float | None = None


@dataclass(frozen=True)
class Holding:
    """A job that has its turn, and the devices it holds."""

    account: str
    owner: str
    devices: int


@dataclass(frozen=True)
class Turns:
    """Who starts now, in this order, and why the others wait."""

    start: Sequence[str]
    reasons: Mapping[str, str]


def take_turns(waiting: Iterable[Waiting], holding: Sequence[Holding], devices: int) -> Turns:
    """Higher priorities first; among equals the owner who holds the fewest devices; then the oldest.

    Nobody passes a job that only lacks devices: otherwise small ones could keep a large one waiting for ever.
    """
    left, held = list(waiting), list(holding)
    start: list[str] = []
    reasons: dict[str, str] = {}
    blocked: Waiting | None = None
    while left:
        first = min(left, key=lambda job: (-job.priority, _held_by(job.owner, held), job.sequence))
        left.remove(first)
        free = devices - sum(one.devices for one in held)
        limit = _quota(first, held)
        if limit:
            reasons[first.id] = limit
        elif blocked:
            reasons[first.id] = f"waits behind job {blocked.id}"
        elif first.devices > free:
            reasons[first.id] = f"needs {first.devices} of {devices} devices, and {free} are free"
            blocked = first
        else:
            start.append(first.id)
            held.append(Holding(first.account, first.owner, first.devices))
    return Turns(start, reasons)


def _held_by(owner: str, held: Iterable[Holding]) -> int:
    return sum(one.devices for one in held if one.owner == owner)


def _quota(job: Waiting, held: Iterable[Holding]) -> str | None:
    if job.hours_left is not None and job.hours_left <= 0:
        return "the device-hours of this month are used up"
    running = sum(one.account == job.account for one in held)
    if job.running_jobs is not None and running >= job.running_jobs:
        return f"{running} jobs of this account run already, and the quota is {job.running_jobs}"
    return None
