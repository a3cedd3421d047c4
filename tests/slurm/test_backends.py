"""What every back-end does, on a real Slurm."""

from pathlib import Path

import pytest

from launcher.backends.slurm import SlurmBackend
from tests.launcher.conformance import (
    Place,
    make_place,
    test_a_coordinator_that_does_not_come_up_is_told_with_its_last_words,
    test_a_submission_is_found_and_followed_by_another_process,
    test_a_submission_runs_to_its_end_and_tells_how,
    test_stopping_at_once_leaves_nothing_running,
    test_stopping_with_grace_lets_the_coordinator_write_down_where_it_is,
)
from tests.slurm.cluster import RealSlurm
from tests.slurm.jobs import SLURM

__all__ = [
    "test_a_coordinator_that_does_not_come_up_is_told_with_its_last_words",
    "test_a_submission_is_found_and_followed_by_another_process",
    "test_a_submission_runs_to_its_end_and_tells_how",
    "test_stopping_at_once_leaves_nothing_running",
    "test_stopping_with_grace_lets_the_coordinator_write_down_where_it_is",
]


@pytest.fixture
def place(slurm: RealSlurm, tmp_path: Path) -> Place:
    """Two nodes for each job."""
    return make_place(lambda module: SlurmBackend(module, fresh_seconds=0.2), tmp_path, SLURM, seconds=180)
