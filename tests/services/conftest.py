"""A small job that is run once from the command line, to the end; many tests look at what it left."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.states import JobState
from services.store.database import Database
from tests.services.running import ROOT, Running, command, text_files, tiny_job, up
from tests.services.stores import new_database, postgres_server

RUN_SECONDS = 600


def small_job(folder: Path) -> dict[str, Any]:
    """Two candidates, one of them tensor-parallel, on text made here; three recipes each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        words = " ".join(f"{'even' if i % 2 == 0 else 'odd'} number {i * number} follows {i}," for i in range(60))
        (folder / f"{number:02d}.txt").write_text(words, encoding="utf-8")
    training = {"global_batch": 8, "micro_batch": 4}
    return {
        "name": "tiny",
        "data": {
            "train": [str(folder / "*.txt")],
            "validation": 0.1,
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 64,
        },
        "budget": {"tokens": 12_000},
        "candidates": [
            {
                "name": "small",
                "model": {"family": "gpt", "layers": 1, "hidden": 32, "heads": 2},
                "layout": {},
                "training": training,
            },
            {
                "name": "large",
                "model": {"family": "gpt", "layers": 2, "hidden": 64, "heads": 4},
                "layout": {"tensor": 2},
                "training": training,
            },
        ],
        "compression": {
            "prune": {"methods": ["magnitude"], "sparsity": [0.5]},
            "quantize": {"methods": ["rtn"], "bits": [4], "group_size": 16},
        },
        "evaluation": {"tokens": 2048},
        "execution": {"devices": 2},
    }


def espalier(*arguments: str | Path, timeout: float = 120, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    environment = {name: value for name, value in os.environ.items() if name != "ESPALIER_HOME"} | {"COLUMNS": "160"}
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment, check=False
    )


@dataclass(frozen=True)
class FinishedJob:
    """What ``espalier run --json`` left and said."""

    home: Path
    job_file: Path
    spec: dict[str, Any]
    ended: subprocess.CompletedProcess[str]

    @property
    def result(self) -> dict[str, Any]:
        """The document on stdout."""
        return json.loads(self.ended.stdout)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> FinishedJob:
    """The small job, run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    spec = small_job(folder / "text")
    job_file = folder / "tiny.yaml"
    job_file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    home = folder / "home"
    ended = espalier("run", job_file, "--home", home, "--json", timeout=RUN_SECONDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return FinishedJob(home, job_file, spec, ended)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A PostgreSQL server for the whole run."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty job store: every test that asks for it runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A store with its tables."""
    made = Database(database_url)
    made.migrate()
    yield made
    made.close()


@dataclass(frozen=True)
class Done:
    """A service with one finished job."""

    service: Running
    job: str
    events: list[dict[str, Any]]


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A small job, run to its end by a service that stays up."""
    folder = tmp_path_factory.mktemp("service")
    spec = tiny_job(text_files(folder / "text"))
    with up(folder / "home", "--mlflow", "none") as service, service.client() as client:
        job = client.submit(spec).id
        events = [event for event in client.watch(job) if event is not None]
        assert client.wait(job, RUN_SECONDS).state is JobState.SUCCEEDED, client.log(job)
        yield Done(service, job, events)
