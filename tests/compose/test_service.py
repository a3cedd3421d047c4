"""docker-compose.yml on a real engine: jobs over REST, through PostgreSQL, Ray's containers and the object store."""

import hashlib
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from services.client import Client
from tests.compose.project import MLFLOW, SERVICES, Project

JOB_SECONDS = 600.0
SIZE_LIMITS = {"espalier-api:0.1.0": 1.2e9, "espalier-worker:0.1.0": 4.5e9}


def job(name: str, tokens: int, layout: dict[str, int] | None = None) -> dict[str, Any]:
    """A small model and one variant."""
    candidate = {
        "name": "small",
        "model": {"family": "gpt", "layers": 2, "hidden": 32, "heads": 2},
        "layout": layout or {},
        "training": {"global_batch": 8, "micro_batch": 4, "learning_rate": 0.001},
    }
    return {
        "name": name,
        "seed": 3,
        "data": {"train": ["builtin:python-stdlib"], "tokenizer": {"kind": "bytes"}, "sequence_length": 64},
        "budget": {"tokens": tokens},
        "candidates": [candidate],
        "compression": {"prune": {"methods": ["magnitude"], "sparsity": [0.5]}},
        "evaluation": {"tokens": 1024},
        "execution": {"checkpoint_every": {"steps": 10}},
    }


def await_end(project: Project, client: Client, job_id: str) -> Any:
    """The job at rest."""
    project.until(lambda: client.job(job_id).state in ("succeeded", "failed", "cancelled"), JOB_SECONDS)
    found = client.job(job_id)
    assert found.state == "succeeded", f"{found}\n{project.logs()}"
    return found


def weights(client: Client, job_id: str) -> dict[str, str]:
    """SHA-256 of every file of tensors of every variant, by name."""
    found = {}
    for row in client.result(job_id)["variants"]:
        with tempfile.TemporaryDirectory() as folder:
            for path in client.download(job_id, row["name"], Path(folder)):
                if path.suffix == ".safetensors":
                    found[f"{row['name']}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def finished(project: Project) -> tuple[Any, dict[str, str]]:
    """A job that nothing disturbed, at tensor 2 over the worker's two CPUs, and its weights."""
    client = project.client()
    found = await_end(project, client, client.submit(job("undisturbed", 40_000, {"tensor": 2})).id)
    return found, weights(client, found.id)


def test_a_job_runs_through_it_and_mlflow_shows_it(project: Project, finished: tuple[Any, dict[str, str]]) -> None:
    found, files = finished
    assert files
    query = json.dumps({"experiment_ids": ["1"], "filter": f"tags.`espalier.job` = '{found.id}'"}).encode()
    request = urllib.request.Request(
        f"{MLFLOW}/api/2.0/mlflow/runs/search", data=query, headers={"Content-Type": "application/json"}
    )

    def shown() -> bool:
        with urllib.request.urlopen(request, timeout=10) as answer:
            runs = json.load(answer).get("runs", [])
        return bool(runs) and all(run["info"]["status"] == "FINISHED" for run in runs)

    project.until(shown, 120)


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "postgres"])
def test_a_part_killed_in_the_middle_costs_nothing(
    project: Project, finished: tuple[Any, dict[str, str]], service: str
) -> None:
    client = project.client()
    job_id = client.submit(job(f"kill-{service}", 40_000, {"tensor": 2})).id
    project.until(lambda: any((row.step or 0) > 12 for row in client.job(job_id).candidates), JOB_SECONDS)
    project.kill(service)
    project.until(lambda: service in project.states() and project.states()[service]["Status"] == "running", 120)
    project.until(lambda: _answers(client), 120)
    await_end(project, client, job_id)
    assert weights(client, job_id) == finished[1]


def _answers(client: Client) -> bool:
    try:
        client.ready()
    except OSError:
        return False
    return True


def test_down_and_up_keep_everything(project: Project, finished: tuple[Any, dict[str, str]]) -> None:
    found, files = finished
    project.compose("down", "--timeout", "30")
    project.up()
    client = project.client()
    assert client.job(found.id).state == "succeeded"
    assert weights(client, found.id) == files


def test_the_images_are_as_small_as_the_docs_say(project: Project) -> None:
    for image, limit in SIZE_LIMITS.items():
        assert project.engine.size_bytes(image) < limit
