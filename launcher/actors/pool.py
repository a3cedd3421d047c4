"""Short tasks on worker processes, for the stages that do not train: taken up again when a worker dies.

A task is a function by its dotted path, with arguments that travel as they are. torch is imported only inside workers.
"""

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from launcher.actors.reservation import Bundle, Reservation
from launcher.actors.session import Room
from launcher.actors.versions import check_versions, versions_here
from launcher.actors.workers import (
    LOST_CONNECTION,
    LOST_NODE_SECONDS,
    NO_PROCESS,
    PROCESS_SECONDS,
    GroupShape,
    RankFacts,
    end_of,
    process_facts,
    settle_in,
    wait_until_gone,
)
from launcher.journal import Journal
from launcher.policy import HOPELESS, UNCOUNTED, Cause, Ended
from parallelism.registry import load

ROLE = "worker"
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Task:
    """One call: ``function(**arguments)``. ``candidate`` is the one it works for, if any.

    ``memory_bytes``: what it needs at its peak, as far as that is known; tasks run side by side while they fit.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    candidate: str | None = None
    memory_bytes: int = 0


Done = Callable[[Task, Any], Iterable[Task] | None]
"""What is made of a task's result; the tasks that it returns are run as well."""


class TaskFailed(ValueError):
    """A task that would fail the same way again, or has lost too many workers."""

    def __init__(self, task: Task, end: Ended) -> None:
        super().__init__(f"{task.name}: {end.message}")
        self.task = task
        self.end = end


class TaskProcess:
    """One worker, in a process of its own."""

    def __init__(self, number: int, log: str, place: str, versions: dict[str, str]) -> None:
        settle_in(log, place)
        self._number = number
        self._versions = versions

    def facts(self) -> RankFacts:
        """Where this worker lives."""
        return process_facts(self._number)

    def run(self, function: str, arguments: dict[str, Any]) -> Any:
        """``function(**arguments)``. Raises ``VersionsDiffer`` on a node that has others than the coordinator's."""
        check_versions(self._versions, f"node {socket.gethostname()}")
        return load(function)(**arguments)


def cluster_memory_bytes() -> int:
    """What tasks on the connected cluster may use together."""
    return int(ray.cluster_resources().get("memory", 0.0))


@dataclass
class _Worker:
    """A worker, or (``actor`` is None) one whose device is not held yet."""

    number: int
    reservation: Reservation
    log: Path
    actor: Any = None
    started_at: float = 0.0
    pending_facts: Any = None
    facts: RankFacts | None = None
    task: Task | None = None
    call: Any = None
    """The task's; or, once Ray could not reach the worker, a question whether it lives."""
    doubted_at: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether it can be given a task."""
        return self.actor is not None and self.task is None


class Pool:
    """Workers, at most one per device, hired when there is work and kept until :meth:`close`.

    ``check`` is called in every turn of the loop; what it raises ends the work. ``memory_bytes`` is what all tasks
    together may need.
    """

    def __init__(
        self, journal: Journal, room: Room, max_restarts: int, check: Callable[[], None], memory_bytes: int
    ) -> None:
        self._journal = journal
        self._room = room
        self._max_restarts = max_restarts
        self._check = check
        self._memory_bytes = memory_bytes
        self._made = 0
        self._workers: list[_Worker] = []
        self._losses: dict[str, int] = {}

    def close(self) -> None:
        """Give the devices back; waits until the workers are gone."""
        processes = [worker.facts for worker in self._workers if worker.facts]
        for worker in list(self._workers):
            self._dismiss(worker)
        wait_until_gone(processes, seconds=10.0)

    def run(self, tasks: Iterable[Task], done: Done) -> None:
        """Run the tasks and those that ``done`` adds, at most one per worker at a time.

        ``done`` is called here, in the order in which they end.

        Raises :class:`TaskFailed`, and what ``check`` raises; the workers are gone then.
        """
        waiting = list(tasks)
        try:
            while waiting or any(worker.task for worker in self._workers):
                self._check()
                waiting = self._collect(done) + waiting
                self._assign(waiting)
                self._hire(waiting)
                time.sleep(POLL_SECONDS)
        finally:
            if any(worker.task for worker in self._workers):
                self.close()
            for worker in [worker for worker in self._workers if worker.actor is None]:
                self._dismiss(worker)

    def _assign(self, waiting: list[Task]) -> None:
        """Give the workers that are there something to do."""
        for worker in self._workers:
            if worker.idle and (task := self._next(waiting)) is not None:
                worker.task = task
                worker.call = worker.actor.run.remote(task.function, task.arguments)

    def _next(self, waiting: list[Task]) -> Task | None:
        """The first task that fits beside those that run, taken off the list; alone, any task may try."""
        running = [worker.task.memory_bytes for worker in self._workers if worker.task]
        free = self._memory_bytes - sum(running)
        for place, task in enumerate(waiting):
            if not running or task.memory_bytes <= free:
                return waiting.pop(place)
        return None

    def _hire(self, waiting: list[Task]) -> None:
        """Ask for a device for every task that could run now, and start workers on those that are held.

        Tasks do not wait for a certain worker: a device that never comes holds up nothing that another one can do.
        """
        asked = [worker for worker in self._workers if worker.actor is None]
        for worker in asked:
            if worker.reservation.held():
                self._start(worker)
        room = self._room.devices - len(self._workers)
        for _ in range(min(room, self._startable(waiting) - len(asked))):
            number, self._made = self._made, self._made + 1
            log = self._journal.log_path(f"{ROLE}.e{self._journal.epoch:04d}-{number}")
            self._workers.append(_Worker(number, Reservation([self._bundle]), log))
        self._complain(waiting)

    def _startable(self, waiting: list[Task]) -> int:
        """How many of the waiting tasks fit beside those that run."""
        running = [worker.task.memory_bytes for worker in self._workers if worker.task]
        free, count = self._memory_bytes - sum(running), 0
        for task in waiting:
            if task.memory_bytes <= free or not (running or count):
                free, count = free - task.memory_bytes, count + 1
        return count

    def _complain(self, waiting: list[Task]) -> None:
        """Say what the cluster lacks where a task waits for a worker."""
        asking = next((worker for worker in self._workers if worker.actor is None), None)
        lacking = asking.reservation.complaint() if asking and waiting else None
        if lacking:
            fields = {"candidate": waiting[0].candidate, "reason": f"a worker for {waiting[0].name} needs {lacking}"}
            self._journal.append("waiting", fields)

    @property
    def _bundle(self) -> Bundle:
        """What a worker needs."""
        return GroupShape(1, 1, self._room.threads, self._room.gpus).bundles()[0]

    def _start(self, worker: _Worker) -> None:
        process: Any = ray.remote(TaskProcess).options(
            num_cpus=self._room.threads,
            num_gpus=1 if self._room.gpus else 0,
            scheduling_strategy=worker.reservation.place(),
            max_restarts=0,
            max_task_retries=0,
        )
        worker.actor = process.remote(worker.number, str(worker.log), self._journal.location, versions_here())
        worker.started_at = time.monotonic()
        worker.pending_facts = worker.actor.facts.remote()

    def _collect(self, done: Done) -> list[Task]:
        """Take in what has ended; returns the tasks whose worker was lost, and those that follow from results."""
        next_tasks: list[Task] = []
        for worker in list(self._workers):
            self._introduce(worker)
            task = worker.task
            if task is None:
                continue
            if not ray.wait([worker.call], timeout=0)[0]:
                if worker.facts is None and time.monotonic() > worker.started_at + PROCESS_SECONDS:
                    self._after_end(worker, task, Ended(worker.number, Cause.STALLED, NO_PROCESS))
                    next_tasks.append(task)
                continue
            try:
                result = ray.get(worker.call, timeout=60)
            except RayError as error:
                if not _is_in_doubt(worker, error):
                    self._after_end(worker, task, end_of(worker.number, error, worker.facts, worker.log), error)
                    next_tasks.append(task)
                continue
            if worker.doubted_at:  # it lives, but nobody hears any more what became of its task
                self._after_end(worker, task, Ended(worker.number, Cause.ERROR, LOST_CONNECTION))
                next_tasks.append(task)
                continue
            worker.task = None
            next_tasks += done(task, result) or ()
        return next_tasks

    def _after_end(self, worker: _Worker, task: Task, end: Ended, error: RayError | None = None) -> None:
        """The task may be tried again on another worker, or :class:`TaskFailed` is raised."""
        self._dismiss(worker)
        assert end.cause is not None
        if end.cause not in UNCOUNTED:
            self._losses[task.name] = self._losses.get(task.name, 0) + 1
        if end.cause in HOPELESS or self._losses.get(task.name, 0) > self._max_restarts:
            raise TaskFailed(task, end) from error
        fields = {"task": task.name, "candidate": task.candidate, "reason": end.cause.value, "message": end.message}
        self._journal.append("task_restart", fields)

    def _introduce(self, worker: _Worker) -> None:
        """Write down where a worker lives, as soon as it is known."""
        if worker.actor is not None and worker.facts is None and ray.wait([worker.pending_facts], timeout=0)[0]:
            try:
                worker.facts = ray.get(worker.pending_facts, timeout=10)
            except RayError:
                return  # its first call tells how it ended
            self._journal.append("process_started", {"role": ROLE, "candidate": None, **asdict(worker.facts)})

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        if worker.actor is not None:
            ray.kill(worker.actor, no_restart=True)
        worker.reservation.give_back()
        if worker.facts:
            where = {"rank": worker.number, "pid": worker.facts.pid, "node": worker.facts.node}
            self._journal.append("process_ended", {"role": ROLE, "candidate": None, **where})


def _is_in_doubt(worker: _Worker, error: RayError) -> bool:
    """Whether nobody knows yet what became of a worker: Ray takes a while to notice that a node is gone. Asks again."""
    if not isinstance(error, ActorUnavailableError):
        return False
    worker.doubted_at = worker.doubted_at or time.monotonic()
    if time.monotonic() > worker.doubted_at + LOST_NODE_SECONDS:
        return False
    worker.call = worker.actor.facts.remote()
    return True
