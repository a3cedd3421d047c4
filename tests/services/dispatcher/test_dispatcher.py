"""Dispatchers as processes, with a coordinator that needs no cluster: who works on a job, and from where."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import BackendStatus, Phase
from launcher.jobs import Home, create_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from services.dispatcher.loop import Dispatcher
from services.dispatcher.policy import Settle, Submit
from services.reindex import back_up, reindex
from services.settings import Settings
from services.store.database import Database, StoreError
from services.store.jobs import Account, Filter, JobStore, NewJob, UnknownJob, Wish
from services.store.leases import DISPATCHER, Leases
from services.store.tables import JobRow
from tests.launcher.made import spec_document
from tests.services.running import ROOT, until
from tests.services.stores import new_database

SECONDS = 200.0


class Bench:
    """A store, a home, and dispatchers on both."""

    def __init__(self, home: Path, database: str, **changes: Any) -> None:
        known: dict[str, Any] = {
            "coordinator": "tests.services.quick_coordinator",
            "mlflow": "none",
            "lease_seconds": 2.0,
        }
        self.settings = Settings(home=home, database=database, poll_seconds=0.1, **{**known, **changes})
        store = Database(database)
        store.migrate()
        self.jobs = JobStore(store)

    def submit(self, steps: int, owner: str = "anna", devices: int = 1, **changes: Any) -> str:
        """A job of so many steps."""
        number = len(self.jobs.page(Filter(), 200))
        spec = JobSpec.model_validate(spec_document(seed=steps))
        new = NewJob(f"tiny-{number:04d}", "tiny", spec.model_dump(mode="json"), {}, "x", devices, **changes)
        return self.jobs.submit(new, Account(owner))[0].id

    @contextmanager
    def dispatcher(self) -> Iterator[subprocess.Popen[bytes]]:
        """One more dispatcher; left by SIGTERM at the end."""
        command = [sys.executable, "-m", "services.dispatcher", str(self.settings.write())]
        with open(self.settings.home / "dispatcher.log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                process.wait(30)

    @contextmanager
    def led(self) -> Iterator[None]:
        """A dispatcher in a thread of this process, for tests that do nothing to it."""
        ended = threading.Event()
        dispatcher = Dispatcher(self.settings)
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(dispatcher.run, lambda: "leave" if ended.is_set() else None)
            try:
                yield
            finally:
                ended.set()
        running.result()

    def row(self, job: str) -> JobRow:
        return self.jobs.get(job, None)

    def journal(self, job: str) -> Journal:
        return Journal(self.settings.home / "jobs" / job)

    def reaches(self, job: str, *states: JobState) -> JobRow:
        """Wait until the store says so, and nobody holds devices for a job that rests."""
        try:
            until(lambda: self.row(job).state in states, SECONDS)
        except TimeoutError:
            raise AssertionError(f"{job} is {self.row(job).state}: {vars(self.row(job))}") from None
        return self.row(job)

    def steps(self, job: str, least: int) -> None:
        """Wait until the job has done so many steps."""
        until(lambda: len(self.done(job)) >= least, SECONDS)

    def done(self, job: str) -> list[tuple[int, int]]:
        """Step and epoch of everything that a coordinator did."""
        log = self.journal(job).logs_dir / "coordinator.log"
        text = log.read_text() if log.exists() else ""
        return [(int(step), int(epoch)) for step, epoch in re.findall(r"step (\d+) of epoch (\d+)", text)]

    def pid(self, job: str) -> int:
        """The process that works on the job."""
        holder = self.journal(job).holder()
        assert holder is not None
        return int(holder["pid"])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, f"sqlite:///{tmp_path}/jobs.db")


def test_a_job_runs_to_its_end_on_either_store(tmp_path: Path, database_url: str) -> None:
    bench = Bench(tmp_path, database_url)
    job = bench.submit(20)
    with bench.led():
        row = bench.reaches(job, JobState.SUCCEEDED)
        until(lambda: bench.row(job).handle is None)
    assert [step for step, _ in bench.done(job)] == list(range(1, 21))
    assert (row.epoch, row.error, row.waiting) == (1, None, None)
    row = bench.row(job)
    assert row.progress == 1.0
    assert row.device_seconds == pytest.approx(1.0)
    assert row.observed["candidates"][0]["step"] == 20
    assert bench.jobs.used_hours("owner anna") == pytest.approx(1.0 / 3600)
    assert bench.journal(job).document("service")["owner"] == "anna"


def test_pause_resume_and_cancel(bench: Bench) -> None:
    job, queued = bench.submit(400, devices=2), bench.submit(5, devices=2)
    with bench.led():
        bench.steps(job, 8)
        until(lambda: "devices" in (bench.row(queued).waiting or ""))
        bench.jobs.ask(queued, None, Wish("cancel"))
        assert bench.reaches(queued, JobState.CANCELLED).epoch == 1
        assert bench.done(queued) == []
        bench.jobs.ask(job, None, Wish("pause"))
        bench.reaches(job, JobState.PAUSED)
        paused_at = len(bench.done(job))
        until(lambda: bench.row(job).handle is None)
        bench.jobs.ask(job, None, Wish("run"))
        bench.steps(job, paused_at + 5)
        # Every step was done once: the pause left a checkpoint of the last one.
        assert [step for step, _ in bench.done(job)][: paused_at + 5] == list(range(1, paused_at + 6))
        bench.jobs.ask(job, None, Wish("cancel"))
        assert bench.reaches(job, JobState.CANCELLED).epoch == 2


def test_a_dispatcher_that_is_killed_leaves_jobs_running_and_the_next_one_adopts_them(bench: Bench) -> None:
    job = bench.submit(80)
    with bench.dispatcher() as first:
        bench.steps(job, 5)
        worker = bench.pid(job)
        first.kill()
        first.wait()
        before = len(bench.done(job))
        bench.steps(job, before + 5)  # nobody dispatches, and it goes on
        with bench.led():
            row = bench.reaches(job, JobState.SUCCEEDED)
    assert row.epoch == 1
    assert {event["pid"] for event in bench.journal(job).events() if event["kind"] == "process_started"} == {worker}
    assert [step for step, _ in bench.done(job)] == list(range(1, 81))


def test_a_coordinator_that_is_killed_is_replaced_from_its_checkpoint(bench: Bench) -> None:
    job = bench.submit(40)
    with bench.led():
        bench.steps(job, 12)
        os.kill(bench.pid(job), signal.SIGKILL)
        row = bench.reaches(job, JobState.SUCCEEDED)
    assert row.epoch == 2
    second = [step for step, epoch in bench.done(job) if epoch == 2]
    assert second[0] in (6, 11, 16)  # right after a checkpoint
    assert second[-1] == 40


def test_one_that_was_stopped_and_wakes_up_changes_nothing(tmp_path: Path, postgres: str) -> None:
    """On PostgreSQL: a process that is stopped while it writes to SQLite holds the file's lock."""
    bench = Bench(tmp_path, new_database(postgres))
    job = bench.submit(150)
    with bench.dispatcher() as first:
        bench.steps(job, 3)
        os.kill(first.pid, signal.SIGSTOP)
        with bench.dispatcher():
            until(lambda: "leads" in (bench.settings.home / "dispatcher.log").read_text().split("started")[-1])
            bench.jobs.ask(job, None, Wish("pause"))
            bench.reaches(job, JobState.PAUSED)
            os.kill(first.pid, signal.SIGCONT)
            bench.jobs.ask(job, None, Wish("run"))
            bench.reaches(job, JobState.SUCCEEDED)
    assert bench.row(job).epoch == 2
    assert [step for step, _ in bench.done(job)] == list(range(1, 151))


def test_two_epochs_never_live_at_once(bench: Bench) -> None:
    """A coordinator wakes up beside a successor that was started elsewhere: it is refused and ends."""
    job = bench.submit(60)
    with bench.led():
        bench.steps(job, 5)
        first = bench.pid(job)
        os.kill(first, signal.SIGSTOP)
        bench.journal(job).claim_epoch()  # this process now holds the job
        os.kill(first, signal.SIGCONT)
        row = bench.reaches(job, JobState.SUCCEEDED)
    assert row.epoch == 3
    epochs = [event["epoch"] for event in bench.journal(job).events()]
    assert epochs == sorted(epochs)  # nothing of the first one behind the second one's beginning


def test_stopping_the_service_checkpoints_and_the_next_start_goes_on(bench: Bench) -> None:
    job = bench.submit(60)
    with bench.dispatcher() as first:
        bench.steps(job, 7)
        first.send_signal(signal.SIGINT)
        first.wait(30)
    row = bench.row(job)
    assert (row.state, row.desired, row.handle) == (JobState.INTERRUPTED, "run", None)
    stopped_at = len(bench.done(job))
    with bench.led():
        bench.reaches(job, JobState.SUCCEEDED)
    assert [step for step, _ in bench.done(job)] == list(range(1, 61))
    assert [epoch for _, epoch in bench.done(job)] == [1] * stopped_at + [2] * (60 - stopped_at)


def test_coordinators_that_never_begin_are_given_up_with_their_last_words(tmp_path: Path) -> None:
    bench = Bench(tmp_path, f"sqlite:///{tmp_path}/jobs.db", coordinator="tests.launcher.no_such_module")
    job = bench.submit(5)
    with bench.led():
        row = bench.reaches(job, JobState.FAILED)
    assert "the coordinator died 4 times without getting anywhere" in (row.error or "")
    assert "No module named" in (row.error or "")


def test_a_job_that_cannot_be_opened_says_so_and_holds_up_nobody(bench: Bench) -> None:
    broken = bench.submit(5)
    folder = bench.settings.home / "jobs" / broken
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way", encoding="utf-8")
    with bench.led():
        until(lambda: "in the way" in (bench.row(broken).waiting or "") or bench.row(broken).waiting, SECONDS)
        other = bench.submit(5)
        bench.reaches(other, JobState.SUCCEEDED)
        assert "the dispatcher cannot look at it" in str(bench.row(broken).waiting)
        folder.unlink()
        bench.reaches(broken, JobState.SUCCEEDED)


class Elsewhere:
    """A back-end that finds a submission again by its name; it remembers what it was asked to end."""

    outlives = True

    def __init__(self) -> None:
        self.stopped: list[dict[str, Any]] = []

    def stop(self, handle: dict[str, Any], grace_seconds: float) -> None:
        self.stopped.append(handle)


@pytest.mark.parametrize(
    ("kept", "local", "ends"),
    [
        ({"name": "mine"}, False, False),  # the next leader has found it
        ({}, False, False),  # and will
        ({"name": "other"}, False, True),
        ({}, True, True),  # a process of this machine, which others do not see
        ({"name": "mine"}, True, False),
    ],
)
def test_who_leads_no_longer_ends_only_what_nobody_took_over(
    bench: Bench, kept: dict[str, Any], local: bool, ends: bool
) -> None:
    job, backend, dispatcher = bench.submit(5), Elsewhere(), Dispatcher(bench.settings)
    if local:
        dispatcher._local = backend
    lease = Leases(Database(bench.settings.database_url)).take(DISPATCHER, "next", 60.0)
    assert lease is not None
    bench.jobs.note(job, lease, handle=kept)
    dispatcher._withdraw(bench.row(job), backend, {"name": "mine"})
    assert bool(backend.stopped) is ends


def test_that_an_end_is_meant_is_known_before_it_comes(bench: Bench) -> None:
    """The next leader must not take it for the wish of somebody else."""
    job, dispatcher = bench.submit(5), Dispatcher(bench.settings)
    lease = Leases(Database(bench.settings.database_url)).take(DISPATCHER, "this", 60.0)
    assert lease is not None
    bench.jobs.note(job, lease, handle={"name": "mine"})
    noted: list[Any] = []

    class Asked(Elsewhere):
        def stop(self, handle: dict[str, Any], grace_seconds: float) -> None:
            noted.append(bench.row(job).handle)

        def status(self, handle: dict[str, Any]) -> BackendStatus:
            return BackendStatus(Phase.ENDED, "was deleted", final=True)

    backend = Asked()
    dispatcher._backends["local"] = backend
    dispatcher._stop(bench.row(job), backend, 0.0, lease)
    assert noted == [{"name": "mine", "stopped": True}]
    assert isinstance(dispatcher._decide(bench.row(job), lease), Submit)
    bench.jobs.note(job, lease, handle={"name": "mine"})  # as if somebody else had deleted it
    assert isinstance(dispatcher._decide(bench.row(job), lease), Settle)


def test_owners_take_turns_and_devices_are_never_given_twice(tmp_path: Path) -> None:
    bench = Bench(tmp_path, f"sqlite:///{tmp_path}/jobs.db", devices=2)
    jobs = [bench.submit(10, "anna") for _ in range(4)] + [bench.submit(10, "berta")]
    with bench.led():
        for job in jobs:
            bench.reaches(job, JobState.SUCCEEDED)
    lives = []
    for job in jobs:
        events = [
            event for event in bench.journal(job).events() if event["kind"] in ("attempt_started", "process_ended")
        ]
        lives.append((events[0]["time"], events[1]["time"]))
    for start, _ in lives:
        assert sum(other <= start < end for other, end in lives) <= 2
    assert lives[4][0] < lives[2][0]  # berta's, the last to come, before anna's third


def test_a_lost_store_is_rebuilt_from_the_journals_and_a_backup_restored(bench: Bench) -> None:
    """The store is copied, lost, copied back and brought up to date: also what happened since is known then."""
    first = bench.submit(10)
    with bench.led():
        bench.reaches(first, JobState.SUCCEEDED)
        until(lambda: bench.row(first).handle is None)
    copy = bench.settings.home / "copy.db"
    back_up(bench.settings.database_url, copy)
    with pytest.raises(StoreError, match="exists already"):
        back_up(bench.settings.database_url, copy)
    second, forgotten = bench.submit(400), bench.submit(5)
    with bench.dispatcher() as process:
        with pytest.raises(StoreError, match="a dispatcher leads"):
            until(lambda: reindex(bench.jobs.database, Home(bench.settings.home)) and False, 30)
        bench.steps(second, 5)
        bench.reaches(forgotten, JobState.SUCCEEDED)
        process.kill()
    bench.journal(forgotten).write_document("forgotten", {})
    create_job(JobSpec.model_validate(spec_document()), Home(bench.settings.home))  # of `espalier run`
    before = {job: vars(bench.row(job)) for job in (first, second)}

    restored = Bench(bench.settings.home, f"sqlite:///{copy}", lease_seconds=0.2)
    with pytest.raises(UnknownJob):
        restored.row(second)
    rebuilt = reindex(restored.jobs.database, Home(bench.settings.home))
    assert (rebuilt.brought_up_to_date, rebuilt.found_again) == ([first], [second])
    for job, known in before.items():
        row = restored.row(job)
        for field in ("owner", "name", "state", "epoch", "priority", "created", "devices", "desired", "request_hash"):
            assert getattr(row, field) == known[field], field
    worker = restored.pid(second)
    with restored.led():
        until(lambda: (restored.row(second).handle or {}).get("pid") == worker)  # adopted: nothing was started
        restored.jobs.ask(second, None, Wish("cancel"))
        assert restored.reaches(second, JobState.CANCELLED).epoch == 1


def test_the_store_is_lost_altogether(bench: Bench) -> None:
    job = bench.submit(10, priority=3, idempotency_key="k")
    with bench.led():
        bench.reaches(job, JobState.SUCCEEDED)
    fresh = Bench(bench.settings.home, f"sqlite:///{bench.settings.home}/new.db")
    reindex(fresh.jobs.database, Home(bench.settings.home))
    row = fresh.row(job)
    assert (row.owner, row.state, row.priority, row.idempotency_key, row.progress) == ("anna", "succeeded", 3, "k", 1.0)
    assert fresh.jobs.get(job, None, whole=True).spec == bench.jobs.get(job, None, whole=True).spec
