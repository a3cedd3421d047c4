"""The driver of one job: ``python -m launcher.coordinator JOURNAL --address RAY``.

It claims an epoch, connects to Ray and works through the stages, skipping those that are done. It answers to the
journal alone: what it is asked for stands in ``desired.json``, what it does in the events. Killed at any moment, it is
simply started again.
"""

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from launcher.actors.copies import leave, leave_nodes
from launcher.actors.session import OWN, RayStartError, Room, own_servers, ray_session
from launcher.actors.system import NodeLostError, Nodes
from launcher.actors.versions import VersionsDiffer, check_dispatched
from launcher.actors.workers import TRAIN
from launcher.context import STOPPED, JobContext, Stage
from launcher.control import Control, Stopped
from launcher.journal import Journal, StaleEpochError, open_journal
from launcher.life import show_life
from launcher.policy import EXIT_DONE, EXIT_FAILED, EXIT_STALE, EXIT_STOPPED, TEMPORARY_EXIT_CODE
from launcher.states import RESTING, JobState
from parallelism import places
from parallelism.objects import StoreAwayError


@dataclass(frozen=True)
class Options:
    """How a coordinator is started."""

    journal: str
    """Its location."""
    address: str
    devices: int | None = None
    ray_dir: Path | None = None
    keeper: int | None = None
    nodes: int = 1


def coordinate(options: Options, stages: Sequence[Stage], rank_function: str = TRAIN, room: Room | None = None) -> int:
    """One attempt at the job. Returns the process's exit code; raises for faults of this software alone.

    ``room``: what the cluster offers, where this process is connected already.
    """
    journal = open_journal(options.journal)
    spec, control = journal.spec(), Control(journal, options.keeper)
    control.listen()
    journal.claim_epoch()
    if places.is_mirrored(journal.directory):
        show_life(journal.log_path("coordinator"))
    try:
        journal.append("process_started", {"role": "coordinator", "pid": os.getpid(), "node": socket.gethostname()})
        journal.set_state(JobState.STARTING)
        unfit = _unfit(journal)
        if unfit is not None:
            _end(journal, JobState.FAILED, unfit)
            leave(journal)
            return EXIT_FAILED
        with nullcontext(room) if room else _connected(options, journal, control) as found:
            control.listen()  # Ray has put its own handlers in place
            _write_servers(journal, options.address)
            job = JobContext(journal, spec, found, control, Nodes(str(journal.directory)).collect, rank_function)
            state, error = _work(job, stages)
            _write_servers(journal, options.address, "process_ended")
            _end(journal, state, error)
            leave_nodes(journal)
        leave(journal)
    except (StaleEpochError, RayStartError, NodeLostError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return EXIT_STALE if isinstance(error, StaleEpochError) else TEMPORARY_EXIT_CODE
    finally:
        if options.ray_dir is not None:
            shutil.rmtree(options.ray_dir, ignore_errors=True)
    return {JobState.SUCCEEDED: EXIT_DONE, JobState.FAILED: EXIT_FAILED}.get(state, EXIT_STOPPED)


def _unfit(journal: Journal) -> str | None:
    """Why this process cannot work on a job that was dispatched by another machine, if it cannot."""
    try:
        check_dispatched(journal, f"the coordinator's node {socket.gethostname()}")
    except VersionsDiffer as error:
        return str(error)
    return None


@contextmanager
def _connected(options: Options, journal: Journal, control: Control) -> Iterator[Room]:
    def tell(reason: str) -> None:
        journal.append("waiting", {"reason": reason})

    tell("Ray to start" if options.address == OWN else f"Ray at {options.address}")
    threads = journal.spec().execution.threads_per_rank
    with ray_session(
        options.address, options.devices, threads, options.ray_dir, options.nodes, tell, control.reason
    ) as room:
        yield room


def _write_servers(journal: Journal, address: str, kind: str = "process_started") -> None:
    """A cluster of this process's own belongs to the job as its workers do."""
    if address == OWN:
        for name, pid in own_servers():
            journal.append(kind, {"role": "ray", "name": name, "pid": pid, "node": socket.gethostname()})


def _work(job: JobContext, stages: Sequence[Stage]) -> tuple[JobState, str | None]:
    """Work through the stages; the state in which the job comes to rest, and its error."""
    try:
        job.check()
        job.journal.set_state(JobState.RUNNING, room=_describe(job.room))
        for stage in stages:
            stage(job)
        job.pool.close()
    except Stopped as stopped:
        return STOPPED[stopped.reason], None
    except ValueError as error:
        return JobState.FAILED, str(error)
    if job.failures:
        return JobState.FAILED, _failures(job)
    return JobState.SUCCEEDED, None


def _end(journal: Journal, state: JobState, error: str | None) -> None:
    """The last words of the attempt; the state comes last, because with it the job is free."""
    assert state in RESTING
    journal.append("job_finished", {"state": state.value, "error": error})
    journal.append("process_ended", {"role": "coordinator", "pid": os.getpid(), "node": socket.gethostname()})
    journal.set_state(state, **({"error": error} if error else {}))


def _failures(job: JobContext) -> str:
    """One line for people: which candidates failed, and why."""
    causes = "; ".join(f"{name}: {error}" for name, error in job.failures.items())
    return f"{len(job.failures)} of {len(job.spec.candidates)} candidates failed: {causes}"


def _describe(room: Room) -> dict[str, object]:
    return {"devices": room.devices, "threads": room.threads, "gpus": room.gpus, "cores": room.cores}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(prog="python -m launcher.coordinator", description="Drive one job.")
    parser.add_argument("journal", help="the job's directory, or its address in an object store")
    parser.add_argument("--address", required=True, help="a Ray cluster, or 'own' for one that ends with this process")
    parser.add_argument("--devices", type=int, help="ranks the job may hold at once; default: what the cluster has")
    parser.add_argument("--ray-dir", type=Path, help="own cluster: its short temporary directory, removed at the end")
    parser.add_argument("--keeper", type=int, metavar="PID", help="checkpoint and end when this parent process is gone")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the cluster to wait for")
    given = parser.parse_args(arguments)
    return Options(given.journal, given.address, given.devices, given.ray_dir, given.keeper, given.nodes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the coordinator's process."""
    from launcher.stages.line import STAGES

    try:
        return coordinate(parse(arguments), STAGES)
    except StoreAwayError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return TEMPORARY_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
