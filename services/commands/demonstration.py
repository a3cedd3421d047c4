"""The demo goes the way of every job: through a service of its own, over the REST API."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launcher.jobs import Home
from launcher.journal import Journal
from launcher.spec import JobSpec
from services.client import Client
from services.commands.continuing import at_service
from services.commands.terminal import api_key, home_at
from services.foreground import Work
from services.place import running_url
from services.settings import load_settings

if TYPE_CHECKING:
    from services.up import Embedded

DISPATCH_SECONDS = 60.0


@contextmanager
def demo_job(spec: JobSpec, home: Path, tracking: str | None, console: Console) -> Iterator[tuple[Journal, Work]]:
    """The job's journal, and what keeps it going, inside the block.

    On the service that is up on the home, or on one that is up for the demo alone. MLflow is fed, but not served.
    """
    url = running_url(home)
    if url is not None:
        console.print(f"the service at {url} runs the demo", markup=False)
        yield _hand_in(spec, Client(url, api_key()), home_at(home), None)
        return
    from services.up import embedded  # the job store is not for every command to load

    settings = load_settings(home, mlflow=tracking)
    with embedded(settings, 0, lambda line: console.print(line, markup=False), serve_mlflow=False) as service:
        yield _hand_in(spec, Client(service.url, api_key()), home_at(home), service)


def _hand_in(spec: JobSpec, client: Client, home: Home, service: "Embedded | None") -> tuple[Journal, Work]:
    job_id = client.submit(spec).id
    journal, deadline = home.journal(job_id), time.monotonic() + DISPATCH_SECONDS
    while not journal.exists:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job_id} was not dispatched within {DISPATCH_SECONDS:g} s")
        time.sleep(0.1)
    return journal, at_service(client, job_id, home, service.tend if service else _nothing)


def _nothing() -> None:
    """A service that somebody else brought up tends itself."""
