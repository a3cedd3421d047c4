"""What machines hold of a job whose journal is in an object store: gone when the job rests. Torch-free."""

import contextlib
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.journal import Journal, open_journal
from parallelism import places

FEEDER = "tracking"
"""The folder of a process that may live longer than the coordinator."""
SECONDS = 60.0
STORE_PATIENCE_SECONDS = 20.0


def leave_nodes(journal: Journal) -> None:
    """Delete what the other nodes of the connected cluster hold; one that does not answer keeps it."""
    if not places.is_mirrored(journal.directory):
        return
    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    calls = [_on(node).remote(journal.location) for node in others]
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=SECONDS)


def leave(journal: Journal) -> None:
    """Delete what this machine holds, the end of its logs stored first."""
    if not places.is_mirrored(journal.directory):
        return
    logs = journal.logs_dir
    for log in sorted(logs.glob("*.log")) if logs.is_dir() else []:
        if log.stem != FEEDER:
            with contextlib.suppress(OSError):  # the log of a job that has done its work is no reason to fail it
                places.share_content(log)
    places.leave(logs, except_for=(f"{FEEDER}.log",))
    places.leave(journal.directory, except_for=(FEEDER, logs.name))


def _on(node: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(leave_here).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)


def leave_here(location: str) -> None:
    """As :func:`leave`, in a process that does not know the job yet."""
    places.at(location, STORE_PATIENCE_SECONDS)
    leave(open_journal(location))
