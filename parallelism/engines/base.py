"""The protocol of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from parallelism.layout import Layout
from parallelism.models.base import Batch, ModelConfig
from parallelism.training import TrainTask

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss per token over the global batch and the gradient's global L2 norm before clipping.

    Both are the same on every rank.
    """

    loss: float
    gradient_norm: float


class Engine(Protocol):
    """Owns the sharded model and its optimizer on this rank. Made by ``Engine(task)`` after ``device.connect``."""

    layout: Layout
    config: ModelConfig
    seed: int
    data_rank: int
    """This rank's index among ``layout.data``: which share of the global batch it computes."""

    def __init__(self, task: TrainTask) -> None: ...

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this data rank's micro-batches (CPU tensors; the engine moves them)."""

    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Mean loss per token over all data ranks, in evaluation mode; leaves training state and RNG untouched."""

    def prune(self, sparsity: float) -> None:
        """Set the smallest weights of every linear matrix of the layers to zero, for good: ``sparsity`` of each.

        Called between steps where ``training.prune`` is set, never for less than before; done already, nothing changes.
        Their moments are zero too. Collective; engine ``deepspeed`` lacks it.
        """

    def sharded_state(self) -> list[ShardedTensor]:
        """This rank's weights and optimizer in the one form of :mod:`parallelism.engines.state`.

        The pieces are views of the engine's memory (or copies of it, where the engine cannot give views): they are
        written as they are, or filled in place, after which :meth:`restored` is called. Collective.
        """

    def restored(self, step: int) -> None:
        """The pieces of the last :meth:`sharded_state` have been filled from a checkpoint of step ``step``."""
