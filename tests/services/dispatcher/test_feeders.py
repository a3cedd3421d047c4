"""Feeders of jobs that rest: all is told to MLflow, though nobody works on the job any more."""

import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from mlflow import MlflowClient

from launcher.jobs import Home, create_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from launcher.tracking.feed import JOB_TAG
from launcher.tracking.process import EXIT_REFUSED, default_uri
from services.dispatcher.feeders import Feeders
from tests.launcher.made import spec_document
from tests.services.running import until


def test_a_job_that_came_to_rest_untold_is_told(tmp_path: Path, empty_store: Path) -> None:
    home, uri = Home(tmp_path), default_uri(tmp_path)
    (tmp_path / "mlflow").mkdir()
    shutil.copyfile(empty_store, tmp_path / "mlflow" / "mlflow.db")
    journal = create_job(JobSpec.model_validate(spec_document()), home)
    journal.claim_epoch()
    for state in (JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED):
        journal.set_state(state)
    feeders = Feeders(home, None)
    told: set[str] = set()
    until(lambda: told.update(feeders.tend(set(), {journal.job_id} - told)) or told)
    feeders.close(10)
    assert told == {journal.job_id}
    client = MlflowClient(uri)
    (experiment,) = client.search_experiments(filter_string="name != 'Default'")
    runs = client.search_runs([experiment.experiment_id], f"tags.`{JOB_TAG}` = '{journal.job_id}'")
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_feeder_that_died_is_followed_by_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = create_job(JobSpec.model_validate(spec_document()), Home(tmp_path))
    feeders, active = Feeders(Home(tmp_path), "http://127.0.0.1:9"), {journal.job_id}
    feeders.tend(active, active)
    first = feeders._running[journal.job_id]
    first._process.kill()
    monkeypatch.setattr("services.dispatcher.feeders.AGAIN_SECONDS", 0.0)
    until(lambda: feeders.tend(active, active) or feeders._running.get(journal.job_id, first) is not first)
    feeders.close(0.0)


def test_a_feeder_that_cannot_start_holds_up_nothing(tmp_path: Path) -> None:
    journal = create_job(JobSpec.model_validate(spec_document()), Home(tmp_path))
    journal.logs_dir.write_text("in the way", encoding="utf-8")
    feeders = Feeders(Home(tmp_path), None)
    assert feeders.tend({journal.job_id}, {journal.job_id}) == set()
    assert feeders._running == {}
    feeders.close(0.0)


class Refused:
    """A feeder to whom MLflow has said no."""

    ended = True
    started: ClassVar[list[bool]] = []

    def __init__(self, journal: Journal, home: Path, uri: str | None, once: bool) -> None:
        self.started.append(once)

    def close(self, seconds: float) -> int:
        return EXIT_REFUSED


def test_what_is_refused_of_a_job_at_work_is_tried_again_but_not_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.dispatcher.feeders.FeederProcess", Refused)
    journal = create_job(JobSpec.model_validate(spec_document()), Home(tmp_path))
    feeders, job = Feeders(Home(tmp_path), None), {journal.job_id}
    until(lambda: feeders.tend(job, job) or journal.job_id in feeders._not_before)
    assert all(feeders.tend(job, job) == set() for _ in range(5))
    assert Refused.started == [False]
    feeders._not_before.clear()
    told: set[str] = set()
    until(lambda: told.update(feeders.tend(set(), job - told)) or told)  # at rest, that was the last word
    assert Refused.started == [False, True]
    feeders.close(0.0)
