"""Which layouts a model can be trained at, and which of them is best. Torch-free."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from math import gcd

from launcher.planning.cluster import GIBI, Cluster
from launcher.planning.costs import StepCost, step_cost
from launcher.problems import Problem
from parallelism.engines import limits
from parallelism.layout import Layout
from parallelism.memory import BASELINE_BYTES, Companions, MemoryEstimate, memory_per_rank
from parallelism.models.base import ModelConfig
from parallelism.registry import ENGINES
from parallelism.rules import micro_batches
from parallelism.start import StartPoint, check_start
from parallelism.suggest import remedy
from parallelism.training import TrainingConfig

FITS = 0.92
"""Share of a device's memory that may be filled: estimates err, and allocators waste."""
NEAR = 1.05
"""Layouts within this factor of the fastest count as equally fast; the one with the fewest devices is taken."""
LARGEST_VIRTUAL = 4


@dataclass(frozen=True)
class Choice:
    """A layout with what goes with it."""

    layout: Layout
    training: TrainingConfig
    cost: StepCost
    memory: MemoryEstimate


@dataclass(frozen=True)
class Case:
    """What is to be spread: a model with its training.

    ``training`` holds no ``auto``; ``free`` names its fields that do not change what is learnt (``micro_batch``,
    ``recompute``) or, for the lean engine only, ``global_batch``. A recovery also has a ``start`` (whose checkpoints
    need not be there) and, where that names one, a ``teacher``.
    """

    model: ModelConfig
    training: TrainingConfig
    free: frozenset[str]
    sequence_length: int
    saves_devices: bool
    """Whether device-seconds count rather than seconds: under a budget in device-hours or money."""
    start: StartPoint | None = None
    teacher: ModelConfig | None = None

    def memory(self, layout: Layout, training: TrainingConfig, cluster: Cluster) -> MemoryEstimate:
        """Of the rank that needs most."""
        start = self.start
        companions = Companions(self.teacher, start.rounding is not None) if start is not None else None
        return memory_per_rank(self.model, layout, training, self.sequence_length, cluster.device_kind, companions)

    def cost(self, layout: Layout, training: TrainingConfig, cluster: Cluster) -> StepCost:
        """Of one step."""
        return step_cost(self.model, layout, training, self.sequence_length, cluster, self.teacher)


# What is legal


def problems_of(case: Case, layout: Layout, training: TrainingConfig, cluster: Cluster) -> list[Problem]:
    """Everything that forbids this layout, memory apart; fields are relative to the candidate."""
    if layout.engine not in ENGINES:
        return [Problem("layout.engine", layout.engine, "unknown engine", remedy(layout.engine, ENGINES))]
    models = [case.model, *([case.teacher] if case.teacher else [])]
    return [
        *_size_problems(layout, cluster),
        *(problem for model in models for problem in _tensor_problems(model, layout, case.sequence_length)),
        *(problem for model in models for problem in _pipeline_problems(model, layout)),
        *_batch_problems(layout, training),
        *_engine_problems(layout, training),
        *_start_problems(case, layout),
    ]


def _size_problems(layout: Layout, cluster: Cluster) -> Iterator[Problem]:
    if layout.world_size > cluster.devices:
        what = f"tensor × pipeline × data occupies {layout.world_size} devices, and the cluster has {cluster.devices}"
        yield Problem("layout", str(layout), what, f"lower one of them, or run on {layout.world_size} devices")
    if layout.tensor > cluster.devices_per_node:
        what = f"a tensor-parallel group stays on one node, and a node has {cluster.devices_per_node} devices"
        yield Problem("layout.tensor", layout.tensor, what, f"use {cluster.devices_per_node} or fewer, and pipeline")


def divisible_by_tensor(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism divides, by its name in the model."""
    widths = {"heads": model.heads}
    groups = getattr(model, "query_groups", model.heads)
    if groups != model.heads:
        widths["kv_heads"] = groups
    if hasattr(model, "feed_forward"):
        widths["ffn_hidden"] = model.feed_forward
    return widths | {"the padded vocabulary": model.padded_vocab_size}


def _tensor_problems(model: ModelConfig, layout: Layout, sequence_length: int) -> Iterator[Problem]:
    tensor = layout.tensor
    widths = divisible_by_tensor(model)
    legal = ", ".join(str(size) for size in _divisors(gcd(*widths.values())))
    for name, width in widths.items():
        if width % tensor:
            yield Problem(
                "layout.tensor", tensor, f"does not divide {name} {width}", f"possible for this model: {legal}"
            )
    if layout.sequence_parallel and sequence_length % tensor:
        what = f"with sequence_parallel, tensor {tensor} has to divide data.sequence_length {sequence_length}"
        yield Problem("layout.sequence_parallel", True, what, "change one of them, or leave sequence_parallel out")


def _pipeline_problems(model: ModelConfig, layout: Layout) -> Iterator[Problem]:
    chunks = layout.pipeline * layout.virtual_pipeline
    if layout.pipeline > model.layers:
        what = f"more stages than the model has layers ({model.layers})"
        yield Problem("layout.pipeline", layout.pipeline, what, f"use {model.layers} or fewer")
    elif layout.virtual_pipeline > 1 and model.layers % chunks:
        legal = [size for size in _divisors(model.layers) if size % layout.pipeline == 0]
        hint = ", ".join(str(size // layout.pipeline) for size in legal) or "none: change pipeline"
        what = f"pipeline {layout.pipeline} × virtual_pipeline does not divide {model.layers} layers"
        yield Problem("layout.virtual_pipeline", layout.virtual_pipeline, what, f"possible: {hint}")


def _batch_problems(layout: Layout, training: TrainingConfig) -> Iterator[Problem]:
    assert isinstance(training.global_batch, int)
    assert isinstance(training.micro_batch, int)
    share = training.micro_batch * layout.data
    if training.global_batch % share:
        what = f"not a multiple of micro_batch {training.micro_batch} × data {layout.data}"
        nearest = max(1, round(training.global_batch / share)) * share
        yield Problem(
            "training.global_batch", training.global_batch, what, f"use {nearest} or another multiple of {share}"
        )
        return
    count = training.global_batch // share
    if layout.virtual_pipeline > 1 and count % layout.pipeline:
        what = (
            f"an interleaved pipeline needs a number of micro-batches per step that pipeline {layout.pipeline} divides,"
            f" and there are {count}"
        )
        hint = f"use a multiple of {share * layout.pipeline}, or leave virtual_pipeline out"
        yield Problem("training.global_batch", training.global_batch, what, hint)


def _engine_problems(layout: Layout, training: TrainingConfig) -> Iterator[Problem]:
    """What the engines' own check says; its message begins with the field."""
    try:
        limits.check(layout, training)
    except ValueError as error:
        text = str(error)
        named = re.match(r"(training|layout)\.(\w+)", text)
        if named:
            owner = {"training": training, "layout": layout}[named[1]]
            head, _, rest = text.partition(": ")
            text = rest if head.count(" ") == 1 else text
            yield Problem(named[0], getattr(owner, named[2], None), text, "")
        else:
            yield Problem("layout.engine", layout.engine, text, "")


def _start_problems(case: Case, layout: Layout) -> Iterator[Problem]:
    """What forbids a recovery at this layout; all layers are alike, so that one is enough to look at."""
    try:
        check_start(case.start, case.model.model_copy(update={"layers": 1}), layout)
    except ValueError as error:
        yield Problem("layout", str(layout), str(error), "")


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


# What fits


def room_bytes(cluster: Cluster) -> int:
    """Bytes of one device that a model may fill: the share :data:`FITS`, less what every rank holds without a model."""
    return int(FITS * cluster.memory_bytes_per_device) - BASELINE_BYTES[cluster.device_kind]


def fits(memory: MemoryEstimate, cluster: Cluster) -> bool:
    """Whether a rank finds room, on its device and for what it offloads."""
    host = FITS * cluster.host_memory_bytes_per_device
    return memory.total <= room_bytes(cluster) and memory.offloaded <= host


# What is best


def best_layout(case: Case, cluster: Cluster) -> Choice | None:
    """The fastest legal layout that fits; None where none does.

    Engines in this order, each only where the ones before it fit nowhere: megatron-core; DeepSpeed's ZeRO-2 and 3,
    which share gradients and weights too; ZeRO with the optimizer in the host's memory (GPUs); the lean engine, whose
    bf16 moments and late clipping change what is learnt.
    """
    for options in _tiers(case, cluster):
        choice = _fastest(case, cluster, options)
        if choice:
            return choice
    return None


def _tiers(case: Case, cluster: Cluster) -> Iterator[Iterable[Layout]]:
    yield megatron_layouts(case, cluster)
    zero = [layout for layout in flat_layouts(case, cluster) if layout.data > 1]
    yield [_with(layout, engine="deepspeed", zero_stage=stage) for layout in zero for stage in (2, 3)]
    if cluster.device_kind == "gpu" and cluster.host_memory_bytes_per_device:
        flat = flat_layouts(case, cluster)
        yield [_with(layout, engine="deepspeed", zero_stage=3, offload="cpu") for layout in flat]
    yield [_with(layout, engine="lean") for layout in flat_layouts(case, cluster)]


def megatron_layouts(case: Case, cluster: Cluster) -> Iterator[Layout]:
    """Tensor × pipeline × data (× virtual stages) that the cluster holds and the model can be divided by."""
    stages = {size for size in range(1, case.model.layers + 1) if size <= 8 or case.model.layers % size == 0}
    for flat, pipeline in product(list(flat_layouts(case, cluster)), sorted(stages)):
        if flat.world_size * pipeline > cluster.devices:
            continue
        yield _with(flat, pipeline=pipeline)
        for virtual in range(2, LARGEST_VIRTUAL + 1):
            if pipeline > 1 and case.model.layers % (pipeline * virtual) == 0:
                yield _with(flat, pipeline=pipeline, virtual_pipeline=virtual)


def flat_layouts(case: Case, cluster: Cluster) -> Iterator[Layout]:
    """Tensor × data; on GPUs with sequence parallelism, which costs nothing and saves activations."""
    assert isinstance(case.training.global_batch, int)
    common = gcd(*divisible_by_tensor(case.model).values())
    for tensor, data in product(_divisors(common), _divisors(case.training.global_batch)):
        if tensor <= cluster.devices_per_node and tensor * data <= cluster.devices:
            sequence = cluster.device_kind == "gpu" and tensor > 1 and case.sequence_length % tensor == 0
            yield Layout(tensor=tensor, data=data, sequence_parallel=sequence)


def _with(layout: Layout, **changes: object) -> Layout:
    return layout.model_copy(update=changes)


def _fastest(case: Case, cluster: Cluster, layouts: Iterable[Layout]) -> Choice | None:
    """The best by cost among those that fit; memory is looked at only as far down the list as needed."""
    costs = []
    for layout in layouts:
        for training in trainings(case, layout):
            if not problems_of(case, layout, training, cluster):
                cost = case.cost(layout, training, cluster)
                costs.append((_objective(case, layout, training, cost), layout, training, cost))
    costs.sort(key=lambda row: (row[0], row[1].world_size))
    best: tuple[float, Choice] | None = None
    for objective, layout, training, cost in costs:
        if best and objective > NEAR * best[0]:
            break
        if best and layout.world_size >= best[1].layout.world_size:
            continue
        memory = case.memory(layout, training, cluster)
        if fits(memory, cluster):
            choice = Choice(layout, training, cost, memory)
            best = (best[0] if best else objective, choice)
    return best[1] if best else None


def trainings(case: Case, layout: Layout) -> Iterator[TrainingConfig]:
    """What may still be chosen at a layout: the micro-batch, recomputation and, for the lean engine, the batch."""
    given = case.training
    assert isinstance(given.global_batch, int)
    recompute = [False, True] if "recompute" in case.free and layout.engine != "lean" else [given.recompute]
    for batch in _batches(case, layout):
        share = micro_batches(batch, layout.data)
        sizes = share if "micro_batch" in case.free else [given.micro_batch]
        for micro, again in product(sizes[:1] if layout.engine == "lean" else sizes, recompute):
            update: dict[str, object] = {"global_batch": batch, "micro_batch": micro, "recompute": again}
            if layout.engine == "lean" and "precision" in case.free:
                update["precision"] = "fp32"
            yield given.model_copy(update=update)


def _batches(case: Case, layout: Layout) -> list[int]:
    """The lean engine has no accumulation, so that a batch chosen by rule is halved until it fits."""
    batch = case.training.global_batch
    assert isinstance(batch, int)
    if layout.engine != "lean" or "global_batch" not in case.free:
        return [batch]
    halves = [batch >> shift for shift in range(batch.bit_length())]
    return [half for half in halves if half % layout.data == 0]


def _objective(case: Case, layout: Layout, training: TrainingConfig, cost: StepCost) -> float:
    """Seconds, or device-seconds, for each sequence."""
    assert isinstance(training.global_batch, int)
    return cost.total * (layout.world_size if case.saves_devices else 1) / training.global_batch


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / GIBI:.2f} GiB"
