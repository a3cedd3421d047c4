"""What training costs in FLOPs and in memory, from shapes alone. Torch-free."""

from math import prod

from parallelism.budget import Budget
from parallelism.memory import BASELINE_BYTES, MemoryEstimate, memory_per_rank
from parallelism.models.base import ModelConfig

__all__ = [
    "BASELINE_BYTES",
    "MemoryEstimate",
    "calibration_flops",
    "memory_per_rank",
    "non_embedding_parameters",
    "train_flops_per_sequence",
    "train_flops_per_token",
    "training_share",
]


def train_flops_per_sequence(config: ModelConfig, sequence_length: int, teacher: ModelConfig | None = None) -> float:
    """FLOPs of one sequence: 3 × forward, because every matrix product has two in the backward pass.

    A ``teacher`` adds its forward pass.

    Recomputed activations are not counted (model FLOPs, Chowdhery et al. 2022, appendix B). Narayanan et al. 2021 count
    F = 96·B·s·l·h²·(1 + s/6h + V/16lh) with recomputation, which is this with 4 × forward in the layers.
    """
    taught = teacher.forward_flops(sequence_length) if teacher is not None else 0.0
    return 3.0 * config.forward_flops(sequence_length) + taught


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """:func:`train_flops_per_sequence` for each token."""
    return train_flops_per_sequence(config, sequence_length) / sequence_length


def calibration_flops(config: ModelConfig, sequence_length: int, sequences: int) -> float:
    """FLOPs of collecting statistics over ``sequences``: a forward pass, and H += XᵀX of every linear layer's input."""
    hessians = sum(
        2 * shape[1] ** 2
        for name, shape in config.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2
    )
    return sequences * (config.forward_flops(sequence_length) + float(sequence_length * hessians))


def training_share(budget: Budget, calibration: float, recovery_fraction: float = 0.0) -> Budget:
    """What is left of a lineage's budget for training.

    ``calibration`` is in the budget's unit, ``recovery_fraction`` is the part of the budget kept for recovering a
    compressed variant. Raises ``ValueError`` where nothing is left.
    """
    fraction = 1.0 - recovery_fraction - calibration / budget.limit
    if fraction <= 0.0:
        raise ValueError(
            f"budget.{budget.unit} {budget.limit:g}: calibration takes {calibration:g} and recovery"
            f" {recovery_fraction * budget.limit:g} of it, and nothing is left for training; raise the budget or lower"
            " compression.calibration.sequences"
        )
    return budget.share(fraction)


def non_embedding_parameters(config: ModelConfig) -> int:
    """Parameters without embeddings, positions and output layer: the N of most scaling laws."""
    outer = ("embedding.", "output.")
    return sum(prod(shape) for name, shape in config.parameter_shapes().items() if not name.startswith(outer))
