"""A coordinator kept ready: given to the job that it fits, found by others, gone with its keeper."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import spare as waiting
from launcher.backends import local
from launcher.backends.base import Phase
from launcher.backends.local import LocalBackend
from launcher.backends.spare import READY, Spare
from launcher.environment import default_devices
from launcher.jobs import Home, create_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.launcher.leftovers import left_behind
from tests.launcher.made import spec_document

pytestmark = pytest.mark.timeout(300)


def _until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _job(home: Home, **execution: Any) -> Journal:
    return create_job(
        JobSpec.model_validate(spec_document(evaluation={"tokens": 256}, execution=execution)),
        home,
    )


def _rank(journal: Journal) -> int | None:
    started = (event for event in Journal(journal.directory).events() if event["kind"] == "process_started")
    return next((event["pid"] for event in started if event["role"] == "rank"), None)


def _spare_of(backend: LocalBackend) -> Spare:
    spare = backend._spare
    assert spare is not None
    return spare


def test_a_job_that_fits_is_given_to_the_coordinator_that_is_ready(tmp_path: Path) -> None:
    home, backend = Home(tmp_path), LocalBackend(outlive=True)
    journal = _job(home)
    try:
        backend.keep_spare(True)
        spare = _spare_of(backend)
        assert not spare.fits(journal)  # not ready yet
        _until(lambda: (spare.folder / READY).exists() or not spare.alive)
        backend.keep_spare(True)
        assert _spare_of(backend) is spare
        for misfit in ({"threads_per_rank": 2}, {"devices": default_devices(1) + 1}):
            assert not spare.fits(_job(home, **misfit))
        submitted = time.time()
        handle = backend.submit(journal)
        assert handle["pid"] == spare.process.pid
        assert LocalBackend().find(journal) == handle
        _until(lambda: _rank(journal) is not None)
        # Ray gave the rank a worker that had been there before the job.
        worker = psutil.Process(_rank(journal))
        assert worker.create_time() < submitted
        assert worker.environ()["OMP_NUM_THREADS"] == "1"  # whatever it does computes as a worker that is started late
        _until(lambda: backend.status(handle).phase is Phase.ENDED)
    finally:
        backend.keep_spare(False)
        spare.end()
    assert backend.status(handle).exit_code == 0
    seen = Journal(journal.directory)
    assert seen.state() is JobState.SUCCEEDED
    assert not spare.folder.exists()
    assert left_behind(seen) == []


def test_another_working_directory_wants_a_coordinator_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = LocalBackend(outlive=True)
    try:
        backend.keep_spare(True)
        (_spare_of(backend).folder / READY).touch()
        here = _job(Home(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert _spare_of(backend).fits(here)
        assert not _spare_of(backend).fits(_job(Home(tmp_path)))
    finally:
        spare = _spare_of(backend)
        backend.keep_spare(False)
    assert not spare.alive
    assert not spare.folder.exists()


def test_one_that_dies_is_replaced_but_not_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend(outlive=True)
    try:
        backend.keep_spare(True)
        first = _spare_of(backend)
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait()
        backend.keep_spare(True)
        assert backend._spare is None
        monkeypatch.setattr(local, "SPARE_SECONDS", 0.0)
        backend._next_spare = 0.0
        backend.keep_spare(True)
        assert _spare_of(backend) is not first
    finally:
        backend.keep_spare(False)


def test_it_ends_with_its_keeper(tmp_path: Path) -> None:
    assert waiting.wait_for_job(tmp_path, keeper=os.getpid()) is None  # which is not this process's parent
