"""The tests of this folder need a Docker engine, which ``make test-compose`` installs; they start one of their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.engine import Engine, real_engine
from tests.compose.project import Project, bring_up
from tests.marking import mark_folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need it."""
    mark_folder(items, Path(__file__).parent, "compose", 2400)


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """With stand-ins for the images that our files begin with."""
    with real_engine() as found:
        yield found


@pytest.fixture(scope="session")
def project(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The service of docker-compose.yml, healthy, in a clone of the repository."""
    with bring_up(engine, tmp_path_factory.mktemp("clone") / "espalier") as found:
        yield found
