"""When checkpoints are written, and what happens when writing one fails.

A periodic checkpoint that cannot be written is reported and tried again later; it never ends the training. Only the
last one, without which the work would be lost, is insisted on.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from parallelism import agreement, places
from parallelism.budget import Progress
from parallelism.checkpoint import AsyncSaver, save
from parallelism.checkpoint_files import CheckpointError
from parallelism.checkpoint_store import CheckpointStore, Metrics
from parallelism.engines.base import Engine
from parallelism.result import LastCheckpointError, Report
from parallelism.training import TrainTask

WRITE_ERRORS = (CheckpointError, OSError)

RETRY_SECONDS = 5.0
"""Wait before a failed periodic write is tried again; doubled with every failure in a row."""
LONGEST_RETRY_SECONDS = 300.0
LAST_TRIES = 4
"""How often the last checkpoint is tried."""
LAST_TRY_SECONDS = 1.0
"""Wait before its second try; doubled with every further one."""

_log = logging.getLogger(__name__)


class Saver(Protocol):
    """Writes the engine's state into an empty directory; all but :meth:`close` collective. See :class:`FileSaver`."""

    def save(self, engine: Engine, progress: Progress, directory: Path) -> object:
        """Write, and return when all ranks' data is there."""

    def start(self, engine: Engine, progress: Progress, directory: Path) -> object:
        """Take a snapshot and write it in the background."""

    def poll(self) -> object | None:
        """Something when the write in the background has ended well on all ranks; raises when it failed."""

    def wait(self) -> object:
        """Wait for the write in the background; raises when it failed."""

    def close(self) -> None:
        """Give up the write in the background."""


class FileSaver(AsyncSaver):
    """The :class:`Saver` of :mod:`parallelism.checkpoint`."""

    def save(self, engine: Engine, progress: Progress, directory: Path) -> object:
        """Write, and return when all ranks' data is there."""
        return save(engine, progress, directory)


@dataclass(frozen=True)
class Start:
    """Where a run begins: at nothing, or at the complete checkpoint that holds ``progress``."""

    progress: Progress
    metrics: Metrics
    checkpoint: str | None


@dataclass
class _Write:
    """A checkpoint on its way."""

    directory: Path
    progress: Progress
    metrics: Metrics
    asynchronous: bool
    started: float
    stall_seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run. Every method but :meth:`due` is collective."""

    def __init__(
        self, task: TrainTask, engine: Engine, store: CheckpointStore, saver: Saver, report: Report, start: Start
    ) -> None:
        self._task = task
        self._engine = engine
        self._store = store
        self._saver = saver
        self._report = report
        self._pending: _Write | None = None
        self._failures = 0
        self._retry_at: float | None = None
        self._last_step = start.progress.step
        self._last_started = time.monotonic()
        self.newest = start.checkpoint
        """The newest complete checkpoint of this run and those that it continues."""
        self._newest_step = start.progress.step if start.checkpoint else None

    def due(self, step: int) -> bool:
        """Whether to :meth:`write` after this step. Asked on rank 0, which tells the others."""
        policy, now = self._task.checkpoint, time.monotonic()
        if step <= self._last_step:
            return False
        if policy.steps and step % policy.steps == 0:
            return True
        if self._retry_at is not None:
            return now >= self._retry_at
        return bool(policy.seconds and not self._pending and now >= self._last_started + policy.seconds)

    def write(self, progress: Progress, metrics: Metrics) -> None:
        """Write a periodic checkpoint, in the background where the policy says so. Waits for the one before.

        One that has failed is tried again in the foreground, where less can go wrong.
        """
        self.settle()
        self._begin(progress, metrics, asynchronous=self._task.checkpoint.asynchronous and not self._failures)

    def poll(self) -> None:
        """Complete the write in the background if it has ended; called once per step."""
        if self._pending is None:
            return
        try:
            if self._saver.poll() is not None:
                self._end(None)
        except CheckpointError as error:
            self._end(str(error))

    def settle(self) -> None:
        """Wait for the write in the background, if there is one, and complete it."""
        if self._pending is None:
            return
        try:
            self._saver.wait()
            self._end(None)
        except CheckpointError as error:
            self._end(str(error))

    def forget_newest(self) -> None:
        """The engine's state is no longer that of the newest checkpoint, though no step was made."""
        self.settle()
        self._newest_step = None

    def finish(self, progress: Progress, metrics: Metrics) -> str:
        """The complete checkpoint of ``progress``, written now unless it is there.

        Raises :class:`LastCheckpointError` when several tries have failed.
        """
        self.settle()
        for attempt in range(LAST_TRIES):
            if self._newest_step == progress.step:
                break
            time.sleep(LAST_TRY_SECONDS * 2.0 ** (attempt - 1) if attempt else 0.0)
            self._begin(progress, metrics, asynchronous=False)
        if self.newest and self._newest_step == progress.step:
            return self.newest
        kept = f"the last complete one is {self.newest}" if self.newest else "there is no earlier one"
        raise LastCheckpointError(
            f"the checkpoint of step {progress.step} could not be written to {self._store.root} in {LAST_TRIES} tries; "
            f"{kept}. Make room or repair the file system, then resume"
        )

    def _begin(self, progress: Progress, metrics: Metrics, *, asynchronous: bool) -> None:
        directory = self._store.directory(self._task.epoch, progress.step)
        write = self._pending = _Write(directory, progress, metrics, asynchronous, time.monotonic())
        self._last_step, self._last_started, self._retry_at = progress.step, write.started, None
        error = _on_rank_zero(lambda: self._store.prepare(directory))
        error = error or agreement.first_error(lambda: self._hand_over(write), WRITE_ERRORS)
        write.stall_seconds = time.monotonic() - write.started
        if error or not asynchronous:
            self._end(error)

    def _hand_over(self, write: _Write) -> None:
        hand_over = self._saver.start if write.asynchronous else self._saver.save
        hand_over(self._engine, write.progress, write.directory)

    def _end(self, error: str | None) -> None:
        """The data is complete on all ranks, or writing it failed: declare the checkpoint, or have it tried again."""
        write, self._pending = self._pending, None
        assert write is not None
        error = error or _on_rank_zero(lambda: self._commit(write))
        if error:
            self._failed(write, error)
            return
        self._failures = 0
        self.newest, self._newest_step = str(write.directory), write.progress.step
        self._tell(
            "checkpoint",
            step=write.progress.step,
            path=str(write.directory),
            stall_seconds=write.stall_seconds,
            write_seconds=time.monotonic() - write.started,
            asynchronous=write.asynchronous,
            device_seconds=write.metrics.burnt.device_seconds,
        )

    def _commit(self, write: _Write) -> None:
        self._tell("committing", step=write.progress.step)
        self._store.commit(write.directory, self._task, write.progress, write.metrics)
        try:
            self._store.keep_newest(self._task.checkpoint.keep)
        except OSError as error:
            # The new checkpoint is good; the old ones are tried again after the next.
            _log.warning("old checkpoints under %s could not be deleted: %s", self._store.root, error)

    def _failed(self, write: _Write, error: str) -> None:
        self._saver.close()
        places.forget(write.directory)  # of this machine's copy; the disk may be full
        if dist.get_rank() == 0:
            self._store.discard(write.directory)
        self._failures += 1
        delay = min(LONGEST_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** (self._failures - 1))
        self._retry_at = time.monotonic() + delay
        self._tell("checkpoint_failed", step=write.progress.step, error=error, attempt=self._failures)

    def _tell(self, kind: str, **fields: Any) -> None:
        if dist.get_rank() == 0:
            self._report(kind, fields)


def _on_rank_zero(action: Callable[[], object]) -> str | None:
    """Run it there; the error, on every rank."""
    return agreement.first_error(action if dist.get_rank() == 0 else lambda: None, WRITE_ERRORS)
