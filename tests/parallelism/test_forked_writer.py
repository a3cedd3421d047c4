"""A forked process that writes: what becomes of it when it hangs, and that one which works is left alone."""

import gc
import os
import time

import psutil
import pytest
from torch.distributed.checkpoint.storage import WriteResult

from parallelism.forked_writer import ForkedWriter, Outcome


def keep(outcome: Outcome) -> Outcome:
    return outcome


def hang() -> Outcome:
    time.sleep(3600)
    return []


def work_for_a_second() -> Outcome:
    """In bits of work, each after a pause: it computes all in all for a small part of the time."""
    for _ in range(20):
        time.sleep(0.05)
        sum(range(200_000))
    return ["a result"]  # type: ignore[list-item]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_one_that_hangs_says_where_and_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    before = children()
    began = time.monotonic()
    outcome = ForkedWriter(hang, keep, still_seconds=0.5).outcome()
    assert outcome == "the writing process did nothing for 0.5 s and was ended"
    assert time.monotonic() < began + 5
    assert children() == before
    assert "in hang" in capfd.readouterr().err
    assert gc.isenabled()


def test_one_that_works_may_take_longer() -> None:
    outcome: list[WriteResult] | str = ForkedWriter(work_for_a_second, keep, still_seconds=0.5).outcome()
    assert outcome == ["a result"]


def test_one_that_is_past_its_time_is_ended() -> None:
    outcome = ForkedWriter(work_for_a_second, keep, longest_seconds=0.3).outcome()
    assert outcome == "the writing process was past its time and was ended"


def test_one_that_dies_is_told_by_its_status() -> None:
    outcome = ForkedWriter(lambda: os._exit(3), keep).outcome()
    assert outcome == "the writing process ended with status 3 (negative: by that signal)"
