"""What every back-end does, on a real Slurm."""

from pathlib import Path

import pytest

from launcher.backends.slurm import SlurmBackend
from tests.launcher.conformance import (
    BackendContract,
    Place,
    make_place,
)
from tests.slurm.cluster import RealSlurm
from tests.slurm.jobs import SLURM


@pytest.fixture
def place(slurm: RealSlurm, tmp_path: Path) -> Place:
    """Two nodes for each job."""
    return make_place(lambda module: SlurmBackend(module, fresh_seconds=0.2), tmp_path, SLURM, seconds=180)


class TestSlurm(BackendContract):
    """On two real nodes."""
