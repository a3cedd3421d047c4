"""One candidate's process group on Ray: a placement group, one actor per device, polled and never called back.

A placement-group bundle holds one tensor-parallel group, so that it stays on one node; the whole group is reserved at
once, so that candidates cannot deadlock each other. torch is imported only inside the actors.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from launcher.actors.reservation import Bundle, Reservation
from launcher.actors.versions import check_versions, versions_here
from launcher.life import show_life
from launcher.policy import Cause, Ended, cause_of_exit, classify
from launcher.told import ToldSteps
from parallelism import places
from parallelism.registry import load
from parallelism.stop import StopReason, StopRequest

TRAIN = "parallelism.run:run_task"
CONNECT = "parallelism.device:connect"
HOST_STORE = "parallelism.device:host_store"
LOST_NODE_SECONDS, ANSWER_SECONDS = 30.0, 1.0
"""Within what time Ray notices that a node is gone, whatever its settings, and a rank that lives answers."""
LOST_CONNECTION = "Ray lost the connection to it"
PROCESS_SECONDS = 300.0
"""Within what time Ray has a process up on a device that is held, on the busiest machine."""
NO_PROCESS = f"Ray did not bring its process up within {PROCESS_SECONDS:g} s"

STORE_PATIENCE_SECONDS = 60.0
"""How long a worker waits for an object store; a checkpoint that cannot be stored is tried again, a task elsewhere."""

RankFunction = Callable[[Any, Callable[[str, dict[str, Any]], None], StopRequest], Any]
"""``(task, report, stop) -> result``: what a rank runs once the process group is connected."""


@dataclass(frozen=True)
class Report:
    """One thing a rank said; the time is the rank's clock, seconds since 1970."""

    rank: int
    time: float
    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class RankFacts:
    """Where a rank lives."""

    rank: int
    pid: int
    node: str
    node_id: str
    address: str
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class GroupShape:
    """Resources of a process group. Rank ``r`` lives in bundle ``r // tensor``."""

    world_size: int
    tensor: int
    threads: int
    gpus: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the ranks, over those of their nodes."""

    def bundles(self) -> list[Bundle]:
        """What each tensor-parallel group needs."""
        bundle: Bundle = {"CPU": float(self.tensor * self.threads)}
        if self.gpus:
            bundle["GPU"] = float(self.tensor)
        return [bundle] * (self.world_size // self.tensor)


class RankProcess:
    """One rank, in a process of its own."""

    def __init__(self, rank: int, log: str, place: str, versions: dict[str, str]) -> None:
        settle_in(log, place)
        self._rank = rank
        self._versions = versions
        self._stop = StopRequest()
        self._reports: list[Report] = []
        self._lock = threading.Lock()
        self._store: Any = None
        self._told = ToldSteps(Path(log))

    def facts(self) -> RankFacts:
        """Where this rank lives. Raises ``VersionsDiffer`` on a node that has others than the coordinator's."""
        check_versions(self._versions, f"node {socket.gethostname()}")
        return process_facts(self._rank)

    def warm_up(self, modules: list[str]) -> None:
        """Import what the work will need; all ranks do so at once, before the first of them opens the rendezvous."""
        for module in modules:
            load(module)

    def host(self, timeout_seconds: float) -> tuple[str, int]:
        """Rank 0 only: open the rendezvous on a free port and say where it is."""
        address = ray.util.get_node_ip_address()
        self._store = load(HOST_STORE)(address, timeout_seconds=timeout_seconds)
        return address, self._store.port

    def run(
        self,
        function: str,
        task: Any,
        world_size: int,
        rendezvous: tuple[str, int] | None,
        threads: int,
        timeout_seconds: float,
    ) -> Any:
        """Connect to the other ranks and run ``function(task, report, stop)``; its result.

        All of it happens in the calling thread, to which megatron-core's adaptation to the CPU is bound.
        """
        if rendezvous is not None:
            load(CONNECT)(
                self._rank,
                world_size,
                *rendezvous,
                threads=threads,
                timeout_seconds=timeout_seconds,
                # Ray shows each actor its own GPUs only, so that a rank's device is always the first.
                local_rank=0,
                store=self._store,
            )
        work: RankFunction = load(function)
        return work(task, self._report, self._stop)

    def poll(self) -> list[Report]:
        """What this rank said since the last call."""
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def stop(self, reason: StopReason) -> None:
        """Ask the rank to checkpoint and return."""
        self._stop.request(reason)

    def _report(self, kind: str, fields: dict[str, Any]) -> None:
        now = time.time()
        if kind == "committing":
            self._told.share()  # before the checkpoint counts: what it holds can be told by others then
            return
        if kind == "step":
            with contextlib.suppress(OSError):  # a full disk does not end training
                self._told.add({**fields, "time": now})
        with self._lock:
            self._reports.append(Report(self._rank, now, kind, fields))


def process_facts(rank: int) -> RankFacts:
    """Where this process, an actor, lives."""
    context = ray.get_runtime_context()
    return RankFacts(
        rank=rank,
        pid=os.getpid(),
        node=socket.gethostname(),
        node_id=context.get_node_id(),
        address=ray.util.get_node_ip_address(),
        gpus=tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])),
    )


def settle_in(log: str, place: str) -> None:
    """Begin the life of a worker's process of the job whose journal is at ``place``."""
    places.at(place, STORE_PATIENCE_SECONDS)
    send_output_to(Path(log))
    show_life(Path(log))


def environment_option(variables: Mapping[str, str]) -> dict[str, Any]:
    """What Ray is told of an actor's variables: nothing for none, which lets it take a process that is ready."""
    return {"runtime_env": {"env_vars": dict(variables)}} if variables else {}


def send_output_to(log: Path) -> None:
    """Everything this process prints, tracebacks of crashes included, goes into the journal's log file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    faulthandler.enable()


class WorkerGroup:
    """A process group and what it said. Methods return at once; only :meth:`drain` and :meth:`kill` wait, with a bound.

    ``log`` names each rank's log file, ``place`` the journal's location. ``function`` is the dotted path of what a rank
    runs; ``connected=False`` leaves torch.distributed out. Collectives wait for ``timeout_seconds``.
    """

    def __init__(
        self,
        shape: GroupShape,
        log: Callable[[int], Path],
        place: str,
        *,
        function: str = TRAIN,
        connected: bool = True,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.shape = shape
        self._log = log
        self._place = place
        self._function = function
        self._connected = connected
        self._timeout_seconds = timeout_seconds
        self._reservation: Reservation | None = None
        self._actors: list[Any] = []
        self._facts: list[RankFacts] = []
        self._pending_facts: list[Any] = []
        self._pending_imports: list[Any] = []
        self._pending_host: Any = None
        self._rendezvous: tuple[str, int] | None = None
        self._runs: dict[Any, int] = {}
        self._polls: dict[Any, int] = {}
        self._asked_at: dict[int, float] = {}
        self._questions: dict[Any, int] = {}
        self._doubts: dict[int, float] = {}
        self._results: dict[int, Any] = {}
        self._ends: dict[int, Ended] = {}

    def reserve(self) -> None:
        """Ask for all devices at once."""
        self._reservation = Reservation(self.shape.bundles())

    @property
    def reservation(self) -> Reservation:
        """The devices."""
        assert self._reservation is not None, "devices are reserved first"
        return self._reservation

    def start(self) -> None:
        """Create the actors on the reserved devices."""
        for rank in range(self.shape.world_size):
            actor = ray.remote(RankProcess).options(
                **environment_option(self.shape.environment),
                num_cpus=self.shape.threads,
                num_gpus=1 if self.shape.gpus else 0,
                scheduling_strategy=self.reservation.place(rank // self.shape.tensor),
                max_concurrency=4,
                max_restarts=0,
                max_task_retries=0,
            )
            self._actors.append(actor.remote(rank, str(self._log(rank)), self._place, versions_here()))
        self._pending_facts = [actor.facts.remote() for actor in self._actors]
        modules = [self._function, *([CONNECT, HOST_STORE] if self._connected else [])]
        self._pending_imports = [actor.warm_up.remote(modules) for actor in self._actors]

    def alive(self) -> bool:
        """Whether every rank has a process; :meth:`facts` says which. Raises :class:`RankEnded`."""
        self._hear()
        if not self._facts and self._pending_facts and _all_ready(self._pending_facts):
            with contextlib.suppress(ActorUnavailableError):
                self._facts = [self._value(rank, ref) for rank, ref in enumerate(self._pending_facts)]
        return bool(self._facts)

    def up(self) -> bool:
        """Whether every rank can start to work, rank 0 having opened the rendezvous. Raises :class:`RankEnded`."""
        if not self.alive() or not _all_ready(self._pending_imports):
            return False
        with contextlib.suppress(ActorUnavailableError):
            self._prepare()
        return self._rendezvous is not None or (not self._connected and not self._pending_imports)

    def _prepare(self) -> None:
        if self._pending_imports:
            for rank, ref in enumerate(self._pending_imports):
                self._value(rank, ref)
            self._pending_imports = []
            if self._connected:
                self._pending_host = self._actors[0].host.remote(self._timeout_seconds)
        if self._pending_host is not None and _all_ready([self._pending_host]):
            self._rendezvous, self._pending_host = self._value(0, self._pending_host), None

    def launch(self, task: Any) -> None:
        """Have every rank connect and run the group's function on ``task``."""
        assert self.up()
        shape = self.shape
        for rank, actor in enumerate(self._actors):
            ref = actor.run.remote(
                self._function, task, shape.world_size, self._rendezvous, shape.threads, self._timeout_seconds
            )
            self._runs[ref] = rank

    def facts(self) -> list[RankFacts]:
        """Where the ranks live; empty until they are up."""
        return self._facts

    def poll(self) -> list[Report]:
        """Collect what the ranks have said and which of them have ended. A rank that does not answer delays nothing."""
        self._hear()
        reports = self._collect()
        for ref in _ready(list(self._runs)):
            self._settle(self._runs.pop(ref), ref)
        self._ask(set(self._runs.values()) - set(self._polls.values()))
        return reports

    def drain(self, wait_seconds: float = 5.0) -> list[Report]:
        """The last words of ranks that have ended; waits for the answers, but not for longer than ``wait_seconds``."""
        deadline = time.monotonic() + wait_seconds
        reports = self._wait_for_answers(deadline)
        self._ask(set(range(len(self._actors))))
        return reports + self._wait_for_answers(deadline)

    def _ask(self, ranks: set[int]) -> None:
        self._polls |= {self._actors[rank].poll.remote(): rank for rank in sorted(ranks)}
        self._asked_at |= dict.fromkeys(ranks, time.monotonic())

    def _wait_for_answers(self, deadline: float) -> list[Report]:
        if self._polls:
            ray.wait(list(self._polls), num_returns=len(self._polls), timeout=max(0.0, deadline - time.monotonic()))
        return self._collect()

    def _collect(self) -> list[Report]:
        reports: list[Report] = []
        for ref in _ready(list(self._polls)):
            rank = self._polls.pop(ref)
            try:
                reports += ray.get(ref, timeout=10)
            except ActorUnavailableError as error:
                self._doubt(rank, error)
            except RayError:  # how a rank ended is told by its run
                continue
        return sorted(reports, key=lambda report: report.time)

    def ends(self) -> list[Ended]:
        """The ranks that have ended so far, with their cause, or none where they returned."""
        return [self._ends[rank] for rank in sorted(self._ends)]

    def unsure(self) -> bool:
        """Whether a rank neither answers nor has ended, as far as Ray knows: its node may have gone with it."""
        late = time.monotonic() - ANSWER_SECONDS
        silent = {rank for rank in self._polls.values() if self._asked_at[rank] < late}
        return any(rank not in self._ends for rank in silent | set(self._doubts))

    def finished(self) -> bool:
        """Whether every rank has ended."""
        return len(self._ends) == self.shape.world_size

    def results(self) -> list[Any]:
        """The results by rank, once all have returned."""
        return [self._results[rank] for rank in range(self.shape.world_size)]

    def request_stop(self, reason: StopReason) -> None:
        """Ask every rank to checkpoint and return."""
        for actor in self._actors:
            actor.stop.remote(reason)

    def kill(self, wait_seconds: float = 10.0) -> None:
        """End every process and give the devices back; waits until those of this machine are really gone."""
        for actor in self._actors:
            ray.kill(actor, no_restart=True)
        if self._reservation is not None:
            self._reservation.give_back()
        wait_until_gone(self._facts, wait_seconds)
        self._actors, self._runs, self._polls, self._questions, self._doubts = [], {}, {}, {}, {}

    def _value(self, rank: int, ref: Any) -> Any:
        """Raises :class:`RankEnded`, and ``ActorUnavailableError`` while it is not known what became of the rank."""
        if rank in self._ends:
            raise RankEnded(self._ends[rank])
        try:
            return ray.get(ref, timeout=10)
        except ActorUnavailableError as error:
            self._doubt(rank, error)
            raise
        except RayError as error:
            raise RankEnded(self._end(rank, error)) from error

    def _end(self, rank: int, error: RayError) -> Ended:
        facts = next((facts for facts in self._facts if facts.rank == rank), None)
        return end_of(rank, error, facts, self._log(rank))

    def _settle(self, rank: int, ref: Any) -> None:
        try:
            self._results[rank] = ray.get(ref, timeout=60)
            self._ends[rank] = Ended(rank, None)
        except ActorUnavailableError as error:
            self._doubt(rank, error)
        except RayError as error:
            self._ends[rank] = self._end(rank, error)

    def _doubt(self, rank: int, error: ActorUnavailableError) -> None:
        """Ray cannot reach a rank. It says so at once, but takes a while to notice that the node is gone: ask again."""
        began = self._doubts.setdefault(rank, time.monotonic())
        if time.monotonic() > began + LOST_NODE_SECONDS:
            self._ends[rank] = self._end(rank, error)
        elif rank not in self._questions.values():
            self._questions[self._actors[rank].facts.remote()] = rank

    def _hear(self) -> None:
        """What has become of ranks that could not be reached."""
        for ref in _ready(list(self._questions)):
            rank = self._questions.pop(ref)
            try:
                ray.get(ref, timeout=10)
            except ActorUnavailableError as error:
                self._doubt(rank, error)
            except RayError as error:
                self._ends[rank] = self._end(rank, error)
            else:
                del self._doubts[rank]
                if rank not in self._runs.values():
                    self._ends.setdefault(rank, Ended(rank, Cause.ERROR, LOST_CONNECTION))


def end_of(rank: int, error: RayError, facts: RankFacts | None, log: Path) -> Ended:
    """How the process behind a failed call ended; ``facts`` says where it lived, if it came that far."""
    if isinstance(error, RayTaskError):
        cause = error.cause if isinstance(error.cause, BaseException) else error
        return Ended(rank, classify(_class_names(cause)), _one_line(cause))
    if isinstance(error, ActorDiedError) and error.preempted:
        return Ended(rank, Cause.PREEMPTED, "its node was taken away")
    if not isinstance(error, RayActorError):
        return Ended(rank, classify(_class_names(error)), _one_line(error))
    cause_of_death = cause_of_exit(None, node_alive=facts is None or facts.node_id in live_nodes())
    process = f"process {facts.pid} on {facts.node}" if facts else "its process"
    return Ended(rank, cause_of_death, f"{process} is gone; its last words are in {log}")


class RankEnded(RuntimeError):
    """A rank did not come up."""

    def __init__(self, end: Ended) -> None:
        super().__init__(end.message)
        self.end = end


def live_nodes() -> set[str]:
    """Identifiers of the cluster's nodes that are up."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def wait_until_gone(processes: Iterable[RankFacts], seconds: float) -> None:
    """Wait until none of them runs on this machine any more, but no longer than ``seconds``.

    Those of other machines cannot be seen from here; a number of theirs may be another process's here.
    """
    pids = {facts.pid for facts in processes if facts.node == socket.gethostname()}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(_runs(pid) for pid in pids):
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _ready(refs: list[Any]) -> list[Any]:
    return list(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else []


def _all_ready(refs: list[Any]) -> bool:
    return len(_ready(refs)) == len(refs)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:2000]}"


def _class_names(error: BaseException) -> tuple[str, ...]:
    return tuple(kind.__name__ for kind in type(error).__mro__)
