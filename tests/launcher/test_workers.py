"""Worker groups on a real Ray cluster, with toy rank functions."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from launcher.actors import workers
from launcher.actors.session import Room
from launcher.actors.workers import GroupShape, RankEnded, RankFacts, Report, WorkerGroup, wait_until_gone
from launcher.policy import HOPELESS, Cause, root_cause

Make = Callable[..., WorkerGroup]


@pytest.fixture
def make(room: Room, tmp_path: Path) -> Iterator[Make]:
    """Makes groups, and ends all of them with the test."""
    groups: list[WorkerGroup] = []

    def one(shape: GroupShape, function: str, connected: bool = False) -> WorkerGroup:
        groups.append(
            WorkerGroup(
                shape,
                lambda rank: tmp_path / f"rank{rank}.log",
                str(tmp_path),
                function=f"tests.launcher.toys:{function}",
                connected=connected,
                timeout_seconds=60,
            )
        )
        return groups[-1]

    yield one
    for group in groups:
        group.kill()


def _launch(group: WorkerGroup, task: object) -> None:
    _bring_up(group)
    group.launch(task)


def _bring_up(group: WorkerGroup, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    group.reserve()
    while not group.reservation.held():
        assert time.monotonic() < deadline, "no devices"
        time.sleep(0.02)
    group.start()
    while not group.up():
        assert time.monotonic() < deadline, "ranks do not come up"
        time.sleep(0.02)


def _until_finished(group: WorkerGroup, seconds: float = 60.0) -> list[Report]:
    deadline, reports = time.monotonic() + seconds, []
    while not group.finished():
        assert time.monotonic() < deadline, "ranks do not end"
        reports += group.poll()
        time.sleep(0.02)
    return reports + group.drain()


def _free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def test_bundles_hold_one_tensor_parallel_group_each() -> None:
    assert GroupShape(world_size=8, tensor=4, threads=3).bundles() == [{"CPU": 12.0}, {"CPU": 12.0}]
    assert GroupShape(world_size=2, tensor=1, threads=1, gpus=True).bundles() == [{"CPU": 1.0, "GPU": 1.0}] * 2


def test_ranks_run_side_by_side_and_say_what_they_do(make: Make) -> None:
    group = make(GroupShape(2, tensor=2, threads=1), "count")
    _launch(group, {"steps": 20, "seconds": 0.01})
    reports = _until_finished(group)
    assert [result["step"] for result in group.results()] == [20, 20]
    for rank in (0, 1):
        assert [report.fields["step"] for report in reports if report.rank == rank] == list(range(1, 21))
    pids = [facts.pid for facts in group.facts()]
    assert len(set(pids) | {os.getpid()}) == 3
    assert [facts.rank for facts in group.facts()] == [0, 1]
    group.kill()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)


def test_ranks_meet_in_a_collective_at_an_address_rank_0_chose(make: Make) -> None:
    first = make(GroupShape(2, tensor=2, threads=1), "add_up", connected=True)
    second = make(GroupShape(1, tensor=1, threads=1), "add_up", connected=True)
    _launch(first, {"factor": 10})
    _launch(second, {"factor": 1})  # at the same time, so on another port
    _until_finished(first)
    _until_finished(second)
    assert first.results() == [30.001, 30.001]
    assert second.results() == [1.001]


def test_a_stop_request_reaches_every_rank(make: Make) -> None:
    group = make(GroupShape(2, tensor=1, threads=1), "count")
    _launch(group, {"steps": 10_000, "seconds": 0.01})
    while not group.poll():
        time.sleep(0.02)
    group.request_stop("pause")
    _until_finished(group)
    assert {result["reason"] for result in group.results()} == {"pause"}
    assert all(0 < result["step"] < 10_000 for result in group.results())


def test_a_killed_rank_is_told_from_its_peers_and_its_devices_come_back(make: Make) -> None:
    group = make(GroupShape(2, tensor=2, threads=1), "count")
    _launch(group, {"steps": 10_000, "seconds": 0.01})
    victim = group.facts()[1].pid
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not group.ends():
        assert time.monotonic() < deadline
        group.poll()
        time.sleep(0.02)
    end = root_cause(group.ends())
    assert (end.rank, end.cause) == (1, Cause.RANK_DIED)
    assert str(victim) in end.message
    assert "rank1.log" in end.message
    group.kill()
    while _free_cpus() < 4:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_hangs_delays_nobody_and_can_be_killed(make: Make) -> None:
    group = make(GroupShape(2, tensor=1, threads=1), "count")
    _launch(group, {"steps": 10_000, "seconds": 0.01})
    hanging = group.facts()[0].pid
    os.kill(hanging, signal.SIGSTOP)
    group.poll()  # asks both; the hanging rank never answers
    heard, deadline = 0, time.monotonic() + 30
    while heard < 50:
        assert time.monotonic() < deadline
        start = time.monotonic()
        heard += sum(report.rank == 1 for report in group.poll())
        assert time.monotonic() - start < 2
        time.sleep(0.02)
    assert group.ends() == []
    group.kill(wait_seconds=20)
    assert not psutil.pid_exists(hanging) or psutil.Process(hanging).status() == "zombie"


def test_a_process_of_another_machine_is_not_waited_for_by_its_number() -> None:
    there = RankFacts(rank=0, pid=os.getpid(), node="elsewhere", node_id="1", address="10.0.0.2", gpus=())
    began = time.monotonic()
    wait_until_gone([there], 20)
    assert time.monotonic() < began + 1
    wait_until_gone([replace(there, node=socket.gethostname())], 1)
    assert time.monotonic() > began + 1


def test_a_users_error_names_its_rank_and_text(make: Make) -> None:
    group = make(GroupShape(2, tensor=1, threads=1), "fail")
    _bring_up(group)
    group.launch({"pid": group.facts()[1].pid})
    deadline = time.monotonic() + 30
    while not any(end.cause for end in group.ends()):
        assert time.monotonic() < deadline
        group.poll()
        time.sleep(0.02)
    end = root_cause(group.ends())
    assert (end.rank, end.cause) == (1, Cause.USER_ERROR)
    assert end.message == "ValueError: training.learning_rate 9 is too high: lower it"


def test_an_error_that_cannot_be_pickled_is_still_told(make: Make) -> None:
    group = make(GroupShape(1, tensor=1, threads=1), "unreadable")
    _launch(group, {})
    _until_finished(group)
    assert group.ends()[0].cause is Cause.ERROR
    assert "this and that" in group.ends()[0].message


def test_a_group_that_does_not_fit_beside_another_waits_whole(make: Make) -> None:
    first = make(GroupShape(3, tensor=1, threads=1), "count")
    second = make(GroupShape(2, tensor=2, threads=1), "count")
    _launch(first, {"steps": 10_000, "seconds": 0.01})
    second.reserve()
    time.sleep(0.5)
    assert not second.reservation.held()
    assert _free_cpus() == 1  # it holds no part of what it waits for
    first.kill()
    deadline = time.monotonic() + 20
    while not second.reservation.held():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_output_of_a_rank_lands_in_its_log(make: Make, tmp_path: Path) -> None:
    group = make(GroupShape(1, tensor=1, threads=1), "shout")
    _launch(group, {})
    _until_finished(group)
    assert (tmp_path / "rank0.log").read_text().splitlines() == ["to stdout", "to stderr"]


def test_the_jobs_variables_reach_its_ranks(make: Make) -> None:
    group = make(GroupShape(2, tensor=2, threads=1, environment={"NCCL_SOCKET_IFNAME": "ib0"}), "variable")
    _launch(group, {"name": "NCCL_SOCKET_IFNAME"})
    _until_finished(group)
    assert group.results() == ["ib0", "ib0"]


def test_a_node_of_another_version_ends_the_group_for_good(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "versions_here", lambda: {"espalier": "9.9"})
    group = make(GroupShape(1, tensor=1, threads=1), "count")
    with pytest.raises(RankEnded, match=r"the job was dispatched with 9\.9") as told:
        _bring_up(group)
    assert told.value.end.cause in HOPELESS
