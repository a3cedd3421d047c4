"""How one candidate is trained, and everything one training process group needs to know. Torch-free."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)

from parallelism.budget import Budget
from parallelism.gradual import GradualPruning
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.options import Options
from parallelism.start import StartPoint

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class TrainingConfig(Options):
    """Optimizer, batch and schedule. ``auto`` follows :mod:`parallelism.rules`."""

    global_batch: PositiveInt | Auto = Field(default="auto", description="sequences per optimizer step")
    micro_batch: PositiveInt | Auto = Field(default="auto", description="sequences per forward pass on one device")
    learning_rate: PositiveFloat | Auto = "auto"
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_fraction: Fraction = Field(default=0.02, description="of the budget")
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=0.2, description="of the budget (wsd only)")
    final_learning_rate_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    weight_decay: NonNegativeFloat = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: PositiveFloat = 1e-8
    gradient_clip: NonNegativeFloat = Field(default=1.0, description="global L2 norm; 0 turns clipping off")
    precision: Literal["auto", "fp32", "bf16"] = Field(default="auto", description="auto: bf16 on GPUs, fp32 on CPUs")
    recompute: bool = Field(default=False, description="recompute activations in the backward pass")
    distributed_optimizer: bool = Field(default=True, description="megatron engine: shard optimizer state over data")
    prune: GradualPruning | None = Field(default=None, description="gradually, while training (not engine deepspeed)")

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainingConfig":
        if (
            isinstance(self.global_batch, int)
            and isinstance(self.micro_batch, int)
            and self.global_batch % self.micro_batch
        ):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}")
        return self


class CheckpointPolicy(Options):
    """When to write checkpoints and how many to keep."""

    seconds: PositiveFloat | None = Field(default=None, description="wall-clock interval")
    steps: PositiveInt | None = Field(default=None, description="step interval (deterministic)")
    keep: PositiveInt = Field(default=2, description="newest complete checkpoints kept")
    asynchronous: bool = True


class TrainTask(Options):
    """Everything a process group needs to train one candidate; the same on every rank, no ``auto`` left inside."""

    name: str
    seed: NonNegativeInt
    model: SerializeAsAny[ModelConfig]
    layout: Layout
    training: TrainingConfig
    budget: Budget = Field(description="the training share of the candidate's budget (reserve already taken off)")
    data_dir: str = Field(description="a directory written by parallelism.data.prepare")
    sequence_length: PositiveInt
    checkpoint_dir: str = Field(description="root under which complete checkpoints of this candidate lie")
    checkpoint: CheckpointPolicy = CheckpointPolicy(seconds=60)
    start: StartPoint | None = Field(default=None, description="begin with given weights, not with random ones")
    resume_from: str | None = Field(
        default=None, description="a complete checkpoint of this task, to go on from; its directory"
    )
    epoch: NonNegativeInt = Field(default=0, description="the attempt's fencing number; part of checkpoint names")
    burnt_device_seconds: NonNegativeFloat = Field(default=0.0, description="consumed by earlier attempts")
    burnt_wall_seconds: NonNegativeFloat = 0.0
    price_per_device_hour: NonNegativeFloat = 0.0
    evaluations: NonNegativeInt = Field(
        default=4, description="evaluations spread evenly over the budget, the last at its end"
    )
    evaluation_tokens: PositiveInt = 65536
    threads_per_rank: PositiveInt = 1
    stall_seconds: PositiveFloat = 600.0
