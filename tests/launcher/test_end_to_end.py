"""A real job from text to verified exports; the same job under fire ends with the same bits."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job, stop_job
from launcher.journal import Journal
from launcher.result import result_document
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.finished import BATCH, LENGTH, STEPS, FinishedJob, small_job
from tests.launcher.faults import Fault, FaultPlan
from tests.launcher.fingerprint import fingerprint
from tests.launcher.leftovers import left_behind

pytestmark = pytest.mark.campaign

Document = dict[str, Any]


def _spec(folder: Path, changes: Document) -> JobSpec:
    """The small job with some parts replaced."""
    return JobSpec.model_validate(small_job(folder / "text") | changes)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    """The whole line; a rank is killed in training, and the coordinator when the first variant has been measured."""
    folder = tmp_path_factory.mktemp("disturbed")
    home = Home(folder / "home")
    execution = {"devices": 2, "checkpoint_every": {"steps": 5}}
    journal = create_job(_spec(folder, {"execution": execution}), home)
    states: list[JobState] = []
    thread = threading.Thread(target=lambda: states.append(run_job(home, journal.job_id)), daemon=True)
    thread.start()
    try:
        _until(lambda: journal.view().candidate("large").latest.get("step", 0) >= 12)
        os.kill(_pid(journal, "rank", candidate="large", rank=1), signal.SIGKILL)
        _until(lambda: journal.view().variants)
        os.kill(_pid(journal, "coordinator"), signal.SIGKILL)
        thread.join(240)
    finally:
        if thread.is_alive():
            stop_job(home, journal.job_id)
    assert states == [JobState.SUCCEEDED], journal.view().error
    return journal


FAULTS = (
    Fault("within a step", "step", 7, rank=1, delay_seconds=0.02),
    Fault("the writer alone", "data", 10, rank=1, victim="writer"),
    Fault("half of the data is written", "data", 15, rank=1, victim="both"),
    Fault("data complete, manifest missing", "manifest", 20),
    Fault("checkpoint complete, nobody told", "unreported", 25),
    Fault("the candidate is done, its stage is not", "event", kind="candidate_done"),
)


@pytest.fixture(scope="module")
def stormy(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    """The large candidate alone, under kills at chosen points; more of them than restarts without a new checkpoint."""
    folder = tmp_path_factory.mktemp("stormy")
    home = Home(folder / "home")
    execution = {"devices": 2, "checkpoint_every": {"steps": 5}, "max_restarts": 2}
    changes = {"compression": {}, "export": {"variants": "none"}, "execution": execution}
    spec = _spec(folder, changes)
    large = [candidate for candidate in spec.candidates if candidate.name == "large"]
    journal = create_job(spec.model_copy(update={"candidates": large}), home)
    FaultPlan(journal.directory, FAULTS, pace_seconds=0.1).write()
    assert run_job(home, journal.job_id, LocalBackend("tests.launcher.faulty_coordinator")) is JobState.SUCCEEDED
    return journal


def _pid(journal: Journal, role: str, **fields: Any) -> int:
    events = [event for event in journal.view().processes.values() if event["role"] == role]
    return [event["pid"] for event in events if all(event[name] == value for name, value in fields.items())][-1]


def _until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def _candidate(result: Document, name: str) -> Document:
    return next(row for row in result["candidates"] if row["name"] == name)


def _assert_trained_alike(row: Document, calm: Document) -> None:
    for name in ("steps", "tokens", "flops", "train_loss", "validation_loss"):
        assert row[name] == calm[name], name


@pytest.mark.timeout(600)
def test_no_step_is_missing_from_the_journal(disturbed: Journal, stormy: Journal) -> None:
    """Also those that a checkpoint held when the coordinator died before it wrote them down."""
    for journal in (disturbed, stormy):
        events = [event for event in journal.events() if event["kind"] == "train.step"]
        told = [row["step"] for event in events if event["candidate"] == "large" for row in event["steps"]]
        assert set(told) == set(range(1, STEPS + 1))
    assert not list(stormy.directory.rglob("*.steps*"))


@pytest.mark.timeout(600)
def test_kills_leave_the_weights_as_they_were_bit_for_bit(finished: FinishedJob, disturbed: Journal) -> None:
    calm, stormy = _candidate(finished.result, "large"), _candidate(result_document(disturbed), "large")
    expected = finished.fingerprints["large"]
    assert len(expected) > 30
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in expected)
    assert fingerprint(stormy["checkpoint"]) == expected
    _assert_trained_alike(stormy, calm)
    assert calm["restarts"] == 0
    assert stormy["restarts"] == 1
    (restart,) = disturbed.view().candidate("large").restarts
    assert restart["reason"] == "rank died"
    assert restart["from_step"] % 5 == 0
    assert 0 < stormy["lost_device_seconds"] < stormy["device_seconds"]


@pytest.mark.timeout(600)
def test_kills_at_every_point_of_a_checkpoint_change_nothing_but_the_bill(
    finished: FinishedJob, stormy: Journal
) -> None:
    assert FaultPlan.read(stormy.directory).struck() == sorted(fault.name for fault in FAULTS)
    row = _candidate(result_document(stormy), "large")
    assert fingerprint(row["checkpoint"]) == finished.fingerprints["large"]
    _assert_trained_alike(row, _candidate(finished.result, "large"))
    view = stormy.view().candidate("large")
    assert [restart["reason"] for restart in view.restarts] == ["rank died"] * 4
    assert view.restarts[2]["from_step"] == 15  # what has no manifest counts for nothing
    assert view.restarts[3]["from_step"] == 25  # what has one counts, told or not
    assert all(restart["lost_device_seconds"] > 0 for restart in view.restarts)
    assert [event["step"] for event in stormy.events() if event["kind"] == "train.checkpoint_failed"] == [10]
    assert [gang.epoch for gang in view.gangs] == [1] * 5 + [stormy.view().epoch]
    assert [gang.ended for gang in view.gangs] == ["rank died"] * 4 + ["budget"] * 2
    assert view.gangs[-1].resumed_step == STEPS
    assert row["device_seconds"] > row["lost_device_seconds"]
    assert left_behind(stormy) == []


@pytest.mark.timeout(600)
def test_the_budget_is_spent_to_the_last_whole_step(disturbed: Journal) -> None:
    for name in ("small", "large"):
        candidate = _candidate(result_document(disturbed), name)
        assert (candidate["steps"], candidate["tokens"]) == (STEPS, STEPS * BATCH * LENGTH)
        assert candidate["train_loss"] < 5.0


@pytest.mark.timeout(600)
def test_what_was_done_before_the_coordinator_died_is_not_done_again(disturbed: Journal) -> None:
    events = list(disturbed.events())
    assert disturbed.view().epoch == 2
    done = [event["stage"] for event in events if event["kind"] == "stage_done"]
    assert len(done) == len(set(done))
    second = next(event["number"] for event in events if event["kind"] == "attempt_started" and event["epoch"] == 2)
    later = [event["kind"] for event in disturbed.events(second)]
    assert "gang_started" not in later
    assert "layer_compressed" not in later
    stages = {event["stage"] for event in disturbed.events(second) if event["kind"] == "stage_started"}
    assert stages <= {"evaluate", "export", "verify", "report"}


@pytest.mark.timeout(600)
def test_the_result_document_holds_every_variant_with_its_frontier_and_files(disturbed: Journal) -> None:
    document = result_document(disturbed)
    json.dumps(document, allow_nan=False)
    assert document["state"] == "succeeded"
    variants = {row["name"]: row for row in document["variants"]}
    recipes = ("dense", "magnitude-s50", "rtn-w4g16")
    assert set(variants) == {f"{candidate}/{recipe}" for candidate in ("small", "large") for recipe in recipes}
    for name, row in variants.items():
        assert Path(row["path"]).stat().st_size == row["bytes"], name
        assert row["sparsity"] == pytest.approx(0.5 if "s50" in name else 0.0, abs=0.01)
        assert (row["export_bytes"] is not None) == row["on_frontier"], name
        beaten = any(
            other["bytes"] < row["bytes"] and other["quality"]["value"] < row["quality"]["value"]
            for other in variants.values()
        )
        assert row["on_frontier"] != beaten or not beaten, name
    for candidate in ("small", "large"):
        dense = variants[f"{candidate}/dense"]
        assert dense["bits_per_parameter"] == pytest.approx(16.0, rel=0.1)
        assert variants[f"{candidate}/rtn-w4g16"]["bytes"] < 0.5 * dense["bytes"]
        # The dense variant is the trained model in bf16, measured on the same text as in training.
        trained = _candidate(document, candidate)["validation_loss"]
        assert dense["metrics"]["validation_loss"] == pytest.approx(trained, abs=0.02)
    verified = disturbed.stage("verify").outputs["verifications"]
    assert len(verified) == sum(row["on_frontier"] for row in variants.values())
    for name in ("frontier.md", "frontier.png", "frontier.json"):
        assert (disturbed.report_dir / name).stat().st_size > 0


@pytest.mark.timeout(600)
def test_every_process_is_in_the_journal_and_gone(finished: FinishedJob, disturbed: Journal) -> None:
    started = [event for event in disturbed.events() if event["kind"] == "process_started"]
    assert {event["role"] for event in started} == {"coordinator", "ray", "rank", "worker"}
    ranks = [(event["candidate"], event["gang"], event["rank"]) for event in started if event["role"] == "rank"]
    assert sorted(rank for candidate, gang, rank in ranks if (candidate, gang) == ("large", 2)) == [0, 1]
    assert left_behind(disturbed) == []
    assert left_behind(finished.journal) == []
