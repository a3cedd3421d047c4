"""docker-compose.yml on a real engine: jobs over REST, through PostgreSQL, Ray's containers and the object store."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.compose.campaign import FIGURES, kill_each, write_figures
from tests.compose.engine import PYTHON_IMAGE, Engine
from tests.compose.jobs import await_success, job, mlflow_runs, mlflow_steps, outcome, upload_text
from tests.compose.project import SERVICES, Project

STEPS = 1500
"""So many that training still goes on after all kills, also where nothing else slows this machine."""
USER = "10001"
SIZE_LIMITS = {"espalier-api:0.1.0": 0.6e9, "espalier-worker:0.1.0": 2.6e9}
"""Bytes beyond those of the image that they begin with."""
BLOWS = (
    ("ray-head",),
    ("ray-worker",),
    ("ray-head", "dispatcher"),
    ("api",),
    ("dispatcher",),
    ("object-store",),
    ("mlflow",),
    ("postgres",),
)
FIND_TORCH = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"


@dataclass(frozen=True)
class Finished:
    """A job that nothing disturbed."""

    id: str
    outcome: dict[str, Any]


@pytest.fixture(scope="module")
def finished(project: Project) -> Finished:
    """Run one."""
    upload_text(project)
    client = project.client()
    job_id = client.submit(job("undisturbed", STEPS)).id
    await_success(project, job_id)
    return Finished(job_id, outcome(client, job_id))


def test_the_images_are_as_small_as_the_docs_say(project: Project, engine: Engine) -> None:
    for image, limit in SIZE_LIMITS.items():
        assert engine.size_bytes(image) - engine.size_bytes(PYTHON_IMAGE) < limit, image


def test_nothing_of_ours_runs_as_root_and_sources_stay_behind(project: Project) -> None:
    for service in ("api", "dispatcher", "mlflow", "ray-head", "ray-worker"):
        assert project.inside(service, "id", "-u").strip() == USER, service
        assert project.inside(service, "sh", "-c", "test -e /src || echo none").strip() == "none", service


def test_the_image_of_the_api_has_no_torch(project: Project) -> None:
    assert project.inside("ray-worker", "sh", "-c", f'python -c "{FIND_TORCH}"; echo $?').strip() == "0"
    assert project.inside("api", "sh", "-c", f'python -c "{FIND_TORCH}"; echo $?').strip() == "1"


def test_a_job_runs_through_it_and_mlflow_shows_it(project: Project, finished: Finished) -> None:
    assert sum("safetensors" in name for name in finished.outcome) == 5
    assert project.client().result(finished.id)["mlflow_url"].startswith("http://localhost:5000/#/")
    _shown_in_mlflow(project, finished.id)


def test_the_database_and_the_object_store_hold_it(project: Project, finished: Finished) -> None:
    assert _select(project, "espalier", f"select state from jobs where id = '{finished.id}'") == "succeeded"
    runs = mlflow_runs(finished.id)
    assert _select(project, "mlflow", "select count(*) from runs where status = 'FINISHED'") == str(len(runs))
    artifacts = project.inside("object-store", "find", "/data/mlflow", "-name", "result.json*")
    assert all(run["info"]["artifact_uri"].startswith("mlflow-artifacts:") for run in runs)
    assert any(run["info"]["run_id"] in artifacts for run in runs)


def test_containers_killed_in_the_middle_of_training_cost_nothing(project: Project, finished: Finished) -> None:
    assert {name for blow in BLOWS for name in blow} == set(SERVICES)
    client = project.client()
    job_id = client.submit(job("killed", STEPS)).id
    kills = list(kill_each(project, job_id, BLOWS))
    await_success(project, job_id)
    found = outcome(client, job_id)
    (candidate,) = client.job(job_id).candidates
    if FIGURES in os.environ:
        write_figures(Path(os.environ[FIGURES]), kills, candidate.restarts, found, finished.outcome)
    assert found == finished.outcome
    # How often its ranks were started again depends on what they were at when a blow fell; each began where one ended.
    ended = [event["reason"] for event in client.events(job_id) if event["kind"] == "restart"]
    assert ended.count("coordinator lost") >= sum("ray-head" in blow for blow in BLOWS), f"{ended} {kills}"
    _shown_in_mlflow(project, job_id)


def test_down_and_up_keep_everything(project: Project, finished: Finished) -> None:
    before = {row.id: row.state for row in project.client().jobs()}
    project.compose("down", "--timeout", "30")
    assert not project.states()
    project.up()
    client = project.client()
    assert {row.id: row.state for row in client.jobs()} == before
    assert outcome(client, finished.id) == finished.outcome
    _shown_in_mlflow(project, finished.id)
    await_success(project, client.submit(job("afterwards", 20)).id)


def _shown_in_mlflow(project: Project, job_id: str) -> None:
    """MLflow has every run of a job, and every step of the candidate's once."""
    variants = {row["name"] for row in project.client().result(job_id)["variants"]}

    def shown() -> bool:
        runs = [run["info"] for run in mlflow_runs(job_id)]
        return len(runs) == 2 + len(variants) and all(run["status"] == "FINISHED" for run in runs)

    project.until(shown, 120)
    assert variants < {run["info"]["run_name"] for run in mlflow_runs(job_id)}
    assert mlflow_steps(job_id) == list(range(1, STEPS + 1))


def _select(project: Project, database: str, query: str) -> str:
    """What PostgreSQL answers."""
    command = 'PGPASSWORD=$(cat $POSTGRES_PASSWORD_FILE) psql --host 127.0.0.1 --username espalier -At "$0" -c "$1"'
    return project.inside("postgres", "sh", "-c", command, database, query).strip()
