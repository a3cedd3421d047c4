"""One candidate's process groups on a real Ray cluster: what is said while devices are missing, and after a death."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.actors.gang import CandidateRun, Phase
from launcher.actors.session import Room
from launcher.actors.workers import GroupShape
from launcher.journal import Journal
from launcher.told import ToldSteps
from launcher.view import CandidateView
from parallelism.checkpoint_store import Metrics
from tests.launcher.made import new_journal


def _run(journal: Journal, world_size: int = 1) -> CandidateRun:
    return CandidateRun(
        journal,
        "small",
        GroupShape(world_size, tensor=world_size, threads=1),
        lambda root, resumed, burnt: {"steps": 10_000, "seconds": 0.01},
        max_restarts=0,
        stall_seconds=60.0,
        function="tests.launcher.toys:count",
        connected=False,
    )


def _poll(run: CandidateRun, until: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline
        run.poll()
        time.sleep(0.05)


def test_a_group_that_waits_for_devices_says_for_which(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.actors.reservation.SILENT_SECONDS", 0.1)
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    run = _run(journal, world_size=8)
    run.reserve()
    _poll(run, lambda: journal.view().waiting)
    assert journal.view().waiting == "small needs 8 CPU (4 of 4 free) on one node"
    run.poll()
    assert [event["kind"] for event in journal.events()].count("waiting") == 1
    run.stop("pause", 0.0)
    assert run.phase is Phase.STOPPED
    fits = _run(journal)
    fits.reserve()
    _poll(fits, lambda: fits.phase is Phase.STARTING)
    assert journal.view().waiting is None
    fits.stop("pause", 0.0)


def test_ranks_that_ray_never_brings_up_are_given_up(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.actors.gang.PROCESS_SECONDS", -1.0)
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    run = _run(journal)
    run.reserve()
    _poll(run, lambda: run.phase is Phase.FAILED)
    assert run.failure is not None
    assert "Ray did not bring its process up within 300 s" in run.failure
    assert journal.view().candidate("small").gang.ended == "stalled"


def test_a_death_is_written_down_once(room: Room, tmp_path: Path) -> None:
    """The coordinator that wrote it may die before the next group has begun."""
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    gang = {"gang": 1, "root": str(tmp_path / "e0001-g01"), "world_size": 1, "resumed_from": None, "resumed_step": 0}
    journal.append("gang_started", {"candidate": "small", **gang})
    journal.claim_epoch()
    first = _run(journal)
    first._append = partial(_die_before_the_gang, journal)
    first.reserve()
    with pytest.raises(KeyboardInterrupt):
        _poll(first, lambda: False)
    first.abandon()
    journal.claim_epoch()
    second = _run(journal)
    second.reserve()
    _poll(second, lambda: second.phase is Phase.STARTING)
    second.stop("pause", 0.0)
    candidate: CandidateView = journal.view().candidate("small")
    assert [restart["reason"] for restart in candidate.restarts] == ["coordinator lost"]
    assert [gang.epoch for gang in candidate.gangs] == [1, 3]


def test_what_nobody_saw_is_charged_for_as_long_as_the_ranks_may_have_lived(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.policy.UNSEEN_SECONDS", 0.25)
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    gang = {"gang": 1, "root": str(tmp_path / "e0001-g01"), "world_size": 2, "resumed_from": None, "resumed_step": 0}
    journal.append("gang_started", {"candidate": "small", **gang})
    clock = {"step": 3, "gang_wall_seconds": 7.0, "gang_device_seconds": 14.0}
    told = journal.append("heartbeat", {"candidate": "small", **clock})["time"]
    for rank, lived in enumerate((0.5, 0.125)):
        log = journal.log_path(f"small.e0001-g01.rank{rank}")
        log.touch()
        os.utime(log, (told + lived, told + lived))
    time.sleep(1.0)
    journal.claim_epoch()
    run = _run(journal)
    run.reserve()
    _poll(run, lambda: run.phase is Phase.STARTING)
    run.stop("pause", 0.0)
    (restart,) = journal.view().candidate("small").restarts
    assert restart["gang_wall_seconds"] == pytest.approx(7.75, abs=1e-3)  # 0.5 s in rank 0's log, 0.25 s without a sign
    assert restart["gang_device_seconds"] == pytest.approx(15.5, abs=2e-3)
    assert restart["unseen_device_seconds"] == pytest.approx(1.5, abs=2e-3)
    assert restart["message"].startswith("nobody saw its ranks end; charged for 0.")
    assert journal.view().candidate("small").gangs[0].device_seconds == restart["gang_device_seconds"]


def _die_before_the_gang(journal: Journal, kind: str, **fields: object) -> None:
    if kind == "gang_started":
        raise KeyboardInterrupt
    journal.append(kind, {"candidate": "small", **fields})


def test_who_asked_for_a_stop_is_not_told_of_a_failure(room: Room, tmp_path: Path) -> None:
    """The ranks do not write their last checkpoint in time, and no restart is allowed."""
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    run = _run(journal)
    run.reserve()
    _poll(run, lambda: run.phase is Phase.RUNNING)
    run._active_group.request_stop = lambda reason: None  # they do not hear it
    run.stop("pause", 0.1)
    _poll(run, lambda: run.phase in (Phase.STOPPED, Phase.FAILED))
    assert run.phase is Phase.STOPPED
    kinds = [event["kind"] for event in journal.events()]
    assert "candidate_failed" not in kinds
    assert journal.view().candidate("small").gang.ended == "stalled"


def test_steps_that_died_with_the_coordinator_are_told_by_the_next_group(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal ends at step 3, the rank made 7, and the newest checkpoint holds 5."""
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    gang = {"gang": 1, "root": str(tmp_path / "e0001-g01"), "world_size": 1, "resumed_from": None, "resumed_step": 0}
    journal.append("gang_started", {"candidate": "small", **gang})
    journal.append("train.step", {"candidate": "small", "steps": [{"step": 3, "time": 3.0}]})
    kept = ToldSteps(journal.log_path("small.e0001-g01.rank0"))
    for step in range(1, 8):
        kept.add({"step": step, "time": float(step)})
    checkpoint = SimpleNamespace(step=5, path=tmp_path / "checkpoint", metrics=Metrics())
    monkeypatch.setattr("launcher.actors.gang.adopt_newest", lambda source, target: checkpoint)
    journal.claim_epoch()
    run = _run(journal)
    (tmp_path / "job" / "candidates" / "small" / "checkpoints").mkdir(parents=True, exist_ok=True)
    run.reserve()
    _poll(run, lambda: run.phase is Phase.STARTING)
    run.stop("pause", 0.0)
    told = [event for event in journal.events() if event["kind"] == "train.step"]
    assert [row["step"] for event in told for row in event["steps"]] == [3, 4, 5]
    (restart,) = journal.view().candidate("small").restarts
    assert (restart["from_step"], restart["lost_steps"]) == (5, 0)
    assert not list(tmp_path.rglob("*.steps"))
