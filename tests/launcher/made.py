"""Small job specs for the tests of the launcher."""

from pathlib import Path
from typing import Any

from launcher.journal import Journal
from launcher.planning.cluster import GIBI, Cluster
from launcher.spec import JobSpec


def spec_document(**changes: Any) -> dict[str, Any]:
    """A job of one small candidate as its owner would write it."""
    return {
        "name": "tiny",
        "data": {"train": ["builtin:python-stdlib"], "tokenizer": {"kind": "bytes"}, "sequence_length": 32},
        "budget": {"tokens": 4096},
        "candidates": [{"name": "small", "model": {"family": "gpt", "layers": 1, "hidden": 16, "heads": 2}}],
    } | changes


def cpus(devices: int = 2, gibibytes: float = 8.0, **changes: Any) -> Cluster:
    """Ranks of one thread on one machine, 100 GFLOP/s each."""
    cluster = Cluster(
        devices=devices,
        devices_per_node=devices,
        memory_bytes_per_device=int(gibibytes * GIBI),
        peak_flops=1e11,
        link_bytes_per_second=2e9,
        network_bytes_per_second=2e9,
    )
    return cluster.model_copy(update=changes)


def new_journal(directory: Path, **changes: Any) -> Journal:
    """A journal that holds such a job."""
    return Journal(directory / "job").create(JobSpec.model_validate(spec_document(**changes)), "job-1")
