"""The commands that work through the REST API. They hold no state: what they show, the service has told."""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compression.recipe import grid
from launcher.jobs import JobError
from launcher.spec import JobSpec
from launcher.states import RESTING, JobState
from launcher.view import JobView
from services.api.documents import JobDocument, JobWithSpec
from services.client import Client, ServiceError
from services.foreground import REFRESH_SECONDS
from services.place import running_url
from services.progress import Display

CONTROL = {code: None for code in range(32) if chr(code) not in "\n\t"}
"""Terminals obey some of these; a log that holds them is not to."""


def service_url(url: str | None, home: Path) -> str | None:
    """The service that a command is meant for: the one that is named, or the one that is up on the home."""
    return url or running_url(home)


@contextmanager
def service(url: str | None, key: str | None, home: Path) -> Iterator[Client]:
    """A client of the service that is meant. Raises :class:`JobError` where there is none."""
    found = service_url(url, home)
    if found is None:
        raise JobError(f"no service is up on {home}: start one with: espalier up, or name one in ESPALIER_URL")
    with Client(found, key) as client:
        yield client


def find(client: Client, name: str) -> JobDocument:
    """The job whose id is or begins with ``name``, or the newest for ``last``. Raises :class:`JobError`."""
    if name == "last":
        newest = next(client.jobs(limit=1), None)
        if newest is None:
            raise JobError(f"there are no jobs at {client.url}")
        return newest
    with contextlib.suppress(ServiceError):
        return client.job(name)
    matches = [job for job in client.jobs(limit=200) if job.id.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    problem = "is not unique" if matches else "is unknown"
    known = ", ".join(job.id for job in matches[:5])
    raise JobError(f"job {name!r} {problem} at {client.url}" + (f": name one of {known}" if known else ""))


def absolute_paths(spec: JobSpec) -> JobSpec:
    """The spec with paths that mean the same wherever they are read: relative ones start here."""
    data = spec.data
    changes: dict[str, Any] = {"train": [_absolute(path) for path in data.train]}
    if isinstance(data.validation, list):
        changes["validation"] = [_absolute(path) for path in data.validation]
    if data.tokenizer.path:
        changes["tokenizer"] = data.tokenizer.model_copy(update={"path": _absolute(data.tokenizer.path)})
    candidates = [
        one.model_copy(update={"source": _absolute(one.source)}) if one.source else one for one in spec.candidates
    ]
    return spec.model_copy(update={"data": data.model_copy(update=changes), "candidates": candidates})


def _absolute(path: str) -> str:
    if ":" in path.partition("/")[0] or path.startswith("/"):
        return path  # builtin:NAME and URLs
    return str(Path(path).expanduser().absolute())


class Interrupted(Exception):
    """Whoever watches a job has had enough; the job goes on."""


def watch(client: Client, job: JobWithSpec, display: Display) -> JobState:
    """Show a job until it rests, from its events; a service that goes away and comes back is waited for."""
    view, shown = JobView(), 0.0
    away = False
    with display:
        for event in client.watch(job.id):
            if event is None:
                away = _tell_away(client, display, away)
                continue
            away = False
            view.apply(event)
            if time.monotonic() >= shown + REFRESH_SECONDS:
                display.update(view)
                shown = time.monotonic()
        display.update(view)
    return view.state


def _tell_away(client: Client, display: Display, told: bool) -> bool:
    try:
        client.job("none")
    except ServiceError:
        return False
    except OSError:
        if not told:
            display.say("the service is away; the job goes on, and so does this once it is back")
        return True
    return False


def expected_variants(job: JobWithSpec) -> tuple[list[str], int]:
    """Names of the candidates that are trained, and how many variants there will be."""
    spec = JobSpec.model_validate(job.spec)
    return [one.name for one in spec.trained], len(spec.candidates) * len(grid(spec.compression))


def print_log(pieces: Iterator[str]) -> None:
    """Write a log to stdout without what a terminal would obey."""
    for piece in pieces:
        sys.stdout.write(piece.translate(CONTROL))
        sys.stdout.flush()


def job_row(job: JobDocument) -> dict[str, Any]:
    """One line of the list."""
    return {
        "job": job.id,
        "name": job.name,
        "state": job.state.value,
        "attempts": job.attempt,
        "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(job.created)),
        "running": job.state not in RESTING and job.state is not JobState.SUBMITTED,
        "progress": job.progress,
        "waiting": job.waiting,
    }
