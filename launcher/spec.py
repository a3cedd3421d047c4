"""JobSpec: one document that describes a job completely (REST body, CLI YAML and MLflow artifact). Torch-free."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from compression.config import CompressionConfig
from compression.harness import HarnessConfig
from compression.results import ExportFormat
from launcher.backends.kubernetes_options import KubernetesOptions
from launcher.backends.slurm_options import SlurmOptions
from launcher.problems import Problem, SpecError, of_validation, of_yaml
from launcher.rank_environment import RankEnvironment
from parallelism.budget import Budget
from parallelism.data.config import DataConfig
from parallelism.layout import Layout
from parallelism.options import Options
from parallelism.training import CheckpointPolicy, TrainingConfig

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"


class CandidateSpec(Options):
    """One model that the job trains under the common budget, or an existing one that it starts from.

    ``model`` is ``{family: gpt, ...}`` or ``{preset: NAME, ...overrides}``; it is resolved and checked by
    :func:`parallelism.presets.resolve_model`. ``source`` is a Hugging Face directory or a checkpoint. ``layout``
    omitted: the planner chooses.
    """

    name: str = Field(pattern=NAME)
    model: dict[str, Any] | None = Field(default=None, min_length=1)
    source: str | None = Field(default=None, min_length=1, description="a model that exists, instead of one to train")
    layout: Layout | None = None
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _one_origin(self) -> "CandidateSpec":
        if (self.model is None) == (self.source is None):
            found = "both" if self.model else "none"
            raise ValueError(f"give exactly one of model (to train) and source (a model that exists), found {found}")
        return self


class EvaluationConfig(Options):
    """What is measured on held-out text for every variant."""

    metrics: list[Literal["perplexity"]] = Field(default=["perplexity"], min_length=1)
    tokens: PositiveInt = 65536
    harness: HarnessConfig | None = Field(default=None, description="tasks of lm-evaluation-harness, on exports")


class ExportConfig(Options):
    """Which variants are written in a format that other software loads."""

    variants: Literal["frontier", "all", "none"] = "frontier"
    format: ExportFormat = Field(
        default="auto", description="compressed-tensors: quantised variants with their codes; auto: where that loads"
    )


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
    environment: RankEnvironment = Field(
        default={}, description="variables of the ranks, such as NCCL_SOCKET_IFNAME: network settings of gloo and NCCL"
    )
    slurm: SlurmOptions | None = Field(default=None, description="what the back-end slurm asks for")
    kubernetes: KubernetesOptions | None = Field(default=None, description="what the back-end kubernetes asks for")
    stall_seconds: float = Field(
        default=600.0, gt=0, description="a gang without progress for this long is treated as dead"
    )


class JobSpec(Options):
    """The whole job."""

    version: Literal[1] = 1
    name: str = Field(pattern=NAME)
    seed: NonNegativeInt = 1234
    data: DataConfig
    budget: Budget | None = Field(default=None, description="per candidate; needed where one is trained")
    candidates: list[CandidateSpec] = Field(min_length=1)
    compression: CompressionConfig = CompressionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    execution: ExecutionConfig = Field(default=ExecutionConfig(), validate_default=True)

    @field_validator("candidates")
    @classmethod
    def _unique_names(cls, candidates: list[CandidateSpec]) -> list[CandidateSpec]:
        names = [candidate.name for candidate in candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"candidate name used twice: {', '.join(twice)}; give every candidate its own name")
        return candidates

    @model_validator(mode="after")
    def _training_needs_budget(self) -> "JobSpec":
        trained = [candidate.name for candidate in self.candidates if candidate.model]
        if self.budget is None and trained:
            raise ValueError(
                f"budget is missing: candidate {trained[0]!r} is trained; give one, such as {{flops: 1e13}}"
            )
        if self.budget is None and self.compression.recover:
            raise ValueError("budget is missing: compression.recover spends a fraction of it; give one")
        return self

    @property
    def trained(self) -> list[CandidateSpec]:
        """The candidates that are trained."""
        return [candidate for candidate in self.candidates if candidate.model is not None]

    @property
    def training_budget(self) -> Budget:
        """The budget of a job that trains."""
        assert self.budget is not None, "a job without a budget trains nothing"
        return self.budget

    @field_validator("execution")
    @classmethod
    def _cost_needs_price(cls, execution: ExecutionConfig, info: ValidationInfo) -> ExecutionConfig:
        budget = info.data.get("budget")
        if budget and budget.unit == "cost" and not execution.price_per_device_hour:
            raise ValueError(
                f"budget.cost {budget.limit:g} cannot be counted without a price: give price_per_device_hour, in the"
                " same currency"
            )
        return execution


def load_spec(path: str | Path) -> JobSpec:
    """Read a YAML (or JSON) job file. Raises :class:`launcher.problems.SpecError` with all that is wrong with it."""
    source = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError([Problem("", source, error.strerror or str(error), "name a job file that exists")]) from error
    return parse_spec(read_yaml(content, source), source)


def read_yaml(content: bytes, source: str = "the job") -> object:
    """What a YAML (or JSON) text holds. Raises :class:`launcher.problems.SpecError` where it cannot be read."""
    try:
        return yaml.load(content.decode("utf-8"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise SpecError([Problem("", source, f"not UTF-8 text (byte {error.start})", "save it as UTF-8")]) from error
    except yaml.YAMLError as error:
        raise SpecError([of_yaml(error, source)]) from error


def parse_spec(document: object, source: str = "the job") -> JobSpec:
    """The spec that a document describes. Raises :class:`launcher.problems.SpecError` with all that is wrong."""
    if not isinstance(document, Mapping):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        hint = "a job is a mapping with name, data, budget and candidates"
        raise SpecError([Problem("", source, f"the document is {kind}, not a mapping", hint)])
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError(of_validation(error, JobSpec)) from error


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the last would silently win, and reads ``1e12`` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
