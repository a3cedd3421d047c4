"""What training one candidate ends with. Torch-free."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field

from parallelism.budget import Burnt, Progress
from parallelism.options import Options

Report = Callable[[str, dict[str, Any]], None]
"""Receives (kind, JSON-able fields) of every event of a run; see :mod:`parallelism.run` for the kinds."""

FinishReason = Literal["budget", "signal", "pause", "cancel"]

STALLED_EXIT_CODE = 75
"""Exit code of a rank that its stall watchdog ended (``EX_TEMPFAIL``: trying again may succeed)."""


class TrainResult(Options):
    """How a run ended, on every rank. ``reason: budget`` is the successful end; the others can be resumed."""

    reason: FinishReason
    progress: Progress
    burnt: Burnt = Field(description="all attempts, until this result")
    checkpoint: str = Field(description="directory of the complete checkpoint of `progress`")
    train_loss: float | None = Field(description="of the last step, mean per token; none before the first step")
    validation_loss: float | None = Field(description="of the last evaluation, mean per token")
    peak_memory_bytes: int = Field(description="of the rank that used most above its baseline")
    baseline_memory_bytes: int = Field(description="of the same rank, before the model was built")


class DivergedError(RuntimeError):
    """Loss or gradient norm is no longer a finite number; trying again would end the same way."""

    def __init__(self, step: int, loss: float, gradient_norm: float, checkpoint: str | None) -> None:
        super().__init__(step, loss, gradient_norm, checkpoint)
        self.step = step
        self.loss = loss
        self.gradient_norm = gradient_norm
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        kept = (
            f"the last good checkpoint is {self.checkpoint}" if self.checkpoint else "no checkpoint was written before"
        )
        return (
            f"training diverged at step {self.step}: loss {self.loss}, gradient norm {self.gradient_norm}; {kept}. "
            "Lower training.learning_rate, lengthen training.warmup_fraction or set training.gradient_clip"
        )


class LastCheckpointError(RuntimeError):
    """The state that a run ended with could not be written; what was complete before is still there."""
