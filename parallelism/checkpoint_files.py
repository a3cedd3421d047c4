"""What a checkpoint's files are called and say of themselves, whoever writes or reads them. Needs no megatron-core.

The directory is what megatron-core's ``dist_checkpointing`` reads: ``common.pt`` (progress, model, layout),
``.metadata`` and ``*.distcp`` (torch's distributed checkpoint, see :mod:`parallelism.engines.state` for the names) and,
written last, ``metadata.json``.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallelism.budget import Progress
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig

COMMON = "common.pt"
COMPLETE = "metadata.json"
"""Marks the sharded files as complete; holds :data:`FORMAT`."""
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on all ranks alike, and training can go on."""


def common_state(
    model: ModelConfig, layout: Layout, progress: Progress, ranks: Sequence[int], seed: int
) -> dict[str, Any]:
    """What :func:`read_common` is to find; ``ranks`` are those of :func:`ranks_of`, none without random states."""
    return {
        "progress": asdict(progress),
        "model": model.model_dump(mode="json"),
        "layout": layout.model_dump(mode="json"),
        "ranks": list(ranks),
        "seed": seed,
    }


def read_common(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: ``progress``, ``model``, ``layout``, ``ranks``, ``seed``."""
    common: dict[str, Any] = torch.load(Path(directory) / COMMON, weights_only=True)
    return common


def ranks_of(layout: Layout) -> list[int]:
    """What must be equal for a rank's random states to have the same meaning."""
    return [layout.tensor, layout.pipeline, layout.data, layout.virtual_pipeline, int(layout.sequence_parallel)]


def agree(error: str | None) -> None:
    """Raise :class:`CheckpointError` on every rank when any of them passes an error. Collective."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    found = sorted({error for error in errors if error})
    if found:
        raise CheckpointError("; ".join(found))
