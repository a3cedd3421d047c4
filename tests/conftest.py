"""What takes long to make and is looked at by tests of several rooms, made once, and imported only then."""

import fcntl
import os
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.finished import FinishedJob


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> "FinishedJob":
    """A small job of two candidates, run to its end in peace; once for all workers of the run."""
    from tests.finished import finish_job

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made.pickle"
        if not made.exists():
            made.write_bytes(pickle.dumps(finish_job(folder)))
        job: FinishedJob = pickle.loads(made.read_bytes())
        return job


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store without runs; making one takes seconds, copying it nothing."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path
