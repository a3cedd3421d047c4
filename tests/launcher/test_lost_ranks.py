"""Ranks that Ray cannot reach: at first nobody knows whether their node has gone with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from launcher.actors import pool, workers
from launcher.actors.pool import Pool, Task, TaskFailed
from launcher.actors.session import Room
from launcher.actors.workers import GroupShape, RankEnded, RankFacts, WorkerGroup
from launcher.policy import Cause
from tests.launcher.made import new_journal


class FakeRay:
    """Calls are answered at once: with what a function returns, or with the error that it returns."""

    def __init__(self) -> None:
        self.nodes_alive = ["here", "there"]

    def kill(self, actor: "FakeActor", no_restart: bool) -> None:
        pass

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node, "Alive": True} for node in self.nodes_alive]

    def wait(self, refs: list["Call"], num_returns: int = 1, timeout: float = 0) -> tuple[list["Call"], list["Call"]]:
        ready = [ref for ref in refs if ref.answered]
        return ready, [ref for ref in refs if not ref.answered]

    def get(self, ref: "Call", timeout: float) -> Any:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer


class Call:
    """A call of a rank, which stands for what comes of it."""

    def __init__(self, answer: Any, answered: bool = True) -> None:
        self.answer, self.answered = answer, answered


class FakeMethod:
    def __init__(self, answer: Callable[[], Any]) -> None:
        self._answer = answer

    def remote(self) -> Call:
        return Call(self._answer())


class FakeActor:
    """A rank that answers with ``answer()``."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.facts = self.poll = FakeMethod(answer)
        self.run = FakeMethod(_unreachable)


FACTS = [RankFacts(0, 1, "n1", "here", "", ()), RankFacts(1, 2, "n2", "there", "", ())]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    found = FakeRay()
    monkeypatch.setattr(workers, "ray", found)
    monkeypatch.setattr(pool, "ray", found)
    return found


def _group(fate: Callable[[], Any]) -> WorkerGroup:
    """Two ranks at work; the second one's call has failed, and it answers no other than with its fate."""
    group = WorkerGroup(GroupShape(2, 1, 1), lambda rank: Path(f"rank{rank}.log"), "here")
    group._actors = [FakeActor(list), FakeActor(fate)]
    group._facts = FACTS
    group._runs = {Call(None, answered=False): 0, Call(_unreachable()): 1}
    return group


def _unreachable() -> Exception:
    return ActorUnavailableError("the connection is lost", None)


def test_a_rank_that_is_lost_with_its_node_is_not_called_dead_before_ray_knows(fake: FakeRay) -> None:
    fate = [_unreachable()]
    group = _group(lambda: fate[0])
    for _ in range(5):
        group.poll()
        assert (group.ends(), group.unsure()) == ([], True)
    fate[0], fake.nodes_alive = ActorDiedError(), ["here"]
    group.poll()
    group.poll()
    (end,) = group.ends()
    assert (end.rank, end.cause, group.unsure()) == (1, Cause.NODE_LOST, False)


def test_a_rank_that_died_alone_has_died(fake: FakeRay) -> None:
    group = _group(ActorDiedError)
    group.poll()
    group.poll()
    assert [end.cause for end in group.ends()] == [Cause.RANK_DIED]


def test_a_rank_that_was_lost_for_a_moment_has_lost_its_work(fake: FakeRay) -> None:
    group = _group(list)
    group.poll()
    group.poll()
    (end,) = group.ends()
    assert (end.cause, end.message) == (Cause.ERROR, "Ray lost the connection to it")


def test_nobody_doubts_for_ever(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    group = _group(_unreachable)
    group.poll()
    monkeypatch.setattr(workers, "LOST_NODE_SECONDS", -1.0)
    group.poll()
    assert [end.cause for end in group.ends()] == [Cause.RANK_DIED]


def test_a_rank_that_is_lost_while_it_starts(fake: FakeRay) -> None:
    fate = [_unreachable()]
    group = _group(lambda: fate[0])
    group._runs, group._facts = {}, []
    group._pending_facts = [Call(FACTS[0]), Call(_unreachable())]
    assert not group.alive()
    assert not group.up()
    fate[0] = ActorDiedError()
    assert not group.alive()
    with pytest.raises(RankEnded):
        group.alive()


def test_a_rank_that_does_not_answer_is_doubted(fake: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    group = _group(list)
    group._runs = {Call(None, answered=False): 0}
    group._polls, group._asked_at = {Call(None, answered=False): 0}, {0: 0.0}
    assert group.unsure()
    group._asked_at = {0: float("inf")}
    assert not group.unsure()


class Held:
    """A reservation."""

    def give_back(self) -> None:
        pass


def _pool_at_work(folder: Path, fate: Callable[[], Any]) -> Pool:
    """One worker, whose task has failed, and which answers no other question than with its fate."""
    journal = new_journal(folder)
    journal.claim_epoch()
    found = Pool(journal, Room(1, 1, False, 1), max_restarts=0, check=lambda: None, memory_bytes=1)
    worker = pool._Worker(0, Held(), folder / "log", FakeActor(fate), facts=FACTS[1], task=Task("prune", "f"))
    worker.call = worker.actor.run.remote()
    found._workers = [worker]
    return found


def test_a_task_that_is_lost_with_its_node_says_nothing_about_the_task(fake: FakeRay, tmp_path: Path) -> None:
    fate = [_unreachable()]
    lost = _pool_at_work(tmp_path, lambda: fate[0])
    for _ in range(5):
        assert lost._collect(lambda *_: None) == []
    fate[0], fake.nodes_alive = ActorDiedError(), ["here"]
    assert lost._collect(lambda *_: None) == []
    assert [task.name for task in lost._collect(lambda *_: None)] == ["prune"]  # though it may not be lost even once
    assert lost._workers == []


@pytest.mark.parametrize(("fate", "told"), [(ActorDiedError, "is gone"), (list, "lost the connection")])
def test_a_worker_that_died_alone_or_lost_its_task_counts(
    fake: FakeRay, tmp_path: Path, fate: Callable[[], Any], told: str
) -> None:
    lost = _pool_at_work(tmp_path, fate)
    lost._collect(lambda *_: None)
    with pytest.raises(TaskFailed, match=told):
        lost._collect(lambda *_: None)
