"""What the supervisor makes of a back-end's words, with one that says what it is told to."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import jobs
from launcher.backends.base import BackendStatus, BackendUnavailable, Handle, Phase
from launcher.jobs import Supervisor
from launcher.journal import Desired, Journal
from launcher.states import JobState
from tests.launcher.made import new_journal

WAITS = BackendStatus(Phase.WAITING, "the nodes are taken")
ENDED = BackendStatus(Phase.ENDED, "stopped")


class Scripted:
    """A back-end of canned statuses; a coordinator of its own never runs."""

    outlives = True

    def __init__(self, statuses: list[BackendStatus], unavailable: int = 0, found: Handle | None = None) -> None:
        self.submitted = 0
        self.stopped: list[float] = []
        self._statuses = statuses
        self._unavailable = unavailable
        self._found = found

    def submit(self, journal: Journal) -> Handle:
        if self._unavailable:
            self._unavailable -= 1
            raise BackendUnavailable("nobody answers")
        self.submitted += 1
        return {"number": self.submitted}

    def find(self, journal: Journal) -> Handle | None:
        return self._found

    def status(self, handle: Handle) -> BackendStatus:
        if self.stopped:
            return ENDED
        return self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        self.stopped.append(grace_seconds)

    def logs(self, handle: Handle, journal: Journal, lines: int = 50) -> str:
        return ""


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(jobs, "UNAVAILABLE_SECONDS", 0.01)


def _told(journal: Journal, backend: Scripted, poll: Callable[[], None] | None = None) -> tuple[JobState, list[str]]:
    told: list[str] = []
    return Supervisor(journal, backend, told.append).run(poll), told


@pytest.mark.parametrize(("wish", "state"), [("pause", JobState.INTERRUPTED), ("cancel", JobState.CANCELLED)])
def test_a_job_that_waits_is_taken_out_of_the_queue_when_it_is_not_wanted(
    wish: Desired, state: JobState, tmp_path: Path
) -> None:
    journal, backend = new_journal(tmp_path), Scripted([WAITS])
    ended, told = _told(journal, backend, poll=lambda: journal.set_desired(wish))
    assert (ended, told, backend.stopped) == (state, ["the nodes are taken"], [0.0])


def test_each_reason_is_told_once(tmp_path: Path) -> None:
    statuses = [WAITS, WAITS, BackendStatus(Phase.WAITING, "others come first"), WAITS, BackendStatus(Phase.RUNNING)]
    withdrawn = BackendStatus(Phase.ENDED, "cancelled by hand", final=True)
    journal = new_journal(tmp_path)
    state, told = _told(journal, Scripted([*statuses, withdrawn]))
    assert told == ["the nodes are taken", "others come first", "the nodes are taken"]
    assert state is JobState.FAILED
    assert journal.view().error == "cancelled by hand: continue it when that is put right"


def test_a_back_end_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    final = BackendStatus(Phase.ENDED, "no memory", final=True)
    backend = Scripted([final], unavailable=2)
    state, told = _told(new_journal(tmp_path), backend)
    assert (state, told, backend.submitted) == (JobState.FAILED, ["nobody answers"] * 2, 1)


def test_a_submission_that_is_there_is_followed_and_not_made_again(tmp_path: Path) -> None:
    final = BackendStatus(Phase.ENDED, "no memory", final=True)
    backend = Scripted([final], found={"number": 7})
    _told(new_journal(tmp_path), backend)
    assert backend.submitted == 0
