"""Continuing a job that rests: by this process, or by the service that the job belongs to."""

import time
from collections.abc import Callable

from launcher.jobs import Home, JobError, run_job, stop_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import FINAL
from services.client import Client, ServiceUnreachable
from services.commands.remote import absolute_paths
from services.commands.terminal import DEFAULT_HOME, api_key
from services.foreground import Work
from services.place import running_url
from services.store.records import FORGOTTEN, RECORD
from services.submission import refuse_another_spec

POLL_SECONDS, AWAY_SECONDS = 0.3, 60.0


def belongs_to_service(journal: Journal) -> bool:
    """Whether a service's store has the job: what is wanted of it is written there, and not by others."""
    return journal.document(RECORD) is not None and journal.document(FORGOTTEN) is None


def refuse_another_job(given: JobSpec, journal: Journal) -> None:
    """A job file beside the job has to be its own; a service has made its paths absolute. Raises ``SpecError``."""
    refuse_another_spec(absolute_paths(given) if belongs_to_service(journal) else given, journal.spec())


def continued(journal: Journal, home: Home, tracking: str | None) -> Work:
    """What keeps a job going that is continued. Raises :class:`JobError` and what the client raises."""
    if belongs_to_service(journal):
        return at_service(_resumed(journal.job_id, home, tracking), journal.job_id, home)
    return supervised(journal, home, tracking)


def supervised(journal: Journal, home: Home, tracking: str | None) -> Work:
    """A job that this process keeps going by itself."""
    job_id = journal.job_id
    return Work(lambda: run_job(home, job_id, tracking=tracking), lambda: stop_job(home, job_id))


def at_service(client: Client, job_id: str, home: Home, tend: Callable[[], None] = lambda: None) -> Work:
    """A job that a service on the home keeps going; ``tend`` is called a few times a second.

    An API that dies is waited for until it is up again, but not for ever.
    """

    def supervise() -> None:
        answered = time.monotonic()
        while True:
            try:
                if not client.job(job_id).active:
                    return
                answered = time.monotonic()
            except ServiceUnreachable:
                if time.monotonic() > answered + AWAY_SECONDS:
                    raise
            tend()
            time.sleep(POLL_SECONDS)

    return Work(supervise, lambda: stop_job(home, job_id), lambda: client.pause(job_id))


def _resumed(job_id: str, home: Home, tracking: str | None) -> Client:
    """The service that lets the job go on from here."""
    url = running_url(home.root)
    if url is None:
        raise JobError(
            f"job {job_id} belongs to the service on {home.root}, which is down: start it with: espalier up{_at(home)} "
            f"(a job that it interrupted goes on then; for others: espalier resume {job_id})"
        )
    if tracking is not None:
        raise JobError(f"job {job_id} belongs to the service at {url}, which feeds MLflow for it: leave --mlflow out")
    client = Client(url, api_key())
    job = client.job(job_id)
    if job.active:
        raise JobError(f"job {job_id} is {job.state} at the service at {url}: watch it with: espalier watch {job_id}")
    if job.state in FINAL:
        raise JobError(f"job {job_id} is {job.state}: there is nothing to continue; submit it anew")
    client.resume(job_id)
    return client


def _at(home: Home) -> str:
    return "" if home.root == Home(DEFAULT_HOME).root else f" --home {home.root}"
