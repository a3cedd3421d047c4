"""``espalier run --continue`` on a job of the service: the service goes on with it, or it is refused with a remedy."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.jobs import Home, JobError
from launcher.journal import Journal
from launcher.problems import SpecError
from launcher.spec import JobSpec
from launcher.states import JobState
from services.client import Client
from services.commands.continuing import continued, refuse_another_job
from tests.services.running import until
from tests.services.small import Small

ENDLESS = 100_000


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    made = Small(tmp_path)
    with made.dispatching(), made.serving():
        yield made
    made.database.close()


def done(journal: Journal) -> list[tuple[int, int]]:
    """Step and epoch of everything that a coordinator did."""
    log = journal.logs_dir / "coordinator.log"
    text = log.read_text() if log.exists() else ""
    return [(int(step), int(epoch)) for step, epoch in re.findall(r"step (\d+) of epoch (\d+)", text)]


def test_a_job_of_the_service_is_continued_by_the_service(small: Small) -> None:
    home, place = Home(small.settings.home), small.announce()
    with Client(small.url) as client:
        job = client.submit(small.spec | {"seed": ENDLESS}).id
        journal = home.journal(job)
        until(lambda: client.job(job).state is JobState.RUNNING and len(done(journal)) > 5)
        with pytest.raises(JobError, match=f"watch it with: espalier watch {job}"):
            continued(journal, home, None)
        client.pause(job)
        assert client.wait(job, 60).state is JobState.PAUSED
        paused_at = len(done(journal))
        with pytest.raises(JobError, match="leave --mlflow out"):
            continued(journal, home, "http://127.0.0.1:5000")

        work = continued(journal, home, None)
        assert work.pause is not None
        with ThreadPoolExecutor(1) as threads:
            supervision = threads.submit(work.supervise)
            until(lambda: len(done(journal)) > paused_at + 5)
            assert not supervision.done()
            work.pause()  # what Ctrl-C does
            supervision.result(60)
        known = client.job(job)
        assert (known.state, known.desired, known.attempt) == (JobState.PAUSED, "pause", 2)
        steps = done(journal)
        assert [step for step, _ in steps] == list(range(1, len(steps) + 1))
        assert {epoch for _, epoch in steps} == {1, 2}

        refuse_another_job(JobSpec.model_validate(client.job(job).spec), journal)
        with pytest.raises(SpecError, match="the job was started with"):
            refuse_another_job(JobSpec.model_validate(small.spec), journal)

        place.unlink()
        with pytest.raises(JobError, match=f"which is down: start it with: espalier up --home {home.root} "):
            continued(journal, home, None)
        small.announce()
        client.cancel(job)
        assert client.wait(job, 60).state is JobState.CANCELLED
        with pytest.raises(JobError, match="nothing to continue"):
            continued(journal, home, None)
