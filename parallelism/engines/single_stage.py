"""What the engines without pipeline stages share: one module holds this rank's part of all layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallelism import device
from parallelism.engines.megatron import build_chunks, mean_over_ranks, start_parallel_state, sum_of_losses
from parallelism.initialize import initialize
from parallelism.models.base import Batch, Losses, ModelConfig, ShardedFamily
from parallelism.training import TrainTask

CHUNK_ELEMENTS = 1 << 18
"""Elements updated at once: a few float32 copies of so many fit into a core's cache."""
GPU_CHUNK_ELEMENTS = 1 << 22
"""The same on GPUs: enough for a kernel to be worth its launch, and little memory for the copies."""


def build_module(family: ShardedFamily, task: TrainTask) -> torch.nn.Module:
    """This rank's part of the model at ``task.layout``, with its start weights; starts megatron-core's groups first."""
    start_parallel_state(task.layout, task.seed)
    megatron = family.transformer_config(task.model, task.layout, task.training)
    (module,) = build_chunks(family, task.model, task.layout, megatron)
    initialize([module], task.seed, megatron.init_method_std, task.model.layers)
    return module


def build_other(family: ShardedFamily, task: TrainTask, config: ModelConfig) -> torch.nn.Module:
    """This rank's part of another model, its weights not set, in the groups that are there."""
    megatron = family.transformer_config(config, task.layout, task.training)
    (module,) = build_chunks(family, config, task.layout, megatron)
    return module


def to_device(batch: Batch) -> Batch:
    """The batch on this rank's device."""
    return {name: tensor.to(device.device()) for name, tensor in batch.items()}


@torch.no_grad()
def evaluate(objective: Losses, module: torch.nn.Module, micro_batches: Sequence[Batch]) -> float:
    """Mean loss per token over all data ranks' micro-batches, in evaluation mode; the same on every rank."""
    module.eval()
    try:
        return mean_over_data([objective.losses(module, to_device(batch)) for batch in micro_batches])
    finally:
        module.train()


def mean_over_data(losses: Sequence[Tensor]) -> float:
    """Mean of the per-token losses [batch, sequence] of all data ranks' micro-batches, the same on every rank."""
    return mean_over_ranks([sum_of_losses(part)[2] for part in losses])


@torch.no_grad()
def square_sum(gradient: Tensor) -> Tensor:
    """Σ g² of a tensor of any shape, in float64, without a float64 copy of the whole."""
    parts = [torch.linalg.vector_norm(part, dtype=torch.float64).square() for part in chunks(gradient)]
    return torch.stack(parts).sum()


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of :data:`CHUNK_ELEMENTS` (or :data:`GPU_CHUNK_ELEMENTS`) each, and a rest, of a contiguous tensor."""
    return tensor.detach().reshape(-1).split(GPU_CHUNK_ELEMENTS if tensor.is_cuda else CHUNK_ELEMENTS)
