"""The choice of a layout for one training, or its refusal with what would have to change. Torch-free."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from launcher.planning.cluster import Cluster
from launcher.planning.layouts import (
    Case,
    Choice,
    best_layout,
    fits,
    flat_layouts,
    gib,
    problems_of,
    room_bytes,
    trainings,
)
from launcher.problems import Problem, SpecError
from parallelism.layout import Layout
from parallelism.training import TrainingConfig

LEAST_STATE, LEAST_OFFLOADED = 8, 1
"""Bytes per parameter that the thriftiest engine needs: fp32 weights and two bf16 moments; ZeRO-3 with offload."""
LARGEST_CLUSTER = 16384
"""How far is searched for a cluster on which a model would fit."""


def choose(case: Case, layout: Layout | None, cluster: Cluster) -> Choice:
    """The best of what is free at the given layout, or at the best one.

    Raises :class:`launcher.problems.SpecError`; fields are relative to the candidate.
    """
    if layout is not None:
        return _at_layout(case, layout, cluster)
    choice = best_layout(case, cluster)
    if choice is None:
        raise SpecError([_too_large(case, cluster, None, case.training)])
    return choice


def batch_of(choice: Choice) -> int:
    """Sequences of a step."""
    assert isinstance(choice.training.global_batch, int)
    return choice.training.global_batch


def _at_layout(case: Case, layout: Layout, cluster: Cluster) -> Choice:
    """The best micro-batch at a given layout."""
    choices: list[Choice] = []
    problems: list[Problem] = []
    smallest: tuple[int, TrainingConfig] | None = None
    for training in trainings(case, layout):
        found = problems_of(case, layout, training, cluster)
        problems += found
        if found:
            continue
        memory = case.memory(layout, training, cluster)
        smallest = min(smallest or (memory.total, training), (memory.total, training), key=lambda pair: pair[0])
        if fits(memory, cluster):
            choices.append(Choice(layout, training, case.cost(layout, training, cluster), memory))
    if choices:
        return min(choices, key=lambda choice: choice.cost.total / batch_of(choice))
    if smallest:
        raise SpecError([_too_large(case, cluster, layout, smallest[1])])
    raise SpecError(
        [
            problem if problem.field.startswith(("layout", "training")) else problem.below("layout")
            for problem in dict.fromkeys(problems)
        ]
    )


def _too_large(case: Case, cluster: Cluster, layout: Layout | None, training: TrainingConfig) -> Problem:
    """The refusal of a model that does not fit at ``layout``, or, without one, at any; with what would work."""
    what = needs(case, cluster, layout or roomiest(case, cluster), training)
    if layout is None:
        what = f"fits on {cluster.devices} devices at no layout: {what}"
    field = "layout" if layout else "model"
    shown = str(layout) if layout else None
    return Problem(
        field, shown, what, ", or ".join([*remedies(case, cluster, layout is not None), "use a smaller model"])
    )


def needs(case: Case, cluster: Cluster, layout: Layout, training: TrainingConfig) -> str:
    """What a training takes at a layout, and what there is."""
    needed = case.memory(layout, training, cluster)
    largest = max(needed.parts(), key=needed.parts().__getitem__).replace("_", " ")
    return (
        f"{case.model.parameter_count():,} parameters need {gib(needed.total)} on every device at {layout} (most for"
        f" {largest}), and {gib(room_bytes(cluster))} of {gib(cluster.memory_bytes_per_device)} can be used"
    )


def roomiest(case: Case, cluster: Cluster) -> Layout:
    """The layout whose ranks need least: the model divided as far as it can be."""
    flat = [layout for layout in flat_layouts(case, cluster) if layout.data == 1]
    layouts = [
        layout.model_copy(update={"pipeline": min(case.model.layers, cluster.devices // layout.tensor)})
        for layout in flat
    ]
    return min(layouts, key=lambda layout: case.memory(layout, case.training, cluster).total)


def remedies(case: Case, cluster: Cluster, given: bool) -> list[str]:
    """What would make it fit, each tried before it is recommended; ``given``: the layout was."""
    found = []
    choice = best_layout(case, cluster) if given else None
    if choice:
        found.append(f"leave layout out: {choice.layout} fits")
    devices = _enough(case, cluster)
    if devices and devices > cluster.devices:
        found.append(f"use {devices} such devices")
    shorter = _shorter(case, cluster)
    if shorter:
        found.append(f"use data.sequence_length: {shorter}")
    return found


def _enough(case: Case, cluster: Cluster) -> int | None:
    """The smallest power of two of devices on which the model fits."""
    sizes = (2**power for power in range(LARGEST_CLUSTER.bit_length()) if _may_fit(case, cluster, 2**power))
    return _first(sizes, lambda size: best_layout(case, _scaled(cluster, size)) is not None)


def _may_fit(case: Case, cluster: Cluster, devices: int) -> bool:
    """False where the bare state of the thriftiest engine does not fit on ``devices``."""
    state = LEAST_OFFLOADED if cluster.host_memory_bytes_per_device else LEAST_STATE
    return case.model.parameter_count() * state <= devices * room_bytes(cluster)


def _scaled(cluster: Cluster, devices: int) -> Cluster:
    per_node = max(cluster.devices_per_node, min(devices, 8))
    return cluster.model_copy(update={"devices": devices, "devices_per_node": per_node})


def _shorter(case: Case, cluster: Cluster) -> int | None:
    if not _may_fit(case, cluster, cluster.devices):
        return None
    lengths = (case.sequence_length >> shift for shift in range(1, case.sequence_length.bit_length() - 4))
    return _first(lengths, lambda length: best_layout(replace(case, sequence_length=length), cluster) is not None)


def _first(values: Iterable[int], suits: Callable[[int], bool]) -> int | None:
    return next((value for value in values if suits(value)), None)
