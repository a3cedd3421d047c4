"""A forked process that writes: what becomes of it when it hangs, and that one which works is left alone."""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from parallelism import forked_writer
from parallelism.forked_writer import ForkedWriter, Outcome


def keep(outcome: Outcome) -> Outcome:
    return outcome


def hang() -> Outcome:
    time.sleep(3600)
    return []


def work_for_two_seconds() -> Outcome:
    """In bits of work, each after a pause: it computes all in all for a small part of the time."""
    for _ in range(40):
        time.sleep(0.05)
        sum(range(200_000))
    return "a result"


class StuckFork:
    """os.fork() whose child stays in it, the first times: as before Python 3.12 when another thread holds its lock."""

    def __init__(self, times: int) -> None:
        self._fork, self._left = os.fork, times

    def __call__(self) -> int:
        self._left -= 1
        pid = self._fork()
        if pid == 0 and self._left >= 0:
            time.sleep(3600)
        return pid


@contextmanager
def foreign_threads() -> Iterator[list[None]]:
    """Threads that Python did not start and that call it once each, all the time; their calls."""
    library, ended, entries = ctypes.CDLL(None), threading.Event(), list[None]()
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    enter = function(lambda _: entries.append(None))
    library.pthread_create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, function, ctypes.c_void_p]
    library.pthread_join.argtypes = [ctypes.c_ulong, ctypes.c_void_p]

    def churn() -> None:
        while not ended.is_set():
            threads = [ctypes.c_ulong() for _ in range(8)]
            for thread in threads:
                assert library.pthread_create(ctypes.byref(thread), None, enter, None) == 0
            for thread in threads:
                library.pthread_join(thread, None)

    starters = [threading.Thread(target=churn) for _ in range(3)]
    for starter in starters:
        starter.start()
    try:
        yield entries
    finally:
        ended.set()
        for starter in starters:
            starter.join()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_one_that_hangs_says_where_and_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    before = children()
    began = time.monotonic()
    outcome = ForkedWriter(hang, keep, still_seconds=0.5).outcome()
    assert outcome == "the writing process did nothing for 0.5 s and was ended"
    assert time.monotonic() < began + 30
    assert children() == before
    assert "in hang" in capfd.readouterr().err
    assert gc.isenabled()


def test_one_that_does_not_begin_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_writer, "BEGIN_SECONDS", 2.0)
    monkeypatch.setattr(os, "fork", StuckFork(times=2))
    before = children()
    assert ForkedWriter(work_for_two_seconds, keep).outcome() == "a result"
    assert children() == before


def test_when_none_begins_nothing_is_left_and_the_reason_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked_writer, "BEGIN_SECONDS", 0.3)
    monkeypatch.setattr(os, "fork", StuckFork(times=3))
    before = children()
    with pytest.raises(OSError, match=r"3 forked processes in a row did not begin within 0\.3 s"):
        ForkedWriter(work_for_two_seconds, keep)
    assert children() == before
    assert gc.isenabled()


def test_forks_begin_while_threads_of_others_enter_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's do. With Python 3.11.7 about one child in seventy does not begin then, without being replaced."""
    monkeypatch.setattr(forked_writer, "BEGIN_SECONDS", 2.0)
    with foreign_threads() as entries:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            pid = forked_writer.fork()
            if pid == 0:
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert len(entries) > 100


def test_one_that_works_may_take_longer() -> None:
    assert ForkedWriter(work_for_two_seconds, keep, still_seconds=1.5).outcome() == "a result"


def test_one_that_is_past_its_time_is_ended() -> None:
    outcome = ForkedWriter(work_for_two_seconds, keep, longest_seconds=0.3).outcome()
    assert outcome == "the writing process was past its time and was ended"


def test_one_that_dies_is_told_by_its_status() -> None:
    outcome = ForkedWriter(lambda: os._exit(3), keep).outcome()
    assert outcome == "the writing process ended with status 3 (negative: by that signal)"
