"""The protocol of an engine."""

from dataclasses import dataclass
from typing import Any, Protocol

from parallelism.layout import Layout
from parallelism.models.base import Batch, ModelConfig
from parallelism.training import TrainTask


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
    data_rank: int
    """This rank's index among ``layout.data``: which share of the global batch it computes."""

    def __init__(self, task: TrainTask) -> None: ...

    def train_step(self, micro_batches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over this data rank's micro-batches (CPU tensors; the engine moves them)."""

    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Mean loss per token over all data ranks, in evaluation mode; leaves training state and RNG untouched."""

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Model, optimizer and random states as megatron-core sharded objects, in the one checkpoint form.

        ``loading`` asks for buffers to load into instead of a snapshot to write.
        """

    def restore(self, state: dict[str, Any], *, step: int) -> None:
        """Take over what ``dist_checkpointing.load`` filled; ``step`` is the optimizer step it was saved at."""
