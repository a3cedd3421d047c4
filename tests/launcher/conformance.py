"""What every back-end does, as tests over a fixture ``place``: inherited where such a back-end can be run.

The coordinator is a program that steps, checkpoints and obeys as the real one does, in seconds.
"""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from launcher.backends.base import Backend, Handle, Phase
from launcher.jobs import Home, create_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.launcher.made import spec_document

QUICK = "tests.services.quick_coordinator"
NO_MODULE = "tests.launcher.no_such_module"
FEW, MANY = 10, 20_000
"""Steps of a job that ends by itself, and of one that has to be stopped; each takes 0.05 s."""


@dataclass(frozen=True)
class Place:
    """A back-end and where its jobs lie."""

    make: Callable[[str], Backend]
    home: Home
    execution: dict[str, Any]
    seconds: float
    """How long a submission may take to come up, or to be gone."""

    def journal(self, steps: int) -> Journal:
        """A new job of so many steps."""
        document = spec_document(seed=steps, execution=self.execution)
        return create_job(JobSpec.model_validate(document), self.home)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for something."""
        deadline = time.monotonic() + self.seconds
        while not condition():
            assert time.monotonic() < deadline, "it does not happen"
            time.sleep(0.1)

    def running(self) -> tuple[Journal, Backend, Handle]:
        """A job that has made its first steps."""
        journal, backend = self.journal(MANY), self.make(QUICK)
        handle = backend.submit(journal)
        self.until(lambda: Journal(journal.directory).view().candidate("small").latest.get("step", 0) >= 3)
        return journal, backend, handle


def make_place(
    make: Callable[[str], Backend], folder: Path, execution: dict[str, Any], seconds: float, journals: str | None = None
) -> Place:
    """A place with a home of its own, whose jobs may lie in an object store."""
    return Place(make, Home(folder / "home", journals), {"devices": 1, **execution}, seconds)


class BackendContract:
    """What the protocol promises."""

    def test_a_submission_runs_to_its_end_and_tells_how(self, place: Place) -> None:
        journal, backend = place.journal(FEW), place.make(QUICK)
        assert backend.find(journal) is None
        handle = backend.submit(journal)
        place.until(lambda: backend.status(handle).phase is Phase.ENDED)
        status = backend.status(handle)
        assert (status.exit_code, status.final) == (0, False)
        assert status.reason
        assert Journal(journal.directory).state() is JobState.SUCCEEDED
        assert f"step {FEW} of epoch 1" in backend.logs(handle, journal)
        assert backend.find(journal) is None

    def test_a_submission_is_found_and_followed_by_another_process(self, place: Place) -> None:
        """What a dispatcher that takes over has is the handle in the store, or not even that."""
        journal, backend, handle = place.running()
        try:
            other = place.make(QUICK)
            found = other.find(Journal(journal.directory))
            assert found is not None
            assert other.status(json.loads(json.dumps(handle))).phase is Phase.RUNNING
            assert other.status(found).phase is Phase.RUNNING
            assert "of epoch 1" in other.logs(found, journal)
        finally:
            backend.stop(handle, 0)
        assert place.make(QUICK).find(journal) is None

    def test_stopping_with_grace_lets_the_coordinator_write_down_where_it_is(self, place: Place) -> None:
        journal, backend, handle = place.running()
        backend.stop(handle, place.seconds)
        assert backend.status(handle).phase is Phase.ENDED
        view = Journal(journal.directory).view()
        assert view.state is JobState.INTERRUPTED
        assert view.candidate("small").gang.checkpoint_step == view.candidate("small").latest["step"]
        backend.stop(handle, 0)  # again changes nothing

    def test_stopping_at_once_leaves_nothing_running(self, place: Place) -> None:
        journal, backend, handle = place.running()
        backend.stop(handle, 0)
        status = backend.status(handle)
        assert status.phase is Phase.ENDED
        assert not status.final  # whoever stopped it may submit it again
        seen = Journal(journal.directory)
        last = seen.last_event()
        time.sleep(1.0)
        assert seen.last_event() == last
        assert seen.state() in (JobState.RUNNING, JobState.INTERRUPTED)  # Slurm asks even those that it kills
        # Where nobody can look from here, it counts for a minute after its last event.
        elsewhere = seen.view().attempt["node"] != socket.gethostname()
        with mock.patch("time.time", return_value=time.time() + 60 * elsewhere):
            assert seen.holder() is None

    def test_a_coordinator_that_does_not_come_up_is_told_with_its_last_words(self, place: Place) -> None:
        journal, backend = place.journal(FEW), place.make(NO_MODULE)
        handle = backend.submit(journal)
        place.until(lambda: backend.status(handle).phase is Phase.ENDED)
        status = backend.status(handle)
        assert (status.exit_code, status.final) == (1, False)
        assert "exit code 1" in status.reason
        assert "No module named" in backend.logs(handle, journal)
        # The same job can be submitted again.
        again = backend.submit(journal)
        assert again != handle
        place.until(lambda: backend.status(again).phase is Phase.ENDED)
