"""The local back-end's process handling, with small programs in the coordinator's place, and jobs on disk."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from launcher import environment
from launcher.actors import session
from launcher.backends.base import BACKENDS, Phase, make_backend
from launcher.backends.common import tail
from launcher.backends.local import LocalBackend
from launcher.jobs import Home, JobError, collect_garbage, create_job, find_job, list_jobs
from launcher.journal import Journal
from launcher.processes import local_processes
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.launcher.made import new_journal, spec_document


def _until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_table_of_backends() -> None:
    assert isinstance(make_backend("local"), LocalBackend)
    assert set(BACKENDS) >= {"local", "ray", "slurm"}
    with pytest.raises(ValueError, match=r"'moon' is unknown: available are .*local"):
        make_backend("moon")


def test_a_submission_runs_in_its_own_session_with_its_own_settings(tmp_path: Path) -> None:
    journal, backend = new_journal(tmp_path), LocalBackend("tests.launcher.sleeper")
    handle = backend.submit(journal)
    try:
        _until(lambda: "ready" in backend.logs(handle, journal))
        assert backend.status(handle).phase is Phase.RUNNING
        process = psutil.Process(handle["pid"])
        assert os.getsid(handle["pid"]) == handle["pid"]
        environment = process.environ()
        assert environment["RAY_AUTH_MODE"] == "token"
        assert len(environment["RAY_AUTH_TOKEN"]) == 64
        assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert "--keeper" in process.cmdline()
        assert Path(handle["ray_dir"]).is_dir()
        assert len(handle["ray_dir"]) < 30
        assert process.cwd() == journal.facts()["working_directory"]
    finally:
        backend.stop(handle, 0)
    assert backend.status(handle).phase is Phase.ENDED
    assert not Path(handle["ray_dir"]).exists()


def test_stopping_asks_first_and_then_ends_everything(tmp_path: Path) -> None:
    journal, backend = new_journal(tmp_path), LocalBackend("tests.launcher.sleeper")
    handle = backend.submit(journal)
    _until(lambda: "ready" in backend.logs(handle, journal))
    children = psutil.Process(handle["pid"]).children()
    assert len(children) == 1
    start = time.monotonic()
    backend.stop(handle, grace_seconds=1.0)  # it takes note of SIGTERM and goes on
    assert time.monotonic() - start >= 1.0
    assert "asked to stop" in tail(journal.log_path("coordinator"), 5)
    _until(lambda: not children[0].is_running() or children[0].status() == psutil.STATUS_ZOMBIE)
    status = backend.status(handle)
    assert (status.phase, status.reason) == (Phase.ENDED, "killed by SIGKILL")


def test_another_process_can_ask_for_a_submission_by_its_handle(tmp_path: Path) -> None:
    journal, backend = new_journal(tmp_path), LocalBackend("tests.launcher.sleeper")
    handle = backend.submit(journal)
    other = LocalBackend()
    assert other.status(handle).phase is Phase.RUNNING
    backend.stop(handle, 0)
    assert other.status(handle).phase is Phase.ENDED
    assert other.status(handle | {"created": 1.0}).phase is Phase.ENDED


def test_a_coordinator_is_found_by_the_job_it_works_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, backend = new_journal(tmp_path), LocalBackend("tests.launcher.sleeper")
    handle = backend.submit(journal)
    try:
        found = LocalBackend("tests.launcher.sleeper").find(journal)
        assert found is not None
        assert (found["pid"], found["ray_dir"]) == (handle["pid"], handle["ray_dir"])
        assert found["created"] == pytest.approx(handle["created"], abs=0.1)
        assert backend.find(Journal(tmp_path / "another")) is None
        with monkeypatch.context() as patch:  # other users' processes may claim to be anything
            patch.setattr("launcher.backends.spare.os.getuid", lambda: -1)
            assert backend.find(journal) is None
    finally:
        backend.stop(handle, 0)
    assert backend.find(journal) is None


def test_a_submission_that_ends_tells_its_exit_code(tmp_path: Path) -> None:
    journal, backend = new_journal(tmp_path), LocalBackend("tests.launcher.no_such_module")
    handle = backend.submit(journal)
    _until(lambda: backend.status(handle).phase is Phase.ENDED)
    status = backend.status(handle)
    assert (status.exit_code, status.reason) == (1, "exit code 1")
    assert "No module named" in backend.logs(handle, journal)


def test_the_exit_code_is_awaited_while_the_last_threads_end(tmp_path: Path) -> None:
    """A process whose first thread has ended looks like a zombie, but there is nothing to wait for yet."""
    journal, backend = new_journal(tmp_path), LocalBackend("tests.launcher.slow_ender")
    handle = backend.submit(journal)
    try:
        _until(lambda: psutil.Process(handle["pid"]).status() == psutil.STATUS_ZOMBIE)
        assert backend.status(handle).phase is Phase.RUNNING
        (journal.directory / "end").touch()
        _until(lambda: backend.status(handle).phase is Phase.ENDED)
    finally:
        backend.stop(handle, 0)
    assert backend.status(handle).exit_code == 4


def test_a_number_that_another_process_has_now_is_left_alone(tmp_path: Path) -> None:
    innocent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    try:
        handle = {"pid": innocent.pid, "created": time.time() - 3600, "ray_dir": str(tmp_path / "ray")}
        assert LocalBackend().status(handle).phase is Phase.ENDED
        LocalBackend().stop(handle, 0)
        assert innocent.poll() is None
        innocent.communicate(b"\n", timeout=30)
        assert innocent.returncode == 0
    finally:
        innocent.kill()
        innocent.wait()


def test_jobs_are_found_by_id_beginning_and_last(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert list_jobs(home) == []
    with pytest.raises(JobError, match="'x' is unknown under"):
        find_job(home, "x")
    spec = JobSpec.model_validate(spec_document())
    first, second = create_job(spec, home, "tiny-aaa111"), create_job(spec, home, "tiny-bbb222")
    assert create_job(spec, home).job_id.startswith("tiny-")
    assert [job.job_id for job in list_jobs(home)][:2] == ["tiny-aaa111", "tiny-bbb222"]
    assert find_job(home, "tiny-aaa").directory == first.directory
    assert find_job(home, "tiny-bbb222").directory == second.directory
    assert find_job(home, "last").job_id not in ("tiny-aaa111", "tiny-bbb222")
    with pytest.raises(JobError, match="'tiny' is not unique"):
        find_job(home, "tiny")


def test_garbage_is_what_nothing_needs_any_more(tmp_path: Path) -> None:
    home = Home(tmp_path)
    journal = create_job(JobSpec.model_validate(spec_document()), home)
    journal.claim_epoch()
    for gang in (1, 2):
        root = journal.gang_root("small", gang)
        root.mkdir(parents=True)
        (root / "weights").write_bytes(b"x" * 1000)
        fields = {"gang": gang, "root": str(root), "world_size": 1, "resumed_from": None, "resumed_step": 0}
        journal.append("gang_started", {"candidate": "small", **fields})
    journal.layers_dir("small").mkdir(parents=True)
    (journal.layers_dir("small") / "0").write_bytes(b"y" * 500)
    assert collect_garbage(home) == []  # this process holds the job
    for state in (JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED):
        journal.set_state(state)
    found = collect_garbage(home, dry_run=True)
    assert {(item.what, item.bytes) for item in found} == {("superseded checkpoints", 1000), ("compressed layers", 500)}
    assert journal.layers_dir("small").exists()
    collect_garbage(home)
    assert not journal.layers_dir("small").exists()
    assert [path.name for path in journal.checkpoints_dir("small").iterdir()] == ["e0001-g02"]
    assert collect_garbage(home) == []


def test_only_failed_jobs_go_whole_and_only_when_old(tmp_path: Path) -> None:
    home = Home(tmp_path)
    journal = create_job(JobSpec.model_validate(spec_document()), home)
    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    journal.set_state(JobState.FAILED, error="x")
    assert collect_garbage(home, older_than_days=1.0) == []
    (item,) = collect_garbage(home, older_than_days=0.0)
    assert item.what == "job"
    assert list_jobs(home) == []


def test_a_number_given_out_again_is_not_taken_for_the_jobs_process(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    node = journal.view().attempt["node"]
    journal.append("process_started", {"role": "rank", "pid": os.getpid(), "node": node, "candidate": "small"})
    assert [process.pid for process in local_processes(journal.view())] == [os.getpid()]
    view = Journal(journal.directory).view()
    view.processes[node, os.getpid()]["time"] = psutil.Process().create_time() - 100
    assert local_processes(view) == []


def test_the_longest_temporary_directory_fits_a_session() -> None:
    made = Path(tempfile.mkdtemp(prefix="esp-", dir="/tmp"))
    made.rmdir()
    assert environment.LONGEST_TEMP_DIR + len(str(made)) - len("/tmp") == session.LONGEST_TEMP_DIR
