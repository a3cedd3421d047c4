"""What one training run will do and take: a candidate's, or the recovery of a variant. Torch-free."""

from dataclasses import fields

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from launcher.planning.choices import batch_of
from launcher.planning.cluster import Cluster
from launcher.planning.costs import EFFICIENCY
from launcher.planning.disk import checkpoint_bytes
from launcher.planning.layouts import Case, Choice, room_bytes
from launcher.spec import JobSpec
from parallelism.accounting import train_flops_per_sequence
from parallelism.budget import Budget
from parallelism.layout import Layout
from parallelism.memory import MemoryEstimate, offload_disk_bytes
from parallelism.options import Options
from parallelism.training import CheckpointPolicy, TrainingConfig

START_SECONDS = {"cpu": 5.0, "gpu": 20.0}
"""From the moment the devices are held to the first step; budgets that count a clock pay for it."""


class PlannedRun(Options):
    """Where it runs, what its budget buys, and what it takes."""

    layout: Layout
    training: TrainingConfig
    budget: Budget
    """Its share of the candidate's."""
    checkpoint: CheckpointPolicy
    """As asked, but written while training waits where a snapshot would not fit beside it."""
    flops_per_token: PositiveFloat
    """A teacher's forward pass included."""
    steps: PositiveInt
    tokens: PositiveInt
    flops: PositiveFloat
    step_seconds: PositiveFloat
    step_parts: dict[str, float]
    """Seconds of a step, by part."""
    seconds: PositiveFloat
    device_seconds: PositiveFloat
    cost: NonNegativeFloat
    memory: MemoryEstimate
    memory_bytes: NonNegativeInt
    """Per device, above the baseline."""
    checkpoint_bytes: NonNegativeInt
    """Of one checkpoint."""
    offload_bytes: NonNegativeInt = 0
    """In the layout's ``offload_dir``, of all ranks together."""


class TooSmall(ValueError):
    """A budget that does not buy one step."""

    def __init__(self, budget: Budget, batch: int, need: float) -> None:
        """``need``: what one step of ``batch`` sequences takes, in the budget's unit."""
        super().__init__(
            f"the budget leaves {budget.limit:g} {budget.unit} for training and one step of {batch} sequences needs"
            f" {need:.3g}"
        )


def planned_run(spec: JobSpec, case: Case, budget: Budget, choice: Choice, cluster: Cluster) -> PlannedRun:
    """The run of a case under its choice. Raises :class:`TooSmall`."""
    length, layout = spec.data.sequence_length, choice.layout
    steps = whole_steps(spec, case, budget, choice, cluster)
    if steps == 0:
        raise TooSmall(budget, batch_of(choice), _step_amount(spec, case, budget, choice, cluster))
    tokens, per_token = steps * batch_of(choice) * length, flops_per_token(case)
    seconds = steps * choice.cost.total + START_SECONDS[cluster.device_kind]
    return PlannedRun(
        layout=layout,
        training=choice.training,
        budget=budget,
        checkpoint=_checkpoint_policy(spec, choice, cluster),
        flops_per_token=per_token,
        steps=steps,
        tokens=tokens,
        flops=tokens * per_token,
        step_seconds=choice.cost.total,
        step_parts={part.name: getattr(choice.cost, part.name) for part in fields(choice.cost)},
        seconds=seconds,
        device_seconds=seconds * layout.world_size,
        cost=seconds * layout.world_size / 3600.0 * spec.execution.price_per_device_hour,
        memory=choice.memory,
        memory_bytes=choice.memory.total,
        checkpoint_bytes=checkpoint_bytes(case.model, layout, choice.training),
        offload_bytes=offload_disk_bytes(case.model, layout),
    )


def flops_per_token(case: Case) -> float:
    """Of training, with the teacher's forward pass."""
    return train_flops_per_sequence(case.model, case.sequence_length, case.teacher) / case.sequence_length


def first_guess(spec: JobSpec, budget: Budget, flops: float, cluster: Cluster) -> float:
    """Tokens that the budget buys at ``flops`` for each.

    Where it limits a clock, at the speed of large matrices on all devices.
    """
    if budget.unit == "tokens":
        return budget.limit
    if budget.unit == "flops":
        return budget.limit / flops
    seconds = _clock_seconds(spec, budget, cluster.devices, cluster)
    return max(1.0, seconds * cluster.devices * cluster.peak_flops * EFFICIENCY[cluster.device_kind] / flops)


def whole_steps(spec: JobSpec, case: Case, budget: Budget, choice: Choice, cluster: Cluster) -> int:
    """Whole steps within the budget."""
    if budget.counts_progress:
        return int(budget.limit // _step_amount(spec, case, budget, choice, cluster))
    return int(_clock_seconds(spec, budget, choice.layout.world_size, cluster) // choice.cost.total)


def _clock_seconds(spec: JobSpec, budget: Budget, devices: int, cluster: Cluster) -> float:
    """Seconds of training that a budget in clock units gives ``devices`` devices; their start is paid from it."""
    if budget.unit == "wall_clock":
        seconds = budget.limit
    elif budget.unit == "device_hours":
        seconds = budget.limit * 3600.0 / devices
    else:
        seconds = budget.limit / spec.execution.price_per_device_hour * 3600.0 / devices
    return max(0.0, seconds - START_SECONDS[cluster.device_kind])


def _step_amount(spec: JobSpec, case: Case, budget: Budget, choice: Choice, cluster: Cluster) -> float:
    """What a budget has to hold for one step, in its unit; on a clock with the start."""
    sequences, devices = batch_of(choice), choice.layout.world_size
    seconds = choice.cost.total + START_SECONDS[cluster.device_kind]
    return {
        "flops": sequences * train_flops_per_sequence(case.model, case.sequence_length, case.teacher),
        "tokens": float(sequences * case.sequence_length),
        "wall_clock": seconds,
        "device_hours": seconds * devices / 3600.0,
        "cost": seconds * devices / 3600.0 * spec.execution.price_per_device_hour,
    }[budget.unit]


def _checkpoint_policy(spec: JobSpec, choice: Choice, cluster: Cluster) -> CheckpointPolicy:
    """On CPUs the snapshot of an asynchronous checkpoint is memory that training then changes: all of the state."""
    policy, memory = spec.execution.checkpoint_every, choice.memory
    snapshot = memory.weights + memory.master_weights + memory.moments
    if cluster.device_kind == "cpu" and memory.total + snapshot > room_bytes(cluster):
        return policy.model_copy(update={"asynchronous": False})
    return policy
