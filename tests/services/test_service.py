"""A real job through the service: handed in over HTTP, dispatched, trained, compressed, and fetched."""

import json
from pathlib import Path

import pytest

from launcher.states import JobState
from services.client import ServiceError
from tests.finished import RUN_SECONDS, espalier
from tests.services.conftest import Done
from tests.services.running import tiny_job

pytestmark = pytest.mark.timeout(2 * RUN_SECONDS)


def test_every_event_is_told_once_and_in_order(done: Done) -> None:
    numbers = [event["number"] for event in done.events]
    assert numbers == list(range(1, len(numbers) + 1))
    states = [event["state"] for event in done.events if event["kind"] == "state"]
    assert states == ["starting", "running", "succeeded"]


def test_job_says_what_it_did(done: Done) -> None:
    with done.service.client() as client:
        job = client.job(done.job)
    assert (job.progress, job.attempt, job.error) == (1.0, 1, None)
    (candidate,) = job.candidates
    assert candidate.budget.unit == "tokens"
    assert candidate.budget.spent + candidate.budget.left == candidate.budget.limit == 6000
    assert 0 <= candidate.budget.left < 8 * 64
    assert job.variants is not None
    assert (job.variants.measured, job.variants.expected) == (2, 2)


def test_variant_is_fetched_whole_and_in_parts_and_checked(done: Done, tmp_path: Path) -> None:
    with done.service.client() as client:
        rows = client.frontier(done.job).variants
        assert {row["name"] for row in rows} == {"small/dense", "small/magnitude-s50"}
        name = rows[0]["name"]
        files = client.variant(done.job, name).files
        first = client.download(done.job, name, tmp_path)
        assert sum(path.stat().st_size for path in first) == sum(file.bytes for file in files)
        compact = next(path for path in first if path.parent.name == "compact")
        whole = compact.read_bytes()
        assert len(whole) == rows[0]["bytes"]
        # Half of it is there: only the rest is fetched, and it fits.
        compact.with_name(f"{compact.name}.part").write_bytes(whole[: len(whole) // 2])
        compact.unlink()
        client.download(done.job, name, tmp_path)
        assert compact.read_bytes() == whole
        with pytest.raises(ServiceError, match="no variant of that name"):
            client.variant(done.job, "small/none")


def test_command_line_shows_the_same(done: Done) -> None:
    home = ["--home", done.service.home]
    (row,) = json.loads(espalier("list", *home, "--json").stdout)
    assert (row["job"], row["state"]) == (done.job, "succeeded")
    shown = json.loads(espalier("show", "last", *home, "--json").stdout)
    assert shown["job"] == done.job
    assert {row["name"] for row in shown["variants"]} == {"small/dense", "small/magnitude-s50"}
    watched = espalier("watch", done.job[:7], *home)
    assert watched.returncode == 0
    assert "small: trained, 100% of the budget" in watched.stderr
    assert "stages" not in espalier("logs", "last", *home, "-n", "5").stdout


def test_a_paused_job_goes_on_at_another_layout(done: Done) -> None:
    """Trained on one process, then tensor-parallel on two: no step is lost, and every token is spent once."""
    steps = 400
    spec = tiny_job(str(done.service.home.parent / "text" / "*.txt"), budget={"tokens": steps * 8 * 64})
    spec |= {"execution": {"devices": 2}, "compression": {}, "export": {"variants": "none"}}
    with done.service.client() as client:
        job = client.submit(spec).id
        for event in client.watch(job):
            if event is not None and event["kind"] == "train.step":
                client.pause(job)
                break
        paused = client.wait(job, RUN_SECONDS)
        assert paused.state is JobState.PAUSED, client.log(job)
        assert 0 < paused.candidates[0].step < steps
        client.resume(job, {"small": {"tensor": 2}})
        finished = client.wait(job, RUN_SECONDS)
        assert finished.state is JobState.SUCCEEDED, client.log(job)
        events = list(client.events(job))
    assert finished.attempt == 2
    gangs = [event for event in events if event["kind"] == "gang_started"]
    assert [gang["world_size"] for gang in gangs] == [1, 2]
    assert gangs[1]["resumed_step"] == paused.candidates[0].step
    rows = [row["step"] for event in events if event["kind"] == "train.step" for row in event["steps"]]
    assert rows == list(range(1, steps + 1))
    assert finished.candidates[0].budget.spent == steps * 8 * 64
