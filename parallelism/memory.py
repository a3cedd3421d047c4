"""How much memory one rank needs, by part, from shapes alone. Torch-free.

Everything is above what a process holds once it has imported its libraries and joined its process group, which is
:data:`BASELINE_BYTES`. Measured against real processes by ``benchmarks/memory`` (CPUs) and ``benchmarks/gpu``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from pydantic import NonNegativeInt

from parallelism.layout import DeviceKind, Layout, stage_layers
from parallelism.models.base import ModelConfig
from parallelism.models.gpt.config import GPTConfig
from parallelism.options import Options
from parallelism.training import TrainingConfig

FP32, BF16 = 4, 2
"""Bytes of one number."""

BASELINE_BYTES = {"cpu": 600 * 2**20, "gpu": 1536 * 2**20}
"""What a rank holds before it has a model: libraries and process group (CPU), CUDA context and NCCL buffers (GPU)."""


HEAP_SHARE = {"cpu": 0.6, "gpu": 0.0}
"""Of what comes and goes in every step, this much more stays with the C library's heap, between blocks that are in use.

Measured (benchmarks/memory: 0.4 to 0.9). Returning it to the system at once would cost a sixth of the speed.
"""


class MemoryEstimate(Options):
    """Bytes that the rank needing most holds at its peak, by part, above the baseline."""

    weights: NonNegativeInt
    gradients: NonNegativeInt
    master_weights: NonNegativeInt
    moments: NonNegativeInt
    activations: NonNegativeInt
    logits: NonNegativeInt
    buffers: NonNegativeInt
    teacher_weights: NonNegativeInt = 0
    teacher_activations: NonNegativeInt = 0
    rounded_weights: NonNegativeInt = 0
    heap: NonNegativeInt = 0
    offloaded: NonNegativeInt = 0

    def parts(self) -> dict[str, int]:
        """What lies on the device, by part."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "offloaded"}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts().values())


DISK_BYTES_PER_ELEMENT = FP32 * (3 + 1 + 3)
"""Of an optimizer on a disk: main weights and moments, gradient, and the copy that a checkpoint is written from."""

LOSS_ROWS = {"alone": 4, "taught": 6}
"""Float32 copies of a sequence's logits that the loss of :mod:`parallelism.engines.distillation` takes at its peak."""


@dataclass(frozen=True)
class Companions:
    """What a training that begins with given weights (:mod:`parallelism.start`) holds beside its model."""

    teacher: ModelConfig | None = None
    rounded: bool = False
    """Whether linear weights are there a second time, rounded, while a step computes."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: its place, and the layers of all its model chunks."""

    index: int
    layers: int
    first: bool
    last: bool


def stages(config: ModelConfig, layout: Layout) -> list[Stage]:
    """Every pipeline stage, in order; chunk ``c`` of an interleaved pipeline belongs to stage ``c mod pipeline``."""
    chunks = stage_layers(config.layers, layout.pipeline * layout.virtual_pipeline)
    return [
        Stage(index, sum(chunks[index :: layout.pipeline]), index == 0, index == layout.pipeline - 1)
        for index in range(layout.pipeline)
    ]


def memory_per_rank(
    config: ModelConfig,
    layout: Layout,
    training: TrainingConfig,
    sequence_length: int,
    kind: DeviceKind = "cpu",
    companions: Companions | None = None,
) -> MemoryEstimate:
    """The estimate of the pipeline stage that needs most. ``training`` holds no ``auto``.

    Weights, gradients and optimizer by the engine's rules; activations as megatron-core's local layers with flash
    attention keep them (after Korthikanti et al. 2022, equations 1 to 4, without the scores), times the micro-batches
    in flight under 1F1B.
    """
    estimates = memory_by_stage(config, layout, training, sequence_length, kind, companions)
    return max(estimates, key=lambda estimate: estimate.total)


def memory_by_stage(
    config: ModelConfig,
    layout: Layout,
    training: TrainingConfig,
    sequence_length: int,
    kind: DeviceKind = "cpu",
    companions: Companions | None = None,
) -> list[MemoryEstimate]:
    """The estimate of a rank of every pipeline stage, in their order; see :func:`memory_per_rank`."""
    given = (config, layout, training, sequence_length, kind)
    return [_stage_memory(*given, stage, companions) for stage in stages(config, layout)]


def parameters_per_rank(config: ModelConfig, layout: Layout) -> list[int]:
    """Parameters on a rank of every pipeline stage, copies of tied embeddings included."""
    return [_held(config, layout.tensor, stage).total for stage in stages(config, layout)]


def offload_disk_bytes(config: ModelConfig, layout: Layout) -> int:
    """What the ranks together take in ``layout.offload_dir``, at most: small parameters stay in memory."""
    if layout.offload != "nvme":
        return 0
    return DISK_BYTES_PER_ELEMENT * layout.tensor * sum(parameters_per_rank(config, layout))


@dataclass(frozen=True)
class _Held:
    """Parameters that one rank holds, and the number of elements of the largest of them."""

    total: int
    largest: int


@lru_cache(maxsize=4096)
def _held(config: ModelConfig, tensor: int, stage: Stage) -> _Held:
    total, largest = 0, 0
    shapes = _shapes(config)
    for name, shape in shapes.items():
        elements = prod(shape) // (tensor if _is_split(name) else 1)
        copies = _copies(name, shapes, stage)
        total += copies * elements
        largest = max(largest, elements if copies else 0)
    return _Held(total, largest)


@lru_cache(maxsize=4096)
def _linear(config: ModelConfig, tensor: int, stage: Stage) -> int:
    """Linear weights of layers that one rank holds."""
    shapes = _shapes(config)
    names = [name for name, shape in shapes.items() if name.startswith("layers.") and len(shape) == 2]
    return sum(_copies(name, shapes, stage) * prod(shapes[name]) // tensor for name in names)


@lru_cache(maxsize=256)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter outside the layers, and those of layer 0: layers are alike."""
    return config.model_copy(update={"layers": 1}).parameter_shapes()


def _copies(name: str, shapes: Mapping[str, tuple[int, ...]], stage: Stage) -> int:
    """How often a rank of ``stage`` holds a parameter; tied embeddings stand on the first stage and on the last."""
    if name.startswith("layers."):
        return stage.layers
    if name.startswith(("final_norm.", "output.")):
        return int(stage.last)
    is_tied = name == "embedding.tokens" and "output.weight" not in shapes
    return int(stage.first or (is_tied and stage.last))


def _is_split(name: str) -> bool:
    """Whether a parameter is divided over tensor-parallel ranks; the others are held by all of them."""
    if name in ("embedding.tokens", "output.weight"):
        return True
    if not name.startswith("layers.") or ".norm." in name:
        return False
    return not name.endswith(("attention.o.bias", "mlp.down.bias"))


def _stage_memory(
    config: ModelConfig,
    layout: Layout,
    training: TrainingConfig,
    sequence_length: int,
    kind: DeviceKind,
    stage: Stage,
    companions: Companions | None,
) -> MemoryEstimate:
    held = _held(config, layout.tensor, stage)
    parameters = held.total
    state = _State.of(layout, training)
    working = _working_precision(training)
    activations = _activations(config, layout, training, sequence_length, kind, stage)
    logits = _logits(config, layout, training, sequence_length, kind) if stage.last else 0
    buffers = held.largest * working + round(held.largest * state.swap_buffers)
    taught_weights, taught, rounded = 0, 0, 0
    if companions is not None:
        teacher = companions.teacher
        if stage.last:
            logits += _loss_bytes(config, layout, training, sequence_length, kind, "taught" if teacher else "alone")
        if teacher is not None:
            theirs = stages(teacher, layout)[stage.index]
            taught_weights = _held(teacher, layout.tensor, theirs).total * working
            taught = _teacher_activations(teacher, layout, training, sequence_length, kind, theirs)
        rounded = _linear(config, layout.tensor, stage) * working if companions.rounded else 0
    return MemoryEstimate(
        weights=round(parameters * state.weights),
        gradients=round(parameters * state.gradients),
        master_weights=round(parameters * state.master),
        moments=round(parameters * state.moments),
        activations=activations,
        logits=logits,
        buffers=buffers,
        teacher_weights=taught_weights,
        teacher_activations=taught,
        rounded_weights=rounded,
        heap=round(HEAP_SHARE[kind] * (activations + logits + buffers + taught)),
        offloaded=round(parameters * state.offloaded),
    )


@dataclass(frozen=True)
class _State:
    """Bytes per parameter of a rank, by engine."""

    weights: float
    gradients: float
    master: float
    moments: float
    offloaded: float = 0.0
    swap_buffers: float = 0.0
    """Per element of the largest parameter, where a disk holds the optimizer."""

    @classmethod
    def of(cls, layout: Layout, training: TrainingConfig) -> "_State":
        working = _working_precision(training)
        if layout.engine == "lean":
            return cls(weights=FP32, gradients=0.0, master=0.0, moments=2 * BF16)
        if layout.engine == "deepspeed":
            return _zero(layout, working)
        sharded = layout.data if training.distributed_optimizer else 1
        master = FP32 / sharded if working == BF16 else 0.0
        return cls(weights=working, gradients=FP32, master=master, moments=2 * FP32 / sharded)


def _zero(layout: Layout, working: int) -> _State:
    """ZeRO (Rajbhandari et al. 2020): stage 1 shards the optimizer over data, 2 the gradients too, 3 the weights too.

    DeepSpeed keeps float32 master weights of its own whatever the working precision.
    """
    optimizer, gradients, weights = (layout.data if layout.zero_stage >= stage else 1 for stage in (1, 2, 3))
    state = 3 * FP32 / optimizer
    if layout.offload == "none":
        return _State(working / weights, working / gradients, state / 3, 2 * state / 3)
    if layout.offload == "cpu":
        return _State(working / weights, working / gradients, 0.0, 0.0, offloaded=state)
    return _State(working / weights, working / gradients, 0.0, 0.0, swap_buffers=state + FP32 / optimizer)


def _working_precision(training: TrainingConfig) -> int:
    """Bytes of a weight or an activation."""
    return BF16 if training.precision == "bf16" else FP32


def _activations(
    config: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, kind: DeviceKind, stage: Stage
) -> int:
    """Bytes that wait for the backward pass, over the layers of all micro-batches in flight."""
    assert isinstance(training.micro_batch, int)
    tokens = training.micro_batch * sequence_length
    stored = tokens * _layer_bytes_per_token(config, layout, training, kind)
    if training.recompute:
        kept = tokens * config.hidden * _working_precision(training) // _sequence_shards(layout)
        return round(kept * _layers_in_flight(layout, training, stage) + stored)
    return round(stored * _layers_in_flight(layout, training, stage))


def _layers_in_flight(layout: Layout, training: TrainingConfig, stage: Stage) -> float:
    """Layers × micro-batches whose activations a rank of ``stage`` holds at once.

    1F1B: as many micro-batches as there are stages from this one on. Interleaved: Narayanan et al. 2021, section 2.2.
    """
    count = micro_batches(layout, training)
    behind = layout.pipeline - 1 - stage.index
    if layout.virtual_pipeline == 1:
        return stage.layers * min(count, behind + 1)
    chunks = 2 * behind + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return stage.layers * min(count, chunks / layout.virtual_pipeline)


def micro_batches(layout: Layout, training: TrainingConfig) -> int:
    """Micro-batches per step and data rank."""
    assert isinstance(training.global_batch, int)
    assert isinstance(training.micro_batch, int)
    return training.global_batch // (training.micro_batch * layout.data)


def _sequence_shards(layout: Layout) -> int:
    """Ranks over which the parts outside attention and feed-forward are divided."""
    return layout.tensor if layout.sequence_parallel else 1


def _layer_bytes_per_token(config: ModelConfig, layout: Layout, training: TrainingConfig, kind: DeviceKind) -> float:
    """Bytes of one layer that autograd keeps for one token."""
    assert isinstance(config, GPTConfig), f"no activation formula for family {config.family}"
    heads = config.heads * config.channels
    groups = config.query_groups * config.channels
    # The input and output of both norms.
    shared = 4 * config.hidden / _sequence_shards(layout)
    # Queries, keys and values; the attention's output, as the kernel left it and as the next product takes it.
    split = (_attention_inputs(config, training) if kind == "gpu" else heads + 2 * groups) + 2 * heads
    # What goes into the activation function (of a gated unit both halves) and what comes out; on CPUs the activated
    # gate, too, which is quicker to keep than to compute again.
    gated = 3 if kind == "gpu" else 4
    split += (gated if config.gated else 2) * config.feed_forward
    return (shared + split / layout.tensor) * _working_precision(training)


def _attention_inputs(config: GPTConfig, training: TrainingConfig) -> int:
    """Numbers per token that CUDA's attention kernels keep of queries, keys and values.

    The values are a view of the product that holds all three, so that it stays beside the rotated queries and keys.
    In float32 grouped keys and values are repeated for every head (:mod:`parallelism.models.gpt.attention`).
    """
    heads, groups = config.heads * config.channels, config.query_groups * config.channels
    if training.precision == "fp32" and groups != heads:
        return 3 * heads
    product = heads + 2 * groups
    return product + heads + groups if config.style == "llama" else product


def _logits(
    config: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, kind: DeviceKind
) -> int:
    """Bytes of the output layer's result, which becomes its gradient in place; on CPUs in float32, copied there."""
    assert isinstance(training.micro_batch, int)
    tokens = training.micro_batch * sequence_length
    copied = kind == "cpu" and training.precision == "bf16"
    precision = _working_precision(training) + (FP32 if copied else 0)
    return tokens * config.padded_vocab_size // layout.tensor * precision


def _loss_bytes(
    config: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, kind: DeviceKind, loss: str
) -> int:
    """What the loss of a training with given weights takes beside the logits: a copy of them, turned, and its rows."""
    row = sequence_length * config.padded_vocab_size // layout.tensor * FP32
    return _logits(config, layout, training, sequence_length, kind) + LOSS_ROWS[loss] * row


def _teacher_activations(
    teacher: ModelConfig,
    layout: Layout,
    training: TrainingConfig,
    sequence_length: int,
    kind: DeviceKind,
    stage: Stage,
) -> int:
    """Bytes of a teacher's forward pass: one layer's while they are computed, then the logits until the loss is.

    With pipeline stages the last one holds the logits of all micro-batches of a step
    (:class:`parallelism.engines.distillation.Teacher`).
    """
    assert isinstance(training.micro_batch, int)
    passing = round(training.micro_batch * sequence_length * _layer_bytes_per_token(teacher, layout, training, kind))
    if not stage.last:
        return passing
    logits = _logits(teacher, layout, training, sequence_length, kind)
    kept = logits * (micro_batches(layout, training) if layout.pipeline > 1 else 1)
    return max(passing, kept)
