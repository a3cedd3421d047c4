"""The pool on a real Ray cluster: order, follow-ups, memory, lost workers."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from launcher.actors import reservation
from launcher.actors.pool import Pool, Task, TaskFailed, cluster_memory_bytes
from launcher.actors.reservation import Reservation
from launcher.actors.session import Room
from launcher.journal import Journal
from tests.launcher.made import new_journal

GIB = 1 << 30
TOYS = "tests.launcher.pool_toys"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    return journal


@pytest.fixture
def pool(room: Room, journal: Journal) -> Iterator[Pool]:
    pool = Pool(journal, room, max_restarts=2, check=lambda: None, memory_bytes=4 * GIB)
    yield pool
    pool.close()


def test_follow_ups_of_a_result_are_run_and_come_before_what_waits(pool: Pool) -> None:
    ended: list[str] = []

    def done(task: Task, result: Any) -> list[Task]:
        ended.append(task.name)
        depth = len(task.name)
        return [Task(task.name + "x", f"{TOYS}:echo", {"value": depth})] if depth < 4 else []

    pool.run([Task("a", f"{TOYS}:echo", {"value": 0}), Task("b", f"{TOYS}:echo", {"value": 0})], done)
    assert sorted(ended) == ["a", "ax", "axx", "axxx", "b", "bx", "bxx", "bxxx"]


def test_tasks_that_do_not_fit_side_by_side_run_one_after_the_other(pool: Pool, tmp_path: Path) -> None:
    # All workers are there before, so that a slow start of one is not taken for the pool's order.
    pool.run([Task(str(index), f"{TOYS}:sleep", {"seconds": 0.1}) for index in range(4)], lambda *_: None)
    spans: dict[str, tuple[float, float]] = {}
    large = [Task(name, f"{TOYS}:sleep", {"seconds": 0.3}, memory_bytes=3 * GIB) for name in "ab"]
    small = [Task(name, f"{TOYS}:sleep", {"seconds": 0.3}, memory_bytes=GIB) for name in "cd"]
    pool.run([*large, *small], lambda task, span: spans.update({task.name: span}))
    assert not _overlap(spans["a"], spans["b"])
    assert _overlap(spans["a"], spans["c"])  # a small one may pass the large one that waits


def test_a_task_that_needs_more_than_there_is_runs_alone(pool: Pool) -> None:
    spans: dict[str, tuple[float, float]] = {}
    tasks = [Task(name, f"{TOYS}:sleep", {"seconds": 0.2}, memory_bytes=9 * GIB) for name in "ab"]
    pool.run(tasks, lambda task, span: spans.update({task.name: span}))
    assert not _overlap(spans["a"], spans["b"])


def test_a_killed_worker_costs_its_task_one_more_try(pool: Pool, journal: Journal, tmp_path: Path) -> None:
    results: list[Any] = []
    task = Task("dies", f"{TOYS}:die_the_first_times", {"folder": str(tmp_path), "times": 2})
    pool.run([task], lambda _, result: results.append(result))
    assert results == [2]
    restarts = [event for event in journal.events() if event["kind"] == "task_restart"]
    assert [(event["task"], event["reason"]) for event in restarts] == [("dies", "rank died")] * 2


def test_a_task_that_always_dies_is_given_up_by_name(pool: Pool, tmp_path: Path) -> None:
    task = Task("dies", f"{TOYS}:die_the_first_times", {"folder": str(tmp_path), "times": 9})
    with pytest.raises(TaskFailed, match=r"dies: .* is gone; its last words are in"):
        pool.run([task], lambda *_: None)


def test_a_worker_that_ray_never_brings_up_is_replaced_and_then_given_up(
    pool: Pool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.actors.pool.PROCESS_SECONDS", -1.0)
    with pytest.raises(TaskFailed, match="echo: Ray did not bring its process up within 300 s"):
        pool.run([Task("echo", f"{TOYS}:echo", {"value": 7})], lambda *_: None)
    assert [event["kind"] for event in journal.events()].count("task_restart") == 2


def test_a_users_error_is_told_at_once(pool: Pool, journal: Journal) -> None:
    with pytest.raises(TaskFailed, match="wrong: ValueError: field x is 9: use 3"):
        pool.run([Task("wrong", f"{TOYS}:refuse")], lambda *_: None)
    assert not [event for event in journal.events() if event["kind"] == "task_restart"]


def _held(cpus: int) -> Reservation:
    """So many of the cluster's four CPUs, in somebody else's hands."""
    taken = Reservation([{"CPU": float(cpus)}])
    _until(taken.held)
    return taken


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_task_that_waits_for_a_worker_says_what_the_cluster_lacks(
    room: Room, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.actors.reservation.SILENT_SECONDS", 0.1)
    taken, seen = _held(4), Journal(journal.directory)
    said: list[str] = []

    def check() -> None:
        """In every turn; the devices come back when it has been said that they are missing."""
        reason = seen.view().waiting
        if reason and not said:
            said.append(reason)
            taken.give_back()

    pool = Pool(journal, room, max_restarts=0, check=check, memory_bytes=4 * GIB)
    results: list[int] = []
    pool.run([Task("evaluate/small", f"{TOYS}:echo", {"value": 7})], lambda _, result: results.append(result))
    pool.close()
    assert results == [7]
    assert said == ["a worker for evaluate/small needs 1 CPU (0 of 4 free) on one node"]
    assert journal.view().waiting is None
    assert [event["kind"] for event in journal.events()].count("waiting") == 1


def test_devices_that_are_free_and_do_not_come_are_asked_for_anew(
    pool: Pool, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.actors.reservation.SILENT_SECONDS", 0.1)
    monkeypatch.setattr("launcher.actors.reservation.WAITING_SECONDS", 0.2)
    table, lost = reservation.placement_group_table, list[Any]()

    def forgetful(placement: Any) -> dict[str, Any]:
        """As Ray when it has lost the first request."""
        lost.extend([] if lost else [placement])
        return {"state": "PENDING"} if placement is lost[0] else table(placement)

    monkeypatch.setattr(reservation, "placement_group_table", forgetful)
    results: list[int] = []
    pool.run([Task("echo", f"{TOYS}:echo", {"value": 7})], lambda _, result: results.append(result))
    pool.close()
    assert results == [7]
    assert (
        "a worker for echo needs 1 CPU"
        in next(event for event in journal.events() if event["kind"] == "waiting")["reason"]
    )
    _until(lambda: ray.available_resources().get("CPU") == 4.0)  # the lost one was given back


def test_a_device_that_never_comes_holds_up_nothing_that_another_can_do(pool: Pool, journal: Journal) -> None:
    taken, results = _held(3), list[int]()
    pool.run(
        [Task(name, f"{TOYS}:echo", {"value": index}) for index, name in enumerate("abcde")],
        lambda _, result: results.append(result),
    )
    assert sorted(results) == [0, 1, 2, 3, 4]
    assert len([event for event in journal.events() if event["kind"] == "process_started"]) == 1
    pool.close()
    taken.give_back()
    _until(lambda: ray.available_resources().get("CPU") == 4.0)  # nothing is asked for any more


def test_the_cluster_tells_its_memory(room: Room) -> None:
    assert cluster_memory_bytes() > 100 << 20


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]
