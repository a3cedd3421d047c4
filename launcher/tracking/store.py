"""MLflow as a store of runs: where a home's own one lies, its limits, its many ways to fail. Torch-free."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.tracking.records import Changes

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

SQLITE = "sqlite:///"
UI_PORT = 5000
"""Where ``espalier ui`` serves a home's own store, unless the port is taken."""

# MLflow's limits for one request, and for the length of one value.
METRICS_PER_BATCH, PARAMS_PER_BATCH, TAGS_PER_BATCH = 1000, 100, 100
PARAM_LENGTH, TAG_LENGTH = 6000, 8000

# Refused for what the request says: trying again would end the same way. Everything else may pass.
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"})


class TrackingUnavailableError(RuntimeError):
    """The MLflow server cannot be reached or answers with an error of its own."""


class TrackingRefusedError(RuntimeError):
    """The MLflow server refuses what it was told."""


def default_uri(home: Path) -> str:
    """The MLflow store that belongs to a home: a SQLite file."""
    return f"{SQLITE}{home.absolute()}/mlflow/mlflow.db"


def artifacts_beside(uri: str) -> Path | None:
    """Where the artifacts of a SQLite store lie; None for a server, which decides itself."""
    return Path(uri.removeprefix(SQLITE)).parent / "artifacts" if uri.startswith(SQLITE) else None


def page_url(uri: str, experiment_id: str | None = None, run_id: str | None = None) -> str:
    """Where people look at a run, or at all experiments; of a store without a server, where ``espalier ui`` is.

    MLflow's pages open as those for language-model applications unless they are told otherwise.
    """
    base = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{UI_PORT}"
    place = f"/{experiment_id}/runs/{run_id}" if run_id else ""
    return f"{base}/#/experiments{place}?workflowType=machine_learning"


def connect(uri: str) -> "MlflowClient":
    """A client that fails quickly: the feeder does the waiting."""
    # MLflow reads these from the environment and nowhere else; this process is the feeder's own.
    os.environ |= {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    from mlflow import MlflowClient

    artifacts = artifacts_beside(uri)
    if artifacts:
        artifacts.mkdir(parents=True, exist_ok=True)
    with calls():
        make_store(uri)
        return MlflowClient(uri)


def make_store(uri: str) -> None:
    """Have a SQLite store's tables made before anybody opens it: by one process, and at once or not at all.

    MLflow makes them step by step in the file itself. Two processes at it spoil each other's work, and one that is
    killed at it leaves a store that no other can open.
    """
    path = Path(uri.removeprefix(SQLITE))
    if not uri.startswith(SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _make_store(path)


def _make_store(path: Path) -> None:
    from mlflow import MlflowClient

    draft, copy = path.with_suffix(".draft"), path.with_suffix(".copy")
    for left in (draft, copy):
        left.unlink(missing_ok=True)
    MlflowClient(f"{SQLITE}{draft}").search_experiments()
    # MLflow keeps the draft open; nobody has the copy open when it becomes the store.
    with closing(sqlite3.connect(draft)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    os.replace(copy, path)
    draft.unlink()


@contextmanager
def calls() -> Iterator[None]:
    """Around calls to MLflow: sorts its many ways to fail into refused and unavailable."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        kind = TrackingRefusedError if error.error_code in REFUSALS else TrackingUnavailableError
        raise kind(str(error).partition("\n")[0][:300]) from error
    except (requests.RequestException, SQLAlchemyError, OSError) as error:
        raise TrackingUnavailableError(str(error).partition("\n")[0][:300]) from error


@dataclass
class Batch:
    """One request."""

    metrics: "list[Metric]" = field(default_factory=list)
    params: "list[Param]" = field(default_factory=list)
    tags: "list[RunTag]" = field(default_factory=list)


def batches(changes: Changes) -> Iterator[Batch]:
    """Requests within MLflow's limits: first parameters and tags, then metrics in the order of their steps."""
    from mlflow.entities import Metric, Param, RunTag

    params = [Param(key, value[:PARAM_LENGTH]) for key, value in changes.params.items()]
    tags = [RunTag(key, value[:TAG_LENGTH]) for key, value in changes.tags.items()]
    metrics = [Metric(point.key, point.value, point.milliseconds, point.step) for point in changes.metrics]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        yield Batch(params=params[start : start + PARAMS_PER_BATCH])
    for start in range(0, len(tags), TAGS_PER_BATCH):
        yield Batch(tags=tags[start : start + TAGS_PER_BATCH])
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        yield Batch(metrics=metrics[start : start + METRICS_PER_BATCH])
