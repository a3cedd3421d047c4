"""One candidate's training: its process groups, one after another, until the budget is spent. Polled, never blocking.

The decisions come from :mod:`launcher.policy`; this file carries them out and writes down what happens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any

from launcher.actors.workers import (
    LOST_NODE_SECONDS,
    NO_PROCESS,
    PROCESS_SECONDS,
    TRAIN,
    GroupShape,
    RankEnded,
    Report,
    WorkerGroup,
)
from launcher.adopt import adopt_newest, remove_older_roots
from launcher.journal import Journal
from launcher.life import last_sign
from launcher.policy import (
    HOPELESS,
    Cause,
    Ended,
    GiveUp,
    after_gang_end,
    loss_of,
    root_cause,
    stalled,
    unseen_seconds,
)
from launcher.told import forget_told, told_steps
from launcher.view import CandidateView, GangView
from parallelism.budget import Burnt
from parallelism.checkpoint_store import CheckpointInfo, CheckpointStore
from parallelism.result import TrainResult
from parallelism.stop import StopReason
from parallelism.training import TrainTask

STEP_BATCH_SECONDS = 2.0
ROOT_CAUSE_SECONDS = 2.0
"""How long the others may take to end after the first rank has, so that the cause can be told from its consequences."""

MakeTask = Callable[[Path, CheckpointInfo | None, Burnt], TrainTask]
"""(root for checkpoints, checkpoint to continue from, burnt by earlier groups) → what the next process group does."""


class Phase(Enum):
    """Where a candidate stands."""

    IDLE = auto()
    RESERVING = auto()
    STARTING = auto()
    RUNNING = auto()
    DONE = auto()
    FAILED = auto()
    STOPPED = auto()


ACTIVE = frozenset({Phase.RESERVING, Phase.STARTING, Phase.RUNNING})
OVER = frozenset({Phase.DONE, Phase.FAILED, Phase.STOPPED})


class CandidateRun:
    """Trains one candidate: reserves, starts, watches, restarts."""

    def __init__(
        self,
        journal: Journal,
        name: str,
        shape: GroupShape,
        make_task: MakeTask,
        *,
        max_restarts: int,
        stall_seconds: float,
        function: str = TRAIN,
        connected: bool = True,
    ) -> None:
        self.name = name
        self.shape = shape
        self.phase = Phase.IDLE
        self.failure: str | None = None
        self.result: TrainResult | None = None
        self._journal = journal
        self._make_task = make_task
        self._max_restarts = max_restarts
        self._stall_seconds = stall_seconds
        self._function = function
        self._connected = connected
        self._gangs = 0
        self._consecutive = 0
        self._start_after = 0.0
        self._group: WorkerGroup | None = None
        self._root: Path | None = None
        self._resume_from: CheckpointInfo | None = None
        self._resumed_step = 0
        self._reserved_at = 0.0
        self._progress_at = 0.0
        self._first_end_at: float | None = None
        self._stop_deadline: float | None = None
        self._step = 0
        self._stepped = False
        self._introduced = False
        self._stalled: dict[str, Any] | None = None
        self._steps: list[dict[str, Any]] = []
        self._flushed_at = 0.0

    # What the stage asks and tells

    @property
    def ready(self) -> bool:
        """Whether it waits for devices and may have them now."""
        return self.phase is Phase.IDLE and time.monotonic() >= self._start_after

    def reserve(self) -> None:
        """Ask for the devices of the next process group."""
        assert self.phase is Phase.IDLE
        self._gangs += 1
        self._group, self._introduced = self._new_group(), False
        self._group.reserve()
        self.phase = Phase.RESERVING

    def poll(self) -> None:
        """Advance by whatever has happened."""
        if self.phase is Phase.RESERVING:
            self._poll_reservation()
        if self.phase is Phase.STARTING:
            self._poll_start()
        if self.phase is Phase.RUNNING:
            self._poll_ranks()

    def stop(self, reason: StopReason, grace_seconds: float) -> None:
        """Checkpoint and end within ``grace_seconds``; a group that is not running yet just ends."""
        if self.phase is Phase.RUNNING:
            self._active_group.request_stop(reason)
            self._stop_deadline = time.monotonic() + grace_seconds
        elif self.phase not in OVER:
            self._end_group(reason)
            self.phase = Phase.STOPPED

    def abandon(self) -> None:
        """End the processes without writing anything: the job belongs to a newer attempt."""
        if self._group is not None:
            self._group.kill()

    def clock(self) -> dict[str, Any]:
        """What this process group has burnt so far, and the candidate in all; fields of a heartbeat."""
        wall = time.monotonic() - self._reserved_at if self.phase in (Phase.STARTING, Phase.RUNNING) else 0.0
        clock, earlier = self._gang_clock(wall), self._earlier_burnt()
        return {
            "step": self._step,
            **clock,
            "wall_seconds": earlier.wall_seconds + wall,
            "device_seconds": earlier.device_seconds + clock["gang_device_seconds"],
        }

    def _gang_clock(self, wall: float) -> dict[str, float]:
        return {"gang_wall_seconds": wall, "gang_device_seconds": wall * self.shape.world_size}

    # Reserving and starting

    def _log(self, epoch: int, gang: int, rank: int) -> Path:
        """Where a rank's output goes."""
        return self._journal.log_path(f"{self.name}.e{epoch:04d}-g{gang:02d}.rank{rank}")

    def _new_group(self) -> WorkerGroup:
        return WorkerGroup(
            self.shape,
            partial(self._log, self._journal.epoch, self._gangs),
            self._journal.location,
            function=self._function,
            connected=self._connected,
            timeout_seconds=self._stall_seconds,
        )

    @property
    def _active_group(self) -> WorkerGroup:
        assert self._group is not None
        return self._group

    def _candidate(self) -> CandidateView:
        return self._journal.view().candidate(self.name)

    def _earlier_burnt(self) -> Burnt:
        """Burnt by all process groups before this one."""
        mine = (self._journal.epoch, self._gangs)
        return _burnt_by([gang for gang in self._candidate().gangs if (gang.epoch, gang.number) != mine])

    def _poll_reservation(self) -> None:
        reservation = self._active_group.reservation
        if not reservation.held():
            lacking = reservation.complaint()
            if lacking:
                self._append("waiting", reason=f"{self.name} needs {lacking}")
            return
        self._reserved_at = self._progress_at = time.monotonic()
        previous = self._candidate().gang
        self._root = self._journal.gang_root(self.name, self._gangs)
        resumed = adopt_newest(Path(previous.root) if previous else None, self._root)
        self._resumed_step = self._step = resumed.step if resumed else 0
        if previous:
            self._write_untold(previous)
            previous = self._candidate().gang
        self._write_start(previous, resumed)
        remove_older_roots(self._root.parent, self._root)
        self._resume_from = resumed
        self._active_group.start()
        self.phase = Phase.STARTING

    def _write_untold(self, previous: GangView) -> None:
        """Steps that the checkpoint holds and that the coordinator was lost with before it wrote them down."""
        log = self._log(previous.epoch, previous.number, 0)
        untold = told_steps(log, self._candidate().latest.get("step", 0), self._resumed_step)
        if untold:
            self._append("train.step", steps=untold)  # without a clock: when it was last told counts for what was burnt
        forget_told(log)

    def _write_start(self, previous: GangView | None, resumed: CheckpointInfo | None) -> None:
        """From the event on, checkpoints of earlier process groups count for nothing."""
        if previous and not previous.replaced and not _ended_well(previous):
            self._write_restart(previous, resumed)
        self._append(
            "gang_started",
            gang=self._gangs,
            root=str(self._root),
            world_size=self.shape.world_size,
            resumed_from=str(resumed.path) if resumed else None,
            resumed_step=self._resumed_step,
            **self._gang_clock(time.monotonic() - self._reserved_at),
        )

    def _write_restart(self, previous: GangView, resumed: CheckpointInfo | None) -> None:
        """The clock of the dead group is set, too: after it was last told, the group may have gone on.

        Where its coordinator was lost, nobody saw it end, and it is charged for as long as it may have lived: a budget
        on a clock is not exceeded by what nobody saw.
        """
        unseen = self._unseen_seconds(previous) if previous.ended is None else 0.0
        loss = loss_of(
            previous.step,
            Burnt(previous.device_seconds + unseen * previous.world_size, previous.wall_seconds + unseen),
            _burnt_by(self._candidate().gangs[:-1]),
            self._resumed_step,
            resumed.metrics.burnt if resumed else Burnt(),
        )
        self._append(
            "restart",
            reason=previous.ended or Cause.COORDINATOR_LOST.value,
            from_step=self._resumed_step,
            lost_steps=loss.steps,
            lost_device_seconds=loss.device_seconds,
            gang_device_seconds=loss.burnt.device_seconds,
            gang_wall_seconds=loss.burnt.wall_seconds,
            unseen_device_seconds=unseen * previous.world_size,
            message=f"nobody saw its ranks end; charged for {unseen:.1f} s more, as long as they may have lived"
            if unseen
            else "",
        )

    def _unseen_seconds(self, previous: GangView) -> float:
        """How long the ranks may have lived after their clock was last told, by their logs."""
        logs = [self._log(previous.epoch, previous.number, rank) for rank in range(previous.world_size)]
        return unseen_seconds(previous.told, last_sign(logs), time.time())

    def _poll_start(self) -> None:
        group = self._active_group
        try:
            if not self._introduced and group.alive():
                self._introduced = True
                self._write_processes()
            if group.up():
                group.launch(self._next_task())
                self._progress_at = time.monotonic()
                self.phase = Phase.RUNNING
            elif not self._introduced and time.monotonic() > self._reserved_at + PROCESS_SECONDS:
                self._fail(Ended(0, Cause.STALLED, NO_PROCESS))
            elif self._is_stalled():
                self._fail(self._stall())
        except RankEnded as error:
            self._fail(error.end)

    def _next_task(self) -> TrainTask:
        """The clock of the budget runs from the moment the devices are held, so the start-up of the ranks is in it."""
        assert self._root is not None
        clock = self.clock()
        return self._make_task(self._root, self._resume_from, Burnt(clock["device_seconds"], clock["wall_seconds"]))

    def _write_processes(self) -> None:
        for facts in self._active_group.facts():
            self._append("process_started", role="rank", gang=self._gangs, **asdict(facts))

    # Running

    def _poll_ranks(self) -> None:
        group = self._active_group
        for report in group.poll():
            self._take(report)
        self._flush_steps(force=False)
        ends = group.ends()
        if group.finished() and all(end.cause is None for end in ends):
            self._finish()
        elif any(end.cause is not None for end in ends):
            self._first_end_at = self._first_end_at or time.monotonic()
            seconds = LOST_NODE_SECONDS if group.unsure() else ROOT_CAUSE_SECONDS
            if group.finished() or time.monotonic() > self._first_end_at + seconds:
                self._fail(root_cause(ends))
        elif self._stop_deadline and time.monotonic() > self._stop_deadline:
            self._fail(Ended(0, Cause.STALLED, "no checkpoint within the grace period"))
        elif self._is_stalled():
            self._fail(self._stall())

    def _take(self, report: Report) -> None:
        self._progress_at = time.monotonic()
        if report.kind == "step":
            self._step, self._stepped = report.fields["step"], True
            self._steps.append({**report.fields, "time": report.time})
            return
        if report.kind == "stalled":
            self._stalled = report.fields
        self._flush_steps(force=True)
        clock = self.clock()
        gang_clock = {name: clock[name] for name in ("gang_device_seconds", "gang_wall_seconds")}
        self._append(f"train.{report.kind}", rank=report.rank, **(gang_clock | report.fields))

    def _flush_steps(self, force: bool) -> None:
        now = time.monotonic()
        if not self._steps or not (force or now > self._flushed_at + STEP_BATCH_SECONDS):
            return
        clock = self.clock()
        self._append(
            "train.step",
            steps=self._steps,
            gang_device_seconds=clock["gang_device_seconds"],
            gang_wall_seconds=clock["gang_wall_seconds"],
        )
        self._steps, self._flushed_at = [], now

    def _is_stalled(self) -> bool:
        return stalled(time.monotonic() - self._progress_at, self._stall_seconds, self._stepped)

    def _stall(self) -> Ended:
        seconds = time.monotonic() - self._progress_at
        return Ended(0, Cause.STALLED, f"no progress for {seconds:.0f} s after step {self._step}")

    # Ending

    def _finish(self) -> None:
        self._drain()
        result: TrainResult = self._active_group.results()[0]
        self._end_group(result.reason)
        if result.reason == "budget":
            forget_told(self._log(self._journal.epoch, self._gangs, 0))
            self.result = result
            self._append("candidate_done", result=result.model_dump(mode="json"))
        self.phase = Phase.DONE if result.reason == "budget" else Phase.STOPPED

    def _fail(self, end: Ended) -> None:
        assert end.cause is not None
        assert self._root is not None
        self._drain()
        end = self._explained(end)
        assert end.cause is not None
        self._end_group(end.cause.value, rank=end.rank, message=end.message)
        newest = CheckpointStore(self._root).newest()
        new_checkpoint = newest is not None and newest.step > self._resumed_step
        decision = after_gang_end(end, self._consecutive, new_checkpoint, self._max_restarts)
        if self._stop_deadline and end.cause not in HOPELESS:
            self.phase = Phase.STOPPED
        elif isinstance(decision, GiveUp):
            self.failure = decision.reason
            self._append("candidate_failed", error=self.failure, cause=end.cause.value, rank=end.rank)
            self.phase = Phase.FAILED
        else:
            self._consecutive = decision.consecutive
            self._start_after = time.monotonic() + decision.after_seconds
            self.phase = Phase.IDLE

    def _explained(self, end: Ended) -> Ended:
        """A rank whose watchdog ended it said so before."""
        said = self._stalled
        if said is None or end.cause not in (Cause.RANK_DIED, Cause.ERROR):
            return end
        message = f"no progress for {said['seconds']:.0f} s after step {said['step']} while {said['doing']}"
        return Ended(said["rank"], Cause.STALLED, message)

    def _drain(self) -> None:
        for report in self._active_group.drain(wait_seconds=2.0):
            self._take(report)
        self._flush_steps(force=True)

    def _end_group(self, outcome: str, **fields: Any) -> None:
        group = self._group
        if group is None:
            return
        facts = group.facts()
        group.kill()
        if self.phase is not Phase.RESERVING:
            clock = self.clock()
            clocks = {name: clock[name] for name in ("step", "gang_device_seconds", "gang_wall_seconds")}
            self._append("gang_ended", gang=self._gangs, outcome=outcome, **clocks, **fields)
            for rank in facts:
                self._append("process_ended", role="rank", rank=rank.rank, pid=rank.pid, node=rank.node)
        self._group, self._first_end_at, self._stepped, self._stalled = None, None, False, None

    def _append(self, kind: str, **fields: Any) -> None:
        self._journal.append(kind, {"candidate": self.name, **fields})


def _burnt_by(gangs: Sequence[GangView]) -> Burnt:
    return Burnt(sum(gang.device_seconds for gang in gangs), sum(gang.wall_seconds for gang in gangs))


def _ended_well(gang: GangView) -> bool:
    """Whether the group ended with a checkpoint of its last step."""
    return gang.ended in ("budget", "pause", "cancel", "signal")
