"""What takes long to make and is looked at by tests of several rooms, made once, and imported only then."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.finished import FinishedJob


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "FinishedJob":
    """A small job of two candidates, run to its end in peace."""
    from tests.finished import finish_job

    return finish_job(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs; making one takes seconds, copying it nothing."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
