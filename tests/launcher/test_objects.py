"""Whole jobs whose journals are in a real S3 server, which is killed and started again while they run."""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import attend, coordinator, pod
from launcher.backends.local import LocalBackend
from launcher.jobs import Home, collect_garbage, create_job, list_jobs, run_job
from launcher.journal import StaleEpochError, open_journal
from launcher.planning.validate import check
from launcher.policy import TEMPORARY_EXIT_CODE
from launcher.problems import SpecError
from launcher.states import JobState
from parallelism import places
from parallelism.objects import ObjectTree
from services.submission import make_request
from tests.finished import STEPS
from tests.launcher.faults import FaultPlan
from tests.launcher.outages import Outages, brought, spec_of, steps_told
from tests.object_store import ObjectStore, clients_of, forgetful_store, object_store
from tests.services.running import ROOT, until

FAULTY = "tests.launcher.faulty_coordinator"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """Up before each test."""
    with object_store() as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same job on a file system, in peace."""
    folder = tmp_path_factory.mktemp("undisturbed")
    home = Home(folder / "home")
    journal = create_job(spec_of(folder), home)
    assert run_job(home, journal.job_id, LocalBackend()) is JobState.SUCCEEDED
    return brought(journal)


@pytest.mark.campaign
def test_a_job_survives_a_store_that_is_killed_twice_while_it_trains(
    store: ObjectStore, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    home = Home(tmp_path / "home", store.url(tmp_path.name))
    journal = create_job(spec_of(tmp_path), home)
    journal.directory.mkdir(parents=True)
    FaultPlan(journal.directory, pace_seconds=0.3).write()
    outages = Outages(store, journal, sorted(random.Random(3).sample(range(4, STEPS - 6), 2)))
    outages.start()
    assert run_job(home, journal.job_id, LocalBackend(FAULTY)) is JobState.SUCCEEDED, journal.view().error
    outages.join(60)
    assert len(outages.at) == 2
    assert not list((tmp_path / "home" / "jobs").rglob("*.*"))  # nothing of it is left on this machine
    assert steps_told(journal, "large") == steps_told(journal, "small") == list(range(1, STEPS + 1))
    assert [event["number"] for event in journal.events()] == list(range(1, journal.last_event() + 1))
    assert brought(journal) == undisturbed
    places.leave(journal.directory)


def test_journals_there_are_found_listed_read_and_tidied_up(store: ObjectStore, tmp_path: Path) -> None:
    home = Home(tmp_path / "home", store.url(tmp_path.name))
    assert list_jobs(home) == []
    first, second = (create_job(spec_of(tmp_path), home) for _ in range(2))
    assert [job.job_id for job in list_jobs(home)] == [first.job_id, second.job_id]
    again = open_journal(first.location)
    assert again.spec() == first.spec()
    assert again.state() is JobState.SUBMITTED
    with pytest.raises(ValueError, match="already holds a job"):
        again.create(spec_of(tmp_path))
    first.claim_epoch()
    again.claim_epoch()
    with pytest.raises(StaleEpochError):
        first.append("told too late", {})
    second.claim_epoch()
    second.set_state(JobState.CANCELLED)
    name = second.job_id
    (found,) = collect_garbage(home, older_than_days=-1.0)
    assert (found.what, found.job_id) == ("job", name)
    assert [job.job_id for job in list_jobs(home)] == [first.job_id]
    assert not (tmp_path / "home").exists()  # nothing of it was needed on this machine


def test_what_is_half_written_down_is_completed(store: ObjectStore, tmp_path: Path) -> None:
    home = Home(tmp_path / "home", store.url(tmp_path.name))
    journal = home.journal("cut-off")
    journal.storage.put_exclusive("job.json", b'{"id": "cut-off", "created": 1.0}')
    assert not journal.exists
    assert list_jobs(home) == []
    journal.create(spec_of(tmp_path), "cut-off", {"plan": {"version": 1}})
    assert journal.exists
    assert [event["kind"] for event in journal.events()] == ["submitted"]
    assert journal.document("plan") == {"version": 1}


def test_a_back_end_that_needs_shared_files_is_refused_beforehand(store: ObjectStore, tmp_path: Path) -> None:
    from launcher.planning.clusters import cluster_of

    home = Home(tmp_path / "home", store.url(tmp_path.name))
    spec = spec_of(tmp_path)
    asked = spec.model_copy(update={"execution": spec.execution.model_copy(update={"backend": "slurm"})})
    with pytest.raises(SpecError, match="need files that they share") as told:
        check(asked, cluster_of(spec, home.root), home.path)
    assert "use kubernetes, local, ray" in str(told.value)


def test_a_store_that_cannot_hold_journals_is_refused_beforehand(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="ignores If-None-Match"):
        make_request(spec_of(tmp_path), Home(tmp_path / "home", forgetful_store()))


def test_a_store_that_stays_away_ends_the_attempt_and_not_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = tmp_path / "jobs"
    away = f"s3://jobs/away/job#{jobs}/job"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with clients_of(ObjectStore(tmp_path, [9])):  # nobody answers there
        places.mirror(jobs, ObjectTree("s3://jobs/away", patience_seconds=0.0))
        assert coordinator.main([away, "--address", "own"]) == TEMPORARY_EXIT_CODE
        assert pod.main(["run", away, "s", "true"]) == TEMPORARY_EXIT_CODE
        assert attend.main([away, "s", "sleep", "60"]) == TEMPORARY_EXIT_CODE


def test_pods_know_of_each_other_through_the_store_alone(store: ObjectStore, tmp_path: Path) -> None:
    home = Home(tmp_path / "home", store.url(tmp_path.name))
    journal = create_job(spec_of(tmp_path), home)
    stop = attend.stop_file(journal, "s")
    assert places.is_mirrored(stop)
    assert places.is_mirrored(pod.alive_file(stop))
    in_pod = [sys.executable, "-m", "launcher.pod"]
    patient = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); print('up'); "
    command = [*in_pod, "run", journal.location, "s", sys.executable, "-uc", patient + "time.sleep(60)"]
    log = journal.log_path("coordinator")
    with subprocess.Popen(command, cwd=ROOT) as head:
        until(lambda: log.exists() and "up" in log.read_text(encoding="utf-8"), 60)
        assert places.exists(pod.alive_file(stop))
        subprocess.run([*in_pod, "end", journal.location, "s", "30"], cwd=ROOT, timeout=60, check=True)
        assert head.wait(30) == 3
    assert not places.exists(pod.alive_file(stop))
    shutil.rmtree(journal.directory)  # the next pod is on another node
    again = [*in_pod, "run", journal.location, "s", "echo", "once more"]
    assert subprocess.run(again, cwd=ROOT, timeout=60, check=False).returncode == 0
    assert places.read_bytes(log) == b"up\nonce more\n"
    places.leave(journal.directory)
