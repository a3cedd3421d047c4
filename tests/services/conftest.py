"""Job stores, and a service that has run a small job; many tests look at what it left."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.states import JobState
from services.store.database import Database
from tests.finished import RUN_SECONDS
from tests.services.running import Running, text_files, tiny_job, up
from tests.services.stores import new_database, postgres_server


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
