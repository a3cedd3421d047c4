"""What a job will do and take, said before it starts. Torch-free.

The layout, where a candidate gives none, is the fastest of all legal ones that fit, under this cost model of one step:

* compute: FLOPs of the global batch / (devices · peak · :data:`EFFICIENCY`), stretched by the pipeline's bubble
  (p - 1) / (m·v) (Narayanan et al. 2021, section 2.2) and, with recomputation, by 4/3;
* tensor parallelism: four all-reduces of the activations per layer and micro-batch, each 2·(t - 1)/t of their bytes
  over the link inside a node, plus a latency for every one of them (Shoeybi et al. 2019, section 3);
* pipeline parallelism: activations to the next stage and gradients back, once per micro-batch and boundary;
* data parallelism: one all-reduce of the gradients per step, 2·(d - 1)/d of their bytes.
"""

from collections.abc import Iterator
from itertools import product

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, SerializeAsAny

from compression.recipe import grid
from launcher.cluster import Cluster
from launcher.spec import CandidateSpec, JobSpec
from parallelism.accounting import MemoryEstimate, memory_per_rank, train_flops_per_sequence
from parallelism.budget import Budget
from parallelism.engines import limits
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.options import Options
from parallelism.presets import resolve_model
from parallelism.rules import resolve_training
from parallelism.training import TrainingConfig

EFFICIENCY = 0.4
"""Share of the matmul peak that training reaches; Narayanan et al. 2021, table 1: 0.43 to 0.52 with recomputation."""
COLLECTIVE_SECONDS = {"cpu": 200e-6, "gpu": 20e-6}
"""Latency of one collective."""
FITS = 0.92
"""Share of a device's memory that an estimate may fill."""
CHECKPOINT_BYTES = 12
"""Per parameter: fp32 weights and two fp32 moments (bf16: 2 + 4 + 8)."""


class PlanError(ValueError):
    """A candidate that cannot run as asked; ``field`` is relative to the candidate."""

    def __init__(self, field: str, value: object, message: str) -> None:
        super().__init__(f"{field}: {value}: {message}")
        self.field = field
        self.value = value
        self.message = message


class CandidatePlan(Options):
    """One candidate: the model, where it runs, and what its budget buys."""

    name: str
    model: SerializeAsAny[ModelConfig]
    parameters: PositiveInt
    layout: Layout
    layout_chosen: bool
    """Whether the planner chose the layout."""
    training: TrainingConfig
    budget: Budget
    flops_per_token: float
    steps: NonNegativeInt
    tokens: NonNegativeInt
    step_seconds: NonNegativeFloat
    seconds: NonNegativeFloat
    cost: NonNegativeFloat
    memory: MemoryEstimate
    memory_bytes: NonNegativeInt
    disk_bytes: NonNegativeInt


class Plan(Options):
    """The whole job."""

    candidates: list[CandidatePlan]
    variants: PositiveInt
    seconds: NonNegativeFloat
    disk_bytes: NonNegativeInt
    cost: NonNegativeFloat


def make_plan(spec: JobSpec, cluster: Cluster, vocab_size: int, text_bytes: int = 0) -> Plan:
    """The plan of a job whose tokenizer has ``vocab_size`` entries and whose text has ``text_bytes``.

    Raises :class:`PlanError`, whose ``field`` begins with ``candidates.{index}``.
    """
    candidates = []
    for index, candidate in enumerate(spec.candidates):
        try:
            candidates.append(plan_candidate(spec, candidate, cluster, vocab_size))
        except PlanError as error:
            raise PlanError(f"candidates.{index}.{error.field}", error.value, error.message) from error
    return Plan(
        candidates=candidates,
        variants=len(grid(spec.compression)) * len(candidates),
        seconds=sum(candidate.seconds for candidate in candidates),
        disk_bytes=text_bytes + sum(candidate.disk_bytes for candidate in candidates),
        cost=sum(candidate.cost for candidate in candidates),
    )


def plan_candidate(spec: JobSpec, candidate: CandidateSpec, cluster: Cluster, vocab_size: int) -> CandidatePlan:
    """The plan of one candidate; without a layout of its own, at the best one. Raises :class:`PlanError`."""
    length = spec.data.sequence_length
    model = resolve_model(candidate.model, vocab_size, length)
    tokens = expected_tokens(spec, model, cluster)
    if candidate.layout:
        training = _training(candidate, model, candidate.layout, length, tokens, cluster)
        refuse_illegal(model, candidate.layout, training)
        _refuse_too_large(model, candidate.layout, training, length, cluster)
        layout = candidate.layout
    else:
        layout, training = best_layout(candidate, model, length, tokens, cluster)
    return _planned(spec, candidate, model, layout, training, cluster)


def expected_tokens(spec: JobSpec, model: ModelConfig, cluster: Cluster) -> float:
    """Tokens that the budget buys, at the planned speed of all devices where it limits a clock."""
    budget, per_token = (
        spec.budget,
        train_flops_per_sequence(model, spec.data.sequence_length) / spec.data.sequence_length,
    )
    if budget.unit == "tokens":
        return budget.limit
    if budget.unit == "flops":
        return budget.limit / per_token
    return _clock_seconds(spec, cluster.devices) * cluster.devices * cluster.peak_flops * EFFICIENCY / per_token


def _clock_seconds(spec: JobSpec, devices: int) -> float:
    """Wall-clock seconds that a clock budget gives ``devices`` devices."""
    limit = spec.budget.limit
    if spec.budget.unit == "wall_clock":
        return limit
    hours = limit if spec.budget.unit == "device_hours" else limit / spec.execution.price_per_device_hour
    return hours * 3600.0 / devices


def best_layout(
    candidate: CandidateSpec, model: ModelConfig, length: int, tokens: float, cluster: Cluster
) -> tuple[Layout, TrainingConfig]:
    """The fastest legal layout that fits; the lean engine only where no other fits. Raises :class:`PlanError`."""
    for engine in ("megatron", "lean"):
        found: list[tuple[float, int, Layout, TrainingConfig]] = []
        for layout in candidate_layouts(cluster, engine):
            try:
                training = _training(candidate, model, layout, length, tokens, cluster)
                refuse_illegal(model, layout, training)
                _refuse_too_large(model, layout, training, length, cluster)
            except ValueError:
                continue
            found.append((step_seconds(model, layout, training, length, cluster), layout.world_size, layout, training))
        if found:
            return min(found, key=lambda row: row[:2])[2:]
    raise _nothing_fits(candidate, model, length, tokens, cluster)


def candidate_layouts(cluster: Cluster, engine: str = "megatron") -> Iterator[Layout]:
    """Every tensor × pipeline × data that the cluster holds, tensor-parallel groups inside a node."""
    sizes = range(1, cluster.devices + 1)
    for tensor, pipeline, data in product(sizes, sizes, sizes):
        whole = tensor * pipeline * data <= cluster.devices and tensor <= cluster.devices_per_node
        if whole and (engine != "lean" or pipeline == 1):
            yield Layout(tensor=tensor, pipeline=pipeline, data=data, engine=engine)


def refuse_illegal(model: ModelConfig, layout: Layout, training: TrainingConfig) -> None:
    """Raise :class:`PlanError` where the model cannot be spread like this."""
    tensor, chunks = layout.tensor, layout.pipeline * layout.virtual_pipeline
    widths = {"heads": model.heads, "padded vocabulary": model.padded_vocab_size}
    widths |= {name: getattr(model, name) for name in ("query_groups", "feed_forward") if hasattr(model, name)}
    for name, width in widths.items():
        if width % tensor:
            legal = [size for size in range(1, width + 1) if all(other % size == 0 for other in widths.values())]
            raise PlanError(
                "layout.tensor", tensor, f"does not divide {name} {width} of the model; possible are {legal[:8]}"
            )
    if chunks > model.layers:
        raise PlanError("layout.pipeline", layout.pipeline, f"{chunks} stages for {model.layers} layers; use fewer")
    if layout.virtual_pipeline > 1 and model.layers % chunks:
        message = f"pipeline × virtual_pipeline {chunks} does not divide {model.layers} layers; lower one of them"
        raise PlanError("layout.virtual_pipeline", layout.virtual_pipeline, message)
    assert isinstance(training.global_batch, int)
    assert isinstance(training.micro_batch, int)
    share = training.micro_batch * layout.data
    if training.global_batch % share:
        message = (
            f"not a multiple of micro_batch {training.micro_batch} × data {layout.data}; use {share} or a multiple"
        )
        raise PlanError("training.global_batch", training.global_batch, message)
    count = training.global_batch // share
    if layout.virtual_pipeline > 1 and count % layout.pipeline:
        message = f"interleaving needs micro-batches per step ({count}) that pipeline {layout.pipeline} divides"
        raise PlanError("training.micro_batch", training.micro_batch, f"{message}; change global_batch or micro_batch")
    try:
        limits.check(layout, training)
    except ValueError as error:
        raise PlanError("layout.engine", layout.engine, str(error)) from error


def step_seconds(
    model: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, cluster: Cluster
) -> float:
    """Seconds of one optimizer step under the cost model above."""
    assert isinstance(training.global_batch, int)
    assert isinstance(training.micro_batch, int)
    tensor, pipeline, data = layout.tensor, layout.pipeline, layout.data
    count = training.global_batch // (training.micro_batch * data)
    width = 2 if training.precision == "bf16" else 4
    activations = training.micro_batch * sequence_length * model.hidden * width
    latency = COLLECTIVE_SECONDS[cluster.device_kind]
    spans_nodes = layout.world_size > cluster.devices_per_node
    between = cluster.network_bytes_per_second if spans_nodes else cluster.link_bytes_per_second

    flops = (
        training.global_batch * train_flops_per_sequence(model, sequence_length) * (4 / 3 if training.recompute else 1)
    )
    bubble = 1 + (pipeline - 1) / (count * layout.virtual_pipeline)
    compute = flops / (layout.world_size * cluster.peak_flops * EFFICIENCY) * bubble
    seconds = compute
    if tensor > 1:
        reduced = 2 * (tensor - 1) / tensor * activations / cluster.link_bytes_per_second
        seconds += 4 * model.layers / pipeline * count * (reduced + latency) * bubble
    if pipeline > 1:
        seconds += 2 * count * (activations / between + latency)
    if data > 1:
        gradients = 4 * model.parameter_count() / (tensor * pipeline)
        seconds += 2 * (data - 1) / data * gradients / between + latency
    return seconds


def _training(
    candidate: CandidateSpec, model: ModelConfig, layout: Layout, length: int, tokens: float, cluster: Cluster
) -> TrainingConfig:
    try:
        return resolve_training(candidate.training, model, layout, length, tokens, cluster.device_kind)
    except ValueError as error:
        raise PlanError("training", "auto", str(error)) from error


def _refuse_too_large(
    model: ModelConfig, layout: Layout, training: TrainingConfig, length: int, cluster: Cluster
) -> None:
    if layout.world_size > cluster.devices:
        message = (
            f"{layout} needs {layout.world_size} devices, and the cluster has {cluster.devices}; use a smaller layout"
        )
        raise PlanError("layout", str(layout), message)
    needed = memory_per_rank(model, layout, training, length).total
    if needed > FITS * cluster.memory_bytes_per_device:
        message = (
            f"needs {_gib(needed)} per device and {_gib(cluster.memory_bytes_per_device)} are there; use more devices, "
            "training.recompute: true, a smaller training.micro_batch, or layout.engine: lean"
        )
        raise PlanError("layout", str(layout), message)


def _nothing_fits(
    candidate: CandidateSpec, model: ModelConfig, length: int, tokens: float, cluster: Cluster
) -> PlanError:
    """Why the one-device layout does not run, or how much is missing at the widest."""
    single = Layout()
    try:
        training = _training(candidate, model, single, length, tokens, cluster)
        refuse_illegal(model, single, training)
    except PlanError as error:
        return error
    needed = memory_per_rank(model, single, training, length).total
    devices = -(-needed // int(FITS * cluster.memory_bytes_per_device))
    return PlanError(
        "model",
        candidate.name,
        f"{model.parameter_count():,} parameters need {_gib(needed)} for training and the cluster has "
        f"{cluster.devices} devices of {_gib(cluster.memory_bytes_per_device)}; use about {devices} devices, a smaller "
        "model, a shorter data.sequence_length, or training.global_batch that layout.engine: lean can take",
    )


def _planned(
    spec: JobSpec,
    candidate: CandidateSpec,
    model: ModelConfig,
    layout: Layout,
    training: TrainingConfig,
    cluster: Cluster,
) -> CandidatePlan:
    length = spec.data.sequence_length
    assert isinstance(training.global_batch, int)
    flops = training.global_batch * train_flops_per_sequence(model, length)
    tokens = training.global_batch * length
    seconds = step_seconds(model, layout, training, length, cluster)
    steps = _steps(spec, layout, flops, tokens, seconds)
    if steps == 0:
        step = {"flops": flops, "tokens": tokens}.get(spec.budget.unit, seconds)
        message = (
            f"{spec.budget.unit} {spec.budget.limit:g} is less than one step ({step:g}); raise it or lower global_batch"
        )
        raise PlanError("training.global_batch", training.global_batch, f"budget.{message}")
    memory = memory_per_rank(model, layout, training, length)
    parameters = model.parameter_count()
    return CandidatePlan(
        name=candidate.name,
        model=model,
        parameters=parameters,
        layout=layout,
        layout_chosen=candidate.layout is None,
        training=training,
        budget=spec.budget,
        flops_per_token=flops / tokens,
        steps=steps,
        tokens=steps * tokens,
        step_seconds=seconds,
        seconds=steps * seconds,
        cost=steps * seconds * layout.world_size / 3600 * spec.execution.price_per_device_hour,
        memory=memory,
        memory_bytes=memory.total,
        disk_bytes=_disk_bytes(spec, parameters),
    )


def _steps(spec: JobSpec, layout: Layout, flops: float, tokens: int, seconds: float) -> int:
    if spec.budget.unit == "flops":
        return int(spec.budget.limit // flops)
    if spec.budget.unit == "tokens":
        return int(spec.budget.limit // tokens)
    return int(_clock_seconds(spec, layout.world_size) // seconds)


def _disk_bytes(spec: JobSpec, parameters: int) -> int:
    """Checkpoints kept and one being written, and every variant: its layers, the compact file and the export."""
    checkpoints = (spec.execution.checkpoint_every.keep + 1) * CHECKPOINT_BYTES * parameters
    variants = len(grid(spec.compression)) * parameters * (2 + 2 + (2 if spec.export.variants != "none" else 0))
    return checkpoints + variants


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
