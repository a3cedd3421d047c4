"""How long one optimizer step takes, from shapes and the cluster's figures. Torch-free.

The cost model. One step of a candidate with global batch ``B`` sequences of length ``s`` at tensor ``t`` × pipeline
``p`` × data ``d`` with ``v`` chunks per stage runs ``m = B / (micro_batch · d)`` micro-batches. It is the sum of:

* **compute**: the FLOPs of a micro-batch on the largest stage / (t · peak · :data:`EFFICIENCY`), plus
  :data:`LAYER_SECONDS` for every layer, which small matrices cannot hide; m times. With recomputation the layers cost
  4/3.
* **tensor**: four all-reduces of the activations in every layer and micro-batch, and two around the embedding and the
  output layer (Shoeybi et al. 2019, section 3); each moves 2·(t - 1)/t of the bytes over the link inside a node and
  has a latency. With recomputation, six.
* **pipeline**: the bubble, (p - 1)/v further micro-batches (Narayanan et al. 2021, section 2.2), and the activations
  and gradients that pass the boundaries of v chunks with every micro-batch.
* **data**: the gradients in float32, 2·(d - 1)/d of their bytes, over the network where the group spans nodes.
* **optimizer**: :data:`OPTIMIZER_BYTES` of memory traffic for every parameter of the rank, over d where its state is
  sharded; with offload, over the host's link instead.
* **teacher**: of a model that is learnt from, the same for its forward pass alone: a third of a layer's FLOPs, half of
  the all-reduces, its own bubble, and activations that pass the boundaries once.

Tensor-parallel ranks are neighbours, then come data-parallel ones, then pipeline stages: so a group spans nodes where
it and what lies inside it need more devices than a node has. The constants are measured: on CPUs with this project's
engines on two cores, on GPUs after Narayanan et al. 2021, table 1.
"""

from dataclasses import dataclass, fields

from launcher.planning.cluster import Cluster
from parallelism.layout import Layout, stage_layers
from parallelism.memory import micro_batches, parameters_per_rank
from parallelism.models.base import ModelConfig
from parallelism.training import TrainingConfig

EFFICIENCY = {"cpu": 0.5, "gpu": 0.5}
"""Share of the matmul peak that large matrices reach in training."""
LAYER_SECONDS = {"cpu": 2.0e-3, "gpu": 3.0e-4}
"""Forward and backward pass of a layer without any arithmetic: Python, kernel launches, small kernels."""
STEP_SECONDS = {"cpu": 1.0e-2, "gpu": 5.0e-3}
"""A step without any layer: data, learning rate, loss."""
SLOWER = {("cpu", "bf16"): 0.5, ("gpu", "fp32"): 1 / 8}
"""Matmul speed of the precision that ``peak_flops`` does not speak of."""
OPTIMIZER_BYTES = 48
"""Read and written per parameter: gradient zeroed, reduced, measured and read; weight, two moments read and written."""
ENGINE_SLOWDOWN = {"megatron": 1.0, "deepspeed": 1.15, "lean": 1.05}
OFFLOAD_BYTES_PER_SECOND = 2e10
"""Between a GPU and its host, and of the host's memory under the CPU's optimizer."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step, by part."""

    compute: float
    tensor: float
    pipeline: float
    data: float
    optimizer: float
    teacher: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, part.name) for part in fields(self))


def step_cost(
    model: ModelConfig,
    layout: Layout,
    training: TrainingConfig,
    sequence_length: int,
    cluster: Cluster,
    teacher: ModelConfig | None = None,
) -> StepCost:
    """Seconds of one optimizer step under the cost model above; ``training`` holds no ``auto``."""
    count = micro_batches(layout, training)
    slowdown = ENGINE_SLOWDOWN[layout.engine]
    compute = slowdown * _micro_batch_seconds(model, layout, training, sequence_length, cluster)
    tensor = _tensor_seconds(model, layout, training, sequence_length, cluster)
    bubble = (layout.pipeline - 1) / layout.virtual_pipeline * (compute + tensor)
    passing = count * _boundary_seconds(model, layout, training, sequence_length, cluster)
    taught = _teacher_seconds(teacher, layout, training, sequence_length, cluster) if teacher is not None else 0.0
    return StepCost(
        compute=count * compute + STEP_SECONDS[cluster.device_kind],
        tensor=count * tensor,
        pipeline=bubble + passing,
        data=slowdown * _data_seconds(model, layout, cluster),
        optimizer=slowdown * _optimizer_seconds(model, layout, training, cluster),
        teacher=taught,
    )


def _teacher_seconds(
    teacher: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, cluster: Cluster
) -> float:
    """The forward pass of a step's micro-batches through a model that is only asked."""
    count = micro_batches(layout, training)
    kept = training.model_copy(update={"recompute": False})  # nothing is recomputed without a backward pass
    forward = _micro_batch_seconds(teacher, layout, kept, sequence_length, cluster) / 3
    forward += _tensor_seconds(teacher, layout, kept, sequence_length, cluster) / 2
    passing = _boundary_seconds(teacher, layout, kept, sequence_length, cluster) / 2
    bubble = (layout.pipeline - 1) / layout.virtual_pipeline * forward
    return ENGINE_SLOWDOWN[layout.engine] * (count * (forward + passing) + bubble)


def _micro_batch_seconds(
    model: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, cluster: Cluster
) -> float:
    """Forward and backward pass of one micro-batch on the stage with most layers, which may also be the last."""
    kind = cluster.device_kind
    layers = max(_layers_of_stages(model, layout))
    output = 2.0 * sequence_length * model.hidden * model.padded_vocab_size
    per_layer = (model.forward_flops(sequence_length) - output) / model.layers
    last = layers if layout.pipeline == 1 else _layers_of_stages(model, layout)[-1]
    passes = 4 if training.recompute else 3
    flops = max(passes * per_layer * layers, passes * per_layer * last + 3 * output) * _size(training)
    speed = cluster.peak_flops * EFFICIENCY[kind] * SLOWER.get((kind, training.precision), 1.0)
    return flops / (layout.tensor * speed) + layers * LAYER_SECONDS[kind] * passes / 3


def _tensor_seconds(
    model: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, cluster: Cluster
) -> float:
    """All-reduces within the tensor-parallel group for one micro-batch on the largest stage."""
    if layout.tensor == 1:
        return 0.0
    moved = 2 * (layout.tensor - 1) / layout.tensor * _activation_bytes(model, training, sequence_length)
    times = (6 if training.recompute else 4) * max(_layers_of_stages(model, layout)) + 2
    return times * (moved / cluster.link_bytes_per_second + cluster.link_latency_seconds)


def _boundary_seconds(
    model: ModelConfig, layout: Layout, training: TrainingConfig, sequence_length: int, cluster: Cluster
) -> float:
    """Activations forward and gradients back over one stage's boundaries, for one micro-batch."""
    if layout.pipeline == 1:
        return 0.0
    speed, latency = _between(cluster, layout.world_size)
    crossings = 2 * layout.virtual_pipeline
    return crossings * (_activation_bytes(model, training, sequence_length) / speed + latency)


def _data_seconds(model: ModelConfig, layout: Layout, cluster: Cluster) -> float:
    """The gradients' all-reduce (or reduce-scatter and all-gather) over the data-parallel group."""
    if layout.data == 1:
        return 0.0
    speed, latency = _between(cluster, layout.tensor * layout.data)
    gradients = 4 * max(parameters_per_rank(model, layout))
    # ZeRO-3 gathers the weights once more, for the forward pass.
    times = 1.5 if layout.zero_stage == 3 else 1.0
    return times * 2 * (layout.data - 1) / layout.data * gradients / speed + latency


def _optimizer_seconds(model: ModelConfig, layout: Layout, training: TrainingConfig, cluster: Cluster) -> float:
    sharded = layout.zero_stage > 0 if layout.engine == "deepspeed" else training.distributed_optimizer
    share = layout.data if sharded and layout.engine != "lean" else 1
    speed = cluster.memory_bytes_per_second if layout.offload == "none" else OFFLOAD_BYTES_PER_SECOND
    return OPTIMIZER_BYTES * max(parameters_per_rank(model, layout)) / share / speed


def _between(cluster: Cluster, devices: int) -> tuple[float, float]:
    """Bytes/s and latency within a group that, with what lies inside it, occupies ``devices`` neighbours."""
    if devices <= cluster.devices_per_node:
        return cluster.link_bytes_per_second, cluster.link_latency_seconds
    return cluster.network_bytes_per_second, cluster.network_latency_seconds


def _layers_of_stages(model: ModelConfig, layout: Layout) -> list[int]:
    chunks = stage_layers(model.layers, layout.pipeline * layout.virtual_pipeline)
    return [sum(chunks[stage :: layout.pipeline]) for stage in range(layout.pipeline)]


def _size(training: TrainingConfig) -> int:
    assert isinstance(training.micro_batch, int)
    return training.micro_batch


def _activation_bytes(model: ModelConfig, training: TrainingConfig, sequence_length: int) -> int:
    """The hidden states of one micro-batch."""
    return _size(training) * sequence_length * model.hidden * (2 if training.precision == "bf16" else 4)
