"""JobSpec: one document that describes a job completely (REST body, CLI YAML and MLflow artifact). Torch-free."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, field_validator, model_validator

from compression.config import CompressionConfig
from parallelism.budget import Budget
from parallelism.data.config import DataConfig
from parallelism.layout import Layout
from parallelism.options import Options
from parallelism.training import CheckpointPolicy, TrainingConfig

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class CandidateSpec(Options):
    """One model that the job trains under the common budget.

    ``model`` is ``{family: gpt, ...}`` or ``{preset: NAME, ...overrides}``; it is resolved and checked by
    :func:`parallelism.presets.resolve_model`. ``layout`` omitted: the planner chooses.
    """

    name: str = Field(pattern=NAME)
    model: dict[str, Any] = Field(min_length=1)
    layout: Layout | None = None
    training: TrainingConfig = TrainingConfig()


class EvaluationConfig(Options):
    """What is measured on held-out text for every variant."""

    metrics: list[Literal["perplexity"]] = Field(default=["perplexity"], min_length=1)
    tokens: PositiveInt = 65536


class ExportConfig(Options):
    """Which variants are written in a format that other software loads."""

    variants: Literal["frontier", "all", "none"] = "frontier"
    format: Literal["safetensors"] = "safetensors"


class ExecutionConfig(Options):
    """Where and how the job runs."""

    backend: str = "local"
    profile: str = Field(default="default", description="an operator-defined profile")
    devices: PositiveInt | None = Field(
        default=None, description="ranks the job may hold at once; default: what the back-end has"
    )
    threads_per_rank: PositiveInt = 1
    max_restarts: NonNegativeInt = Field(default=3, description="consecutive restarts without a new checkpoint")
    checkpoint_every: CheckpointPolicy = CheckpointPolicy(seconds=60)
    price_per_device_hour: NonNegativeFloat = 0.0
    stall_seconds: float = Field(
        default=600.0, gt=0, description="a gang without progress for this long is treated as dead"
    )


class JobSpec(Options):
    """The whole job."""

    version: Literal[1] = 1
    name: str = Field(pattern=NAME)
    seed: NonNegativeInt = 1234
    data: DataConfig
    budget: Budget = Field(description="per candidate")
    candidates: list[CandidateSpec] = Field(min_length=1)
    compression: CompressionConfig = CompressionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @field_validator("candidates")
    @classmethod
    def _unique_names(cls, candidates: list[CandidateSpec]) -> list[CandidateSpec]:
        names = [candidate.name for candidate in candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"candidate name used twice: {', '.join(twice)}")
        return candidates

    @model_validator(mode="after")
    def _cost_needs_price(self) -> "JobSpec":
        if self.budget.unit == "cost" and not self.execution.price_per_device_hour:
            raise ValueError("budget.cost needs execution.price_per_device_hour")
        return self


def load_spec(path: str | Path) -> JobSpec:
    """Read a YAML (or JSON) job file. Raises ``pydantic.ValidationError`` or ``yaml.YAMLError``."""
    with open(path, encoding="utf-8") as file:
        return JobSpec.model_validate(yaml.safe_load(file))
