"""The tests of this folder need a real Slurm, which ``make test-slurm`` installs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.marking import mark_folder
from tests.slurm.cluster import RealSlurm, real_slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them need it."""
    mark_folder(items, Path(__file__).parent, "slurm", 900)


@pytest.fixture(scope="session")
def slurm() -> Iterator[RealSlurm]:
    """Two nodes of two processors each."""
    with real_slurm() as found:
        yield found
