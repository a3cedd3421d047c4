"""A job in an object store that is killed while the job trains, and what it has to bring all the same."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.journal import Journal
from launcher.result import result_document
from launcher.spec import JobSpec
from parallelism import places
from tests.finished import small_job
from tests.launcher.fingerprint import fingerprint, tensors_checksum
from tests.object_store import ObjectStore

JOB_SECONDS = 600.0
AWAY_SECONDS = 5.0


def spec_of(folder: Path, **execution: Any) -> JobSpec:
    """Two candidates, one of them tensor-parallel, a checkpoint every five steps."""
    document = small_job(folder / "text")
    document["execution"] |= {"checkpoint_every": {"steps": 5}, **execution}
    return JobSpec.model_validate(document)


def brought(journal: Journal) -> dict[str, Any]:
    """What a job has to have brought, whatever happened to it and wherever it lies."""
    result = result_document(journal)
    found: dict[str, Any] = {}
    for row in result["candidates"]:
        found[row["name"]] = {name: row[name] for name in ("steps", "tokens", "flops", "train_loss", "validation_loss")}
        found[row["name"]]["state"] = fingerprint(places.need(journal.local(row["checkpoint"])))
    for row in result["variants"]:
        found[row["name"]] = (tensors_checksum(journal.local(row["path"])), row["quality"], row["on_frontier"])
    return found


def steps_told(journal: Journal, candidate: str) -> list[int]:
    """Numbers of the steps that the journal tells of, without those that a restart has undone."""
    told: list[int] = []
    for event in journal.events():
        if event["kind"] == "train.step" and event["candidate"] == candidate:
            for row in event["steps"]:
                told = [step for step in told if step < row["step"]] + [row["step"]]
    return told


class Outages(threading.Thread):
    """Kills the store at the given steps of a candidate, and brings it up again after a while."""

    def __init__(
        self, store: ObjectStore, journal: Journal, steps: list[int], away_seconds: float = AWAY_SECONDS
    ) -> None:
        super().__init__(daemon=True)
        self._store, self._journal, self._steps = store, Journal(journal.directory), steps
        self._away_seconds = away_seconds
        self.at: list[int] = []

    def run(self) -> None:
        for step in self._steps:
            if not self._until(lambda wanted=step: self._step() >= wanted):
                return
            self._store.kill()
            self.at.append(self._step_known)
            time.sleep(self._away_seconds)
            self._store.start()

    def _step(self) -> int:
        self._step_known = int(self._journal.view().candidate("large").latest.get("step", 0))
        return self._step_known

    def _until(self, reached: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + JOB_SECONDS
        while not reached():
            if time.monotonic() > deadline or self._journal.view().candidate("large").result:
                return False
            time.sleep(0.1)
        return True
