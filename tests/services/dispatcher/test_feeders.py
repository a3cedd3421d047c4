"""Feeders of jobs that rest: all is told to MLflow, though nobody works on the job any more."""

import shutil
from pathlib import Path

from mlflow import MlflowClient

from launcher.jobs import Home, create_job
from launcher.spec import JobSpec
from launcher.states import JobState
from launcher.tracking.feed import JOB_TAG
from launcher.tracking.process import default_uri
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
