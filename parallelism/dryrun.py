"""Build every rank's part of a model on meta tensors, and check that the parts add up to the model.

One process plays all ranks in turn, on torch's fake process group; nothing is allocated, so that models of any size
can be tried on any machine. ``python -m parallelism.dryrun`` reads ``{"model", "layout", "training",
"sequence_length", "device_kind"}`` from standard input and prints a :class:`DryRun`, both as JSON.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from pydantic import NonNegativeInt, PositiveInt
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallelism import device
from parallelism.checkpoint_store import read_model
from parallelism.engines import state
from parallelism.engines.megatron import build_chunks
from parallelism.layout import Layout
from parallelism.memory import memory_by_stage
from parallelism.models.base import ModelConfig, ShardedFamily
from parallelism.options import Options
from parallelism.registry import FAMILIES, load
from parallelism.rules import DeviceKind
from parallelism.training import TrainingConfig


class RankPart(Options):
    """What one rank holds of the model."""

    rank: NonNegativeInt
    tensor: NonNegativeInt
    pipeline: NonNegativeInt
    layers: NonNegativeInt
    parameters: PositiveInt
    bytes: PositiveInt
    """Of the weights alone."""
    memory_bytes: PositiveInt
    """What the rank is estimated to need at its peak (:mod:`parallelism.memory`), above its baseline."""


class DryRun(Options):
    """All ranks of one data-parallel replica; the other replicas hold the same."""

    layout: Layout
    ranks: list[RankPart]
    total: NonNegativeInt
    """Of all parts together, every weight counted once."""
    expected: PositiveInt
    """Of the whole model, from its shapes."""
    ok: bool
    problems: list[str]
    """Weights of which a part is missing or held as an original twice."""


def dry_run(
    config: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, kind: DeviceKind
) -> DryRun:
    """Build the parts of ``config`` at ``layout``; ``training`` holds no ``auto``.

    The caller's process must not be in a process group. Raises ``ValueError`` or ``AssertionError`` of megatron-core
    where the model cannot be spread like this.
    """
    replica = layout.model_copy(update={"data": 1})
    family: ShardedFamily = load(FAMILIES[config.family].sharded)
    memory = [estimate.total for estimate in memory_by_stage(config, layout, training, sequence_length, kind)]
    parts: list[RankPart] = []
    originals: dict[str, int] = {}
    shapes: dict[str, int] = {}
    for rank in range(replica.world_size):
        with _acting_as(rank, replica):
            chunks = _build(family, config, replica, training)
            blocks = [block for stored in state.stored_parameters(chunks) for block in stored.blocks]
            parts.append(_part(rank, chunks, blocks, memory))
        for block in blocks:
            shapes[block.key] = math.prod(block.global_shape)
            if not any(block.replica_id):
                originals[block.key] = originals.get(block.key, 0) + math.prod(block.local_shape)
    problems = [
        f"{key}: {originals.get(key, 0)} of {size} elements"
        for key, size in shapes.items()
        if originals.get(key, 0) != size
    ]
    total, expected = sum(originals.values()), config.parameter_count()
    return DryRun(
        layout=layout,
        ranks=parts,
        total=total,
        expected=expected,
        ok=total == expected and not problems,
        problems=problems,
    )


@contextmanager
def _acting_as(rank: int, layout: Layout) -> Iterator[None]:
    """This process as one rank of ``layout``, among others that are not there."""
    device.adapt_megatron_to_cpu()
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        virtual = layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        # The fake group stands for every back-end; megatron-core's additional gloo groups would want real sockets.
        parallel_state.initialize_model_parallel(
            layout.tensor, layout.pipeline, virtual, create_gloo_process_groups=False
        )
        state.seed_everything(0, step=0)
        yield
    finally:
        device.disconnect()


def _build(
    family: ShardedFamily, config: ModelConfig, layout: Layout, training: TrainingConfig
) -> list[torch.nn.Module]:
    megatron = family.transformer_config(config, layout, training)
    megatron.use_cpu_initialization = True  # megatron-core then leaves the device to torch's default
    with torch.device("meta"):
        return build_chunks(family, config, layout, megatron)


def _part(
    rank: int, chunks: Sequence[torch.nn.Module], blocks: Sequence[ShardedTensor], memory: Sequence[int]
) -> RankPart:
    """What this rank holds; ``memory`` is the estimate of every pipeline stage in bytes."""
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    held = [parameter for chunk in chunks for parameter in chunk.parameters()]
    assert all(parameter.is_meta for parameter in held)
    layers = {block.key.split(".")[2] for block in blocks if block.key.startswith("decoder.layers.")}
    return RankPart(
        rank=rank,
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=pipeline_rank,
        layers=len(layers),
        parameters=sum(parameter.numel() for parameter in held),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in held),
        memory_bytes=memory[pipeline_rank],
    )


def main() -> int:
    """Entry point: JSON in, JSON out."""
    request = json.load(sys.stdin)
    result = dry_run(
        read_model(request["model"]),
        Layout.model_validate(request["layout"]),
        TrainingConfig.model_validate(request["training"]),
        request["sequence_length"],
        request["device_kind"],
    )
    print(result.model_dump_json())
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
