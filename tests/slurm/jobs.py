"""A small job on two nodes, the same job in peace on one machine, and jobs that are watched from a thread."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.backends.base import Backend
from launcher.jobs import Home, create_job, run_job, stop_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.finished import BATCH, LENGTH, small_job
from tests.launcher.faults import FaultPlan
from tests.slurm.cluster import until

STEPS = 40
EVERY = 5
"""Steps from one checkpoint to the next."""
JOB_SECONDS = 600.0
FAULTY = "tests.launcher.faulty_coordinator"

SLURM: dict[str, Any] = {"backend": "slurm", "slurm": {"nodes": 2, "cpus_per_node": 2, "partition": "main"}}


def job_spec(folder: Path, execution: dict[str, Any], data: int = 1) -> JobSpec:
    """One model, tensor-parallel inside a node and ``data``-parallel between nodes, without a grid."""
    document = small_job(folder / "text")
    (large,) = [one for one in document["candidates"] if one["name"] == "large"]
    document |= {
        "budget": {"tokens": STEPS * BATCH * LENGTH},
        "candidates": [large | {"layout": {"tensor": 2, "data": data}}],
        "compression": {},
        "export": {"variants": "none"},
        "execution": {"devices": 2 * data, "checkpoint_every": {"steps": EVERY}, **execution},
    }
    return JobSpec.model_validate(document)


class Watched:
    """A job that a thread of the test keeps going."""

    def __init__(self, home: Home, spec: JobSpec, backend: Backend, pace_seconds: float = 0.0) -> None:
        """``pace_seconds``: how long a step takes at least; the back-end's module has to be :data:`FAULTY`."""
        self.home = home
        self.journal = create_job(spec, home)
        if pace_seconds:
            FaultPlan(self.journal.directory, pace_seconds=pace_seconds).write()
        self.told: list[str] = []
        self._view = Journal(self.journal.directory)
        self._states: list[JobState] = []
        self._thread = threading.Thread(target=self._run, args=(backend,), daemon=True)
        self._thread.start()

    def _run(self, backend: Backend) -> None:
        self._states.append(run_job(self.home, self.journal.job_id, backend, tell=self.told.append))

    def until(self, condition: Callable[[], object], seconds: float = JOB_SECONDS) -> None:
        """Wait for something while the job is under way."""
        until(lambda: condition() or self._states, seconds)
        assert condition(), f"the job is {self.view.state}: {self.view.error}"

    def hurry(self) -> None:
        """From the next process group on, steps take as long as they take."""
        FaultPlan(self.journal.directory).write()

    @property
    def view(self) -> Any:
        """What the journal says now."""
        return self._view.view()

    @property
    def step(self) -> int:
        """The last step that was told."""
        return int(self.view.candidate("large").latest.get("step", 0))

    def until_step(self, step: int, epoch: int = 1) -> None:
        """Wait until an attempt has done a step, and at least one of its own."""

        def done() -> bool:
            gang = self.view.candidate("large").gang
            return gang is not None and gang.epoch >= epoch and gang.step >= max(step, gang.resumed_step + 1)

        self.until(done)

    def end(self, seconds: float = JOB_SECONDS) -> JobState:
        """How the job came to rest."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            stop_job(self.home, self.journal.job_id)
            raise TimeoutError(f"the job is {self.view.state}")
        (state,) = self._states
        return state


def random_steps(count: int, steps: int, seed: int) -> list[int]:
    """Steps at which something happens, in their order, never in the same two steps."""
    return sorted(random.Random(seed).sample(range(4, steps - 4, 3), count))
