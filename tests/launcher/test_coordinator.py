"""Whole jobs on the local back-end with a toy trainer: faults, requests, zombies; what counts is the final weights."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.local import LocalBackend
from launcher.coordinator import EXIT_STALE
from launcher.jobs import Home, JobError, Supervisor, create_job, run_job, stop_job
from launcher.journal import Journal
from launcher.policy import UNSEEN_SECONDS
from launcher.processes import local_processes
from launcher.result import result_document
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.launcher.leftovers import left_behind
from tests.launcher.made import spec_document
from tests.launcher.toys import STEP_SECONDS

TOY = "tests.launcher.toy_coordinator"
LIMIT_SECONDS = 300.0

pytestmark = [pytest.mark.timeout(600), pytest.mark.campaign]


def _job(tmp_path: Path, steps: int, names: tuple[str, ...] = ("a",), **execution: Any) -> tuple[Home, Journal]:
    model = {"family": "gpt", "layers": 1, "hidden": 16, "heads": 2}
    document = spec_document(
        budget={"tokens": steps},
        candidates=[{"name": name, "model": model} for name in names],
        execution={"devices": 2, "checkpoint_every": {"steps": 10}, **execution},
    )
    home = Home(tmp_path)
    return home, create_job(JobSpec.model_validate(document), home)


class _Running:
    """A supervised job in a thread of the test."""

    def __init__(self, home: Home, journal: Journal) -> None:
        self.journal = Journal(journal.directory)
        self._states: list[JobState] = []
        self._thread = threading.Thread(target=self._run, args=(home, journal.job_id), daemon=True)
        self._thread.start()

    def _run(self, home: Home, job_id: str) -> None:
        self._states.append(run_job(home, job_id, LocalBackend(TOY)))

    def until(self, condition: Callable[[], Any]) -> None:
        _until(condition)

    def until_step(self, step: int, candidate: str = "a") -> None:
        """Until the job has reported the step."""
        _until(lambda: self.journal.view().candidate(candidate).latest.get("step", 0) >= step)

    def pid(self, role: str, **fields: str) -> int:
        """The newest process in this role."""
        wanted = {"role": role, **fields}.items()
        return [event["pid"] for event in self.journal.view().processes.values() if wanted <= event.items()][-1]

    def end(self) -> JobState:
        """The state the job rests in; nothing of it may run any more."""
        self._thread.join(LIMIT_SECONDS)
        assert self._states, "the job does not end"
        assert not left_behind(self.journal)
        return self._states[0]


@pytest.fixture
def start() -> Iterator[Callable[[Home, Journal], _Running]]:
    jobs: list[tuple[Home, Journal]] = []

    def one(home: Home, journal: Journal) -> _Running:
        jobs.append((home, journal))
        return _Running(home, journal)

    yield one
    for home, journal in jobs:
        stop_job(home, journal.job_id, cancel=True)


def _until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


def _weights(journal: Journal, candidate: str = "a") -> int:
    row = next(row for row in result_document(journal)["candidates"] if row["name"] == candidate)
    return int((Path(row["checkpoint"]) / "sum").read_text())


def _expected(steps: int) -> int:
    return steps * (steps + 1) // 2


def test_candidates_train_side_by_side_and_one_that_diverges_does_not_stop_the_other(
    tmp_path: Path, start: Callable[[Home, Journal], _Running]
) -> None:
    home, journal = _job(tmp_path, 60, names=("a", "diverges-at-15"))
    assert start(home, journal).end() is JobState.FAILED
    assert _weights(journal) == _expected(60)
    result = result_document(journal)
    good, bad = result["candidates"]
    assert (good["steps"], good["tokens"], good["error"], good["restarts"]) == (60, 60, None, 0)
    assert bad["checkpoint"] is None
    assert "training diverged at step 15" in bad["error"]
    assert "not tried again" in bad["error"]
    assert bad["restarts"] == 0
    assert result["error"].startswith("1 of 2 candidates failed: diverges-at-15")
    gangs = [event for event in journal.events() if event["kind"] in ("gang_started", "gang_ended")]
    assert [event["kind"] for event in gangs[:2]] == ["gang_started", "gang_started"]
    roles = {event["role"] for event in journal.events() if event["kind"] == "process_started"}
    assert {"coordinator", "ray", "rank"} <= roles
    assert all(event["pid"] and event["node"] for event in journal.events() if event["kind"] == "process_started")
    heartbeats = [event for event in journal.events() if event["kind"] == "heartbeat"]
    assert any(event["system"]["memory_bytes"] > 0 for event in heartbeats if event["candidate"] is None)


def test_killed_ranks_and_coordinators_change_nothing_but_the_bill(
    tmp_path: Path, start: Callable[[Home, Journal], _Running]
) -> None:
    home, journal = _job(tmp_path, 250)
    running = start(home, journal)
    running.until_step(25)
    os.kill(running.pid("rank"), signal.SIGKILL)
    running.until(lambda: running.journal.view().candidate("a").restarts)
    running.until_step(105)
    coordinator = running.pid("coordinator")
    os.kill(coordinator, signal.SIGKILL)
    assert running.end() is JobState.SUCCEEDED
    assert _weights(journal) == _expected(250)
    candidate = result_document(journal)["candidates"][0]
    assert candidate["steps"] == 250
    view = journal.view()
    # More attempts than two where Ray did not start at once; they have no process group.
    assert [gang.epoch for gang in view.candidate("a").gangs] == [1, 1, view.epoch]
    reasons = [restart["reason"] for restart in view.candidate("a").restarts]
    assert reasons == ["rank died", "coordinator lost"]
    for restart in view.candidate("a").restarts:
        assert restart["from_step"] % 10 == 0
        assert restart["lost_steps"] < 60
        assert restart["lost_device_seconds"] >= 0
    assert candidate["lost_device_seconds"] == sum(
        restart["lost_device_seconds"] for restart in view.candidate("a").restarts
    )
    # A killed rank has always burnt something since its last checkpoint, whether that checkpoint was told or not.
    assert view.candidate("a").restarts[0]["lost_device_seconds"] > 0
    assert candidate["device_seconds"] > candidate["lost_device_seconds"]
    # What nobody saw is charged for at least as long as the rank shows in its log, and for a few seconds at most.
    started = [event for event in journal.events() if event["kind"] == "gang_started"][1]
    lived = journal.log_path("a.e0001-g02.rank0").stat().st_mtime - started["time"]
    assert lived - 0.1 < view.candidate("a").gangs[1].wall_seconds < lived + 2 * UNSEEN_SECONDS
    assert "unseen_device_seconds" in view.candidate("a").restarts[1]
    assert view.candidate("a").restarts[0]["unseen_device_seconds"] == 0.0
    # A group without its coordinator runs on for a while; what its last checkpoint says of the clock is counted.
    for gang, restart in zip(view.candidate("a").gangs, view.candidate("a").restarts, strict=False):
        assert gang.device_seconds >= STEP_SECONDS * (restart["from_step"] - gang.resumed_step)
    assert [gang.ended for gang in view.candidate("a").gangs] == ["rank died", None, "budget"]
    assert len(list(journal.checkpoints_dir("a").iterdir())) == 1  # superseded roots are gone


def test_a_coordinator_whose_node_is_lost_is_replaced(
    tmp_path: Path, start: Callable[[Home, Journal], _Running]
) -> None:
    """Without Ray's server of its node a coordinator lives, but would wait for ever for the next process group."""
    home, journal = _job(tmp_path, 150)
    running = start(home, journal)
    running.until_step(25)
    os.kill(running.pid("ray", name="raylet"), signal.SIGKILL)
    os.kill(running.pid("rank"), signal.SIGKILL)
    assert running.end() is JobState.SUCCEEDED
    assert _weights(journal) == _expected(150)
    assert [gang.epoch for gang in journal.view().candidate("a").gangs] == [1, journal.view().epoch]
    assert "Ray has lost the node" in journal.log_path("coordinator").read_text()


def test_pause_signal_and_continue_lose_nothing(tmp_path: Path, start: Callable[[Home, Journal], _Running]) -> None:
    home, journal = _job(tmp_path, 200)
    running = start(home, journal)
    running.until_step(15)
    with pytest.raises(JobError, match="is being worked on by process"):
        run_job(home, journal.job_id, LocalBackend(TOY))
    journal.set_desired("pause")
    assert running.end() is JobState.PAUSED
    running = start(home, journal)
    running.until(lambda: running.journal.view().epoch == 2)
    running.until_step(100)
    os.kill(running.pid("coordinator"), signal.SIGTERM)
    assert running.end() is JobState.INTERRUPTED
    assert start(home, journal).end() is JobState.SUCCEEDED
    assert _weights(journal) == _expected(200)
    view = journal.view()
    assert view.candidate("a").restarts == []
    gangs = view.candidate("a").gangs
    assert [gang.ended for gang in gangs] == ["pause", "signal", "budget"]
    assert [gang.resumed_step for gang in gangs[1:]] == [gang.step for gang in gangs[:-1]]
    states = [event["state"] for event in journal.events() if event["kind"] == "state"]
    assert states[2:4] == ["pausing", "paused"]
    with pytest.raises(JobError, match="is succeeded: there is nothing to continue"):
        run_job(home, journal.job_id, LocalBackend(TOY))


def test_cancelling_is_final_also_by_force(tmp_path: Path, start: Callable[[Home, Journal], _Running]) -> None:
    home, journal = _job(tmp_path, 5000)
    running = start(home, journal)
    running.until_step(5)
    stop_job(home, journal.job_id, cancel=True)
    assert running.end() is JobState.CANCELLED
    assert "cancelled" in [event["state"] for event in journal.events() if event["kind"] == "state"]
    with pytest.raises(JobError, match="is cancelled: there is nothing"):
        run_job(home, journal.job_id, LocalBackend(TOY))


def test_a_stopped_coordinator_that_wakes_up_after_its_successor_is_ignored(tmp_path: Path) -> None:
    home, journal = _job(tmp_path, 150)
    backend, states = LocalBackend(TOY), []
    zombie = backend.submit(journal)
    try:
        _until(lambda: journal.view().candidate("a").latest.get("step", 0) >= 25)
        os.kill(zombie["pid"], signal.SIGSTOP)  # its rank goes on training and writing checkpoints
        successor = Supervisor(Journal(journal.directory), LocalBackend(TOY))
        thread = threading.Thread(target=lambda: states.append(successor.run()), daemon=True)
        thread.start()
        _until(lambda: journal.view().candidate("a").gang.epoch >= 2)
        claimed = journal.last_event()
        os.kill(zombie["pid"], signal.SIGCONT)
        _until(lambda: backend.status(zombie).phase == "ended")
        assert backend.status(zombie).exit_code == EXIT_STALE
        assert "epoch 1 has ended" in journal.log_path("coordinator").read_text()
        thread.join(LIMIT_SECONDS)
    finally:
        backend.stop(zombie, 0)
        stop_job(home, journal.job_id, cancel=True)
    assert states == [JobState.SUCCEEDED]
    assert 1 not in {event["epoch"] for event in journal.events(claimed)}
    assert _weights(journal) == _expected(150)
    assert Path(journal.view().candidate("a").gang.root).name.startswith(f"e{journal.view().epoch:04d}")
    assert not left_behind(journal)


def test_a_coordinator_does_not_outlive_its_keeper(tmp_path: Path, start: Callable[[Home, Journal], _Running]) -> None:
    _, journal = _job(tmp_path, 5000)
    code = (
        "import sys; from pathlib import Path\n"
        "from launcher.backends.local import LocalBackend\n"
        "from launcher.jobs import Home, run_job\n"
        f"run_job(Home(Path(sys.argv[1])), sys.argv[2], LocalBackend({TOY!r}))\n"
    )
    keeper = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), journal.job_id], cwd=Path(__file__).parents[2]
    )
    try:
        _until(lambda: journal.view().candidate("a").latest.get("step", 0) >= 5)
        assert local_processes(journal.view())
    finally:
        keeper.kill()
        keeper.wait()
    _until(lambda: journal.state() is JobState.INTERRUPTED)
    _until(lambda: not left_behind(journal))
    gang = journal.view().candidate("a").gang
    assert gang.ended == "signal"
    assert gang.checkpoint_step == gang.step


def test_a_coordinator_that_cannot_start_fails_the_job_with_its_last_words(tmp_path: Path) -> None:
    home, journal = _job(tmp_path, 10)
    assert run_job(home, journal.job_id, LocalBackend("tests.launcher.no_such_module")) is JobState.FAILED
    error = journal.view().error
    assert error is not None
    assert "died 4 times without getting anywhere" in error
    assert "No module named tests.launcher.no_such_module" in error
