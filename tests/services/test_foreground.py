"""One interrupt asks for a pause, two end the job at once, and the supervisor's errors reach the caller."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.view import JobView
from services.foreground import run_in_foreground


class Recorder:
    """A display that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.updates = 0

    def update(self, view: JobView) -> None:
        self.updates += 1

    def say(self, message: str) -> None:
        self.said.append(message)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    spec = {
        "name": "x",
        "data": {"train": ["builtin:python-stdlib"]},
        "budget": {"tokens": 1e6},
        "candidates": [{"name": "a", "model": {"family": "gpt"}}],
    }
    return Journal(tmp_path / "x-1").create(JobSpec.model_validate(spec))


def wait_until_paused(journal: Journal, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while journal.desired() != "pause":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def no_hard_stop() -> None:
    raise AssertionError("stopped hard")


def test_work_that_ends_by_itself_is_no_interrupt(journal: Journal) -> None:
    display = Recorder()
    assert run_in_foreground(journal, lambda: None, no_hard_stop, display) is False
    assert display.updates >= 1
    assert journal.desired() == "run"


def test_first_interrupt_asks_for_a_pause(journal: Journal) -> None:
    def supervise() -> None:
        interrupt()
        wait_until_paused(journal)

    display = Recorder()
    assert run_in_foreground(journal, supervise, no_hard_stop, display) is True
    assert len(display.said) == 1
    assert "Pausing" in display.said[0]


def test_second_interrupt_stops_at_once(journal: Journal) -> None:
    stopped = threading.Event()

    def supervise() -> None:
        interrupt()
        wait_until_paused(journal)
        interrupt()
        assert stopped.wait(20)

    display = Recorder()
    assert run_in_foreground(journal, supervise, stopped.set, display) is True
    assert len(display.said) == 2


def test_errors_of_the_supervisor_are_raised_and_handlers_restored(journal: Journal) -> None:
    def supervise() -> None:
        raise ValueError("no such thing")

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="no such thing"):
        run_in_foreground(journal, supervise, no_hard_stop, Recorder())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
