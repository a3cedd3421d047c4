"""Where a job is: at the service that is named, at the one that is up on the home, or in the home alone."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.jobs import JobError, find_job
from launcher.journal import Journal
from launcher.result import result_document
from services.api.documents import JobDocument
from services.client import Client, ServiceError
from services.commands import remote
from services.commands.terminal import api_key, home_at


@dataclass(frozen=True)
class Found:
    """A job and what it brought; ``journal`` where its directory can be read from here."""

    result: dict[str, Any]
    processes: list[dict[str, Any]]
    journal: Journal | None = None
    url: str | None = None
    waiting: str | None = None


def look(job: str, url: str | None, home: Path) -> Found:
    """What is known of a job. Raises ``JobError`` and what the client raises."""
    at = remote.service_url(url, home)
    if at is not None:
        with Client(at, api_key()) as client:
            known = _known(client, job, must=url is not None)
            if known is not None:
                return Found(_result(client, known), [], url=at, waiting=known.waiting)
    journal = find_job(home_at(home), job)
    processes = [
        {name: event.get(name) for name in ("role", "candidate", "rank", "pid", "node")}
        for event in journal.view().processes.values()
    ]
    return Found(result_document(journal), processes, journal=journal)


def with_service_rows(rows: Sequence[dict[str, Any]], url: str | None, home: Path) -> list[dict[str, Any]]:
    """The rows of a home's journals with what the service says of its jobs, oldest first."""
    at = remote.service_url(url, home)
    if at is None:
        return list(rows)
    with Client(at, api_key()) as client:
        told = {job.id: remote.job_row(job) for job in client.jobs(limit=200)}
    alone = [row for row in rows if row["job"] not in told]
    return sorted([*alone, *told.values()], key=lambda row: str(row["created"]))


def ask_service(job: str, url: str | None, home: Path, desired: Literal["pause", "cancel"]) -> str | None:
    """Ask the service that has the job; its id, or None where no service has it."""
    at = remote.service_url(url, home)
    if at is None:
        return None
    with Client(at, api_key()) as client:
        known = _known(client, job, must=url is not None)
        if known is None:
            return None
        return (client.pause(known.id) if desired == "pause" else client.cancel(known.id)).id


def _known(client: Client, job: str, must: bool) -> JobDocument | None:
    """The job at a service; None where it does not have it and the home may."""
    if must:
        return remote.find(client, job)
    with suppress(JobError):
        return remote.find(client, job)
    return None


def _result(client: Client, job: JobDocument) -> dict[str, Any]:
    try:
        return client.result(job.id)
    except ServiceError as error:
        if error.status != 404:
            raise
    # It waits for its turn: there is no more to tell.
    empty: dict[str, Any] = {"candidates": [], "variants": [], "mlflow_url": None, "directory": None}
    return {"job": job.id, "name": job.name, "state": job.state.value, "attempts": 0, "error": job.error, **empty}
