"""What the stages of a running job share: the journal, the cluster's room, control, and the heartbeat. Torch-free."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from launcher.actors.pool import Pool, cluster_memory_bytes
from launcher.actors.session import Room
from launcher.actors.system import SystemMetrics
from launcher.actors.workers import TRAIN
from launcher.control import Control, Stopped
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from parallelism.stop import StopReason

POLL_SECONDS = 0.1
HEARTBEAT_SECONDS = 10.0

STOPPING: dict[StopReason, JobState] = {"pause": JobState.PAUSING, "cancel": JobState.CANCELLING}
STOPPED: dict[StopReason, JobState] = {
    "pause": JobState.PAUSED,
    "cancel": JobState.CANCELLED,
    "signal": JobState.INTERRUPTED,
}


@dataclass
class JobContext:
    """One attempt at a job."""

    journal: Journal
    spec: JobSpec
    room: Room
    control: Control
    measure: Callable[[], dict[str, SystemMetrics]]
    rank_function: str = TRAIN
    failures: dict[str, str] = field(default_factory=dict)
    """Candidate → error, of those that the later stages leave out."""
    pool: Pool = field(init=False)
    """Workers for everything but training, which needs their devices: :meth:`Pool.close` gives them back."""
    _next_beat: float = 0.0
    _stopping: StopReason | None = None

    def __post_init__(self) -> None:
        execution = self.spec.execution
        self.pool = Pool(self.journal, self.room, execution.max_restarts, self.check, cluster_memory_bytes())

    def stop_reason(self) -> StopReason | None:
        """Why to stop, or None; the first time there is a reason, the job's state says so."""
        reason = self.control.reason()
        if reason and reason != self._stopping:
            self._stopping = reason
            if reason in STOPPING:
                self.journal.set_state(STOPPING[reason])
        return reason

    def check(self) -> None:
        """One turn of a stage's loop: raises :class:`Stopped` when there is a reason to, and beats when it is time."""
        reason = self.stop_reason()
        if reason:
            raise Stopped(reason)
        self.beat([])

    def beat(self, clocks: list[dict[str, Any]]) -> None:
        """Write a heartbeat every 10 s: one per candidate in training (``clocks``), and the metrics of every node."""
        now = time.monotonic()
        if now < self._next_beat:
            return
        self._next_beat = now + HEARTBEAT_SECONDS
        for clock in clocks:
            self.journal.append("heartbeat", clock)
        for node, metrics in self.measure().items():
            self.journal.append("heartbeat", {"candidate": None, "node": node, "system": metrics})

    @contextmanager
    def stage(self, name: str) -> Iterator["StageClock"]:
        """Announce a stage; the clock inside tells its seconds."""
        self.journal.append("stage_started", {"stage": name})
        yield StageClock()


class StageClock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._started


Stage = Callable[[JobContext], None]
"""Does its part of a job, or finds it done. Raises ``ValueError`` for what the job's owner has to change."""
