"""The tests of this folder need a real Slurm, which ``make test-slurm`` installs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import RealSlurm, real_slurm

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of them carry the marker; the hook is given the items of the whole run."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def slurm() -> Iterator[RealSlurm]:
    """Two nodes of two processors each."""
    with real_slurm() as found:
        yield found
