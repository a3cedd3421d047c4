"""Faults at chosen points of a job, for tests and for the campaign in ``benchmarks/faults``.

A plan is ``faults.json`` in the job's directory. :func:`run_task` stands in for the trainer's function of that name and
kills at the points that the plan names, each fault once; the product knows nothing of it. A point is reached by every
rank for itself:

- ``step``: the step is done, and nobody has been told yet
- ``data``: half of this rank's data of the step's checkpoint is written, by a process of its own beside the training
- ``manifest``: all ranks' data of the step's checkpoint is complete, its manifest is missing (rank 0)
- ``unreported``: the checkpoint is complete, and nobody has been told (rank 0)
- ``event``: the coordinator has written this event (``kind``)
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from launcher.journal import Journal
from parallelism.stop import StopRequest
from parallelism.training import TrainTask

PLAN = "faults.json"
COMMITS = "commits"
STRUCK = "struck"

Point = Literal["step", "data", "manifest", "unreported", "event"]
Victim = Literal["rank", "writer", "both", "coordinator"]


@dataclass(frozen=True)
class Fault:
    """Kill ``victim`` with SIGKILL when ``rank`` reaches ``point`` of ``step``, ``delay_seconds`` later.

    ``writer`` is the process that writes a checkpoint beside the training, ``both`` its rank and it.
    """

    name: str
    point: Point
    step: int = 0
    rank: int = 0
    victim: Victim = "rank"
    delay_seconds: float = 0.0
    kind: str = ""


@dataclass(frozen=True)
class FaultPlan:
    """The faults of a job; every step takes at least ``pace_seconds``, so that a small model leaves time for them."""

    directory: Path
    faults: tuple[Fault, ...] = ()
    pace_seconds: float = 0.0

    def write(self) -> None:
        """Put the plan into the job's directory."""
        document = {"faults": [asdict(fault) for fault in self.faults], "pace_seconds": self.pace_seconds}
        (self.directory / PLAN).write_text(json.dumps(document, indent=1))

    @classmethod
    def read(cls, directory: Path) -> "FaultPlan":
        """The plan in the job's directory."""
        document = json.loads((directory / PLAN).read_text())
        return cls(directory, tuple(Fault(**fault) for fault in document["faults"]), document["pace_seconds"])

    def due(self, point: Point, step: int, rank: int, kind: str = "") -> Fault | None:
        """The fault of this point, the first time; from then on it counts as struck."""
        for fault in self.faults:
            if (fault.point, fault.step, fault.rank, fault.kind) == (point, step, rank, kind) and self._strike(fault):
                return fault
        return None

    def hold(self, epoch: int) -> Path:
        """While this file exists, the ranks of the epoch rest after a step."""
        return self.directory / f"hold-{epoch}"

    def struck(self) -> list[str]:
        """Names of the faults that have happened."""
        folder = self.directory / STRUCK
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def commits(self) -> list[dict[str, Any]]:
        """Every checkpoint that any process group declared complete: ``time``, ``epoch``, ``step``, ``path``."""
        folder = self.directory / COMMITS
        found = [json.loads(path.read_text()) for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(found, key=lambda commit: float(commit["time"]))

    def _strike(self, fault: Fault) -> bool:
        mark = self.directory / STRUCK / fault.name
        mark.parent.mkdir(exist_ok=True)
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def run_task(task: TrainTask, report: Callable[[str, dict[str, Any]], None], stop: StopRequest) -> Any:
    """:func:`parallelism.run.run_task` under the faults of the job's plan."""
    from parallelism import run

    directory = Path(task.data_dir).parent
    with _Rank(FaultPlan.read(directory), task.epoch).in_place():
        return run.run_task(task, report, stop)


def coordinate_with(plan: FaultPlan, work: Callable[[], int]) -> int:
    """A coordinator's ``work`` under the faults of the plan that strike at its events."""
    append = Journal.append

    def appended(journal: Journal, kind: str, fields: Any) -> Any:
        event = append(journal, kind, fields)
        if plan.due("event", 0, 0, kind):
            os.kill(os.getpid(), signal.SIGKILL)
        return event

    with mock.patch.object(Journal, "append", appended):
        return work()


class _Rank:
    """Stands between the trainer and the points of one rank's process."""

    def __init__(self, plan: FaultPlan, epoch: int) -> None:
        import torch.distributed as dist

        self._plan = plan
        self._hold = plan.hold(epoch)
        self._rank = dist.get_rank()
        self._process = os.getpid()
        self._last_step = time.monotonic()
        self._writing = self._pieces = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        from parallelism import checkpoint_writing
        from parallelism.checkpoint_store import CheckpointStore
        from parallelism.watchdog import Watchdog

        places: Sequence[tuple[Any, str, Callable[[Any], Any]]] = (
            (Watchdog, "stepped", self._around_step),
            (checkpoint_writing.Pending, "__init__", self._around_snapshot),
            (checkpoint_writing.Snapshot, "resolve_data", self._around_data),
            (CheckpointStore, "commit", self._around_commit),
        )
        with ExitStack() as stack:
            for owner, name, around in places:
                stack.enter_context(mock.patch.object(owner, name, around(getattr(owner, name))))
            yield

    def _around_step(self, stepped: Callable[..., None]) -> Callable[..., None]:
        def around(watchdog: Any, step: int) -> None:
            stepped(watchdog, step)
            self._reach("step", step)
            time.sleep(max(0.0, self._last_step + self._plan.pace_seconds - time.monotonic()))
            while self._hold.exists():
                time.sleep(0.05)
            self._last_step = time.monotonic()

        return around

    def _around_snapshot(self, snapshot: Callable[..., None]) -> Callable[..., None]:
        def around(pending: Any, engine: Any, progress: Any, directory: Path) -> None:
            self._writing, self._pieces = progress.step, 0
            snapshot(pending, engine, progress, directory)

        return around

    def _around_data(self, resolve: Callable[..., Any]) -> Callable[..., Any]:
        """A piece is asked for when the one before is in the file; half of the pieces are written."""

        def around(snapshot: Any, item: Any) -> Any:
            self._pieces += 1
            if self._pieces == len(snapshot._tensors) // 2:
                self._reach("data", self._writing)
            return resolve(snapshot, item)

        return around

    def _around_commit(self, commit: Callable[..., Any]) -> Callable[..., Any]:
        def around(store: Any, directory: Path, task: TrainTask, progress: Any, metrics: Any) -> Any:
            self._reach("manifest", progress.step)
            info = commit(store, directory, task, progress, metrics)
            self._note(directory, task, progress.step)
            self._reach("unreported", progress.step)
            return info

        return around

    def _note(self, directory: Path, task: TrainTask, step: int) -> None:
        folder = self._plan.directory / COMMITS
        folder.mkdir(exist_ok=True)
        note = {"time": time.time(), "epoch": task.epoch, "step": step, "path": str(directory)}
        (folder / f"{directory.parent.name}-{directory.name}").write_text(json.dumps(note))

    def _reach(self, point: Point, step: int) -> None:
        fault = self._plan.due(point, step, self._rank)
        if fault is None:
            return
        if fault.delay_seconds:
            threading.Timer(fault.delay_seconds, self._kill, [fault.victim]).start()
        else:
            self._kill(fault.victim)

    def _kill(self, victim: Victim) -> None:
        if victim == "coordinator":
            os.kill(Journal(self._plan.directory).view().attempt["pid"], signal.SIGKILL)
        if victim in ("rank", "both"):
            os.kill(self._process, signal.SIGKILL)
        if victim in ("writer", "both"):
            os.kill(os.getpid(), signal.SIGKILL)
