"""What a job will do and take, said before it starts. Torch-free.

The layout, where a candidate gives none, is the best of all legal ones that fit (:mod:`launcher.layouts`) under the
cost model of :mod:`launcher.costs`.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
)

from compression.config import CompressionConfig
from compression.recipe import grid
from launcher.cluster import Cluster
from launcher.costs import EFFICIENCY, StepCost, step_cost
from launcher.layouts import Case, Choice, best_layout, fits, gib, problems_of, room_bytes, too_large, trainings
from launcher.problems import Problem, SpecError, of_validation
from launcher.sources import SourceError, inspect_source, source_problem
from launcher.spec import CandidateSpec, JobSpec
from parallelism.accounting import calibration_flops, train_flops_per_sequence, train_flops_per_token, training_share
from parallelism.budget import Budget
from parallelism.checkpoint_store import read_model
from parallelism.layout import Layout
from parallelism.memory import BASELINE_BYTES, MemoryEstimate, memory_per_rank
from parallelism.models.base import ModelConfig
from parallelism.options import Options
from parallelism.presets import ModelError, resolve_model
from parallelism.registry import FAMILIES, load
from parallelism.rules import FEWEST_STEPS, DeviceKind, resolve_training
from parallelism.training import CheckpointPolicy, TrainingConfig

START_SECONDS = {"cpu": 5.0, "gpu": 20.0}
"""From the moment the devices are held to the first step; budgets that count a clock pay for it."""
MANY_PASSES = 4.0
"""More passes than this over the same text bring less and less (Muennighoff et al. 2023)."""


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
    """What is left for training: the reserve for calibration is taken off."""
    checkpoint: CheckpointPolicy
    """As asked, but written while training waits where a snapshot would not fit beside it."""
    flops_per_token: PositiveFloat
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
    baseline_bytes: NonNegativeInt
    checkpoint_bytes: NonNegativeInt
    """Of one checkpoint."""
    disk_bytes: NonNegativeInt
    notes: list[str] = Field(default_factory=list)


class SourcePlan(Options):
    """A candidate that exists: nothing of it is trained."""

    name: str
    source: str
    fingerprint: str
    """What identifies its weights."""
    model: SerializeAsAny[ModelConfig]
    parameters: PositiveInt
    disk_bytes: NonNegativeInt


class Plan(Options):
    """The whole job."""

    device_kind: DeviceKind = "cpu"
    candidates: list[CandidatePlan]
    """Those that are trained."""
    sources: list[SourcePlan] = Field(default_factory=list)
    variants: PositiveInt
    seconds: NonNegativeFloat
    """Of training, one candidate after the other."""
    data_bytes: NonNegativeInt = 0
    """Of the prepared text."""
    disk_bytes: NonNegativeInt
    cost: NonNegativeFloat

    def describe(self) -> list[list[str]]:
        """The plan as rows of text, the titles first: one row for each candidate."""
        titles = ["candidate", "parameters", "layout", "batch", "steps", "tokens", "FLOPs/token", "rate"]
        rows = [[*titles, "memory/device", "time", "cost"]]
        for one in self.candidates:
            rows.append(
                [
                    one.name,
                    f"{one.parameters:,}",
                    str(one.layout),
                    f"{one.training.global_batch} ({one.training.micro_batch})",
                    f"{one.steps:,}",
                    f"{one.tokens:,}",
                    f"{one.flops_per_token:.3g}",
                    f"{one.training.learning_rate:.2g}",
                    gib(one.memory_bytes),
                    f"{one.seconds:.0f} s",
                    f"{one.cost:.2f}" if one.cost else "",
                ]
            )
        return rows


def read_plan(document: dict[str, Any]) -> Plan:
    """A plan from its JSON document, every model as its family's class."""
    rows = {
        part: [row | {"model": read_model(row["model"])} for row in document.get(part, [])]
        for part in ("candidates", "sources")
    }
    return Plan.model_validate(document | rows)


def make_plan(spec: JobSpec, cluster: Cluster, vocab_size: int, text_bytes: int = 0) -> Plan:
    """The plan of a job whose tokenizer has ``vocab_size`` entries and whose text has ``text_bytes``.

    Raises :class:`launcher.problems.SpecError` with the problems of all candidates.
    """
    candidates: list[CandidatePlan] = []
    sources: list[SourcePlan] = []
    problems: list[Problem] = []
    for index, candidate in enumerate(spec.candidates):
        try:
            if candidate.source is not None:
                sources.append(plan_source(spec, candidate))
            else:
                candidates.append(plan_candidate(spec, candidate, cluster, vocab_size, text_bytes))
        except SpecError as error:
            problems += [problem.below(f"candidates.{index}") for problem in error.problems]
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    data_bytes = data_disk_bytes(spec, text_bytes)
    return Plan(
        device_kind=cluster.device_kind,
        candidates=candidates,
        sources=sources,
        variants=len(grid(spec.compression)) * len(spec.candidates),
        seconds=sum(candidate.seconds for candidate in candidates),
        data_bytes=data_bytes,
        disk_bytes=data_bytes
        + sum(candidate.disk_bytes for candidate in candidates)
        + sum(source.disk_bytes for source in sources),
        cost=sum(candidate.cost for candidate in candidates),
    )


def plan_source(spec: JobSpec, candidate: CandidateSpec) -> SourcePlan:
    """The plan of a candidate that exists. Raises :class:`launcher.problems.SpecError`."""
    assert candidate.source is not None
    try:
        facts = inspect_source(candidate.source)
    except SourceError as error:
        raise SpecError([source_problem(candidate, error)]) from error
    parameters = facts.model.parameter_count()
    return SourcePlan(
        name=candidate.name,
        source=facts.path,
        fingerprint=facts.fingerprint,
        model=facts.model,
        parameters=parameters,
        disk_bytes=_variant_bytes(spec, parameters),
    )


def plan_candidate(
    spec: JobSpec, candidate: CandidateSpec, cluster: Cluster, vocab_size: int, text_bytes: int = 0
) -> CandidatePlan:
    """The plan of one candidate; without a layout of its own, at the best one.

    Raises :class:`launcher.problems.SpecError`; fields are relative to the candidate.
    """
    length = spec.data.sequence_length
    model = candidate_model(candidate, vocab_size, length)
    budget = _training_budget(spec, model, cluster)
    tokens = _first_guess(spec, budget, model, cluster)
    choice = _choose(spec, candidate, model, tokens, cluster)
    if not budget.counts_progress and candidate.training.global_batch == "auto":
        # What a clock buys depends on the layout, and the batch on what is bought: once more, knowing the speed.
        assert isinstance(choice.training.global_batch, int)
        steps = _steps(spec, budget, choice, model, cluster)
        choice = _choose(spec, candidate, model, max(1, steps * choice.training.global_batch * length), cluster)
    return _planned(spec, candidate, model, budget, choice, cluster, text_bytes)


def candidate_model(candidate: CandidateSpec, vocab_size: int | None, sequence_length: int) -> ModelConfig:
    """The model of a candidate. Raises :class:`launcher.problems.SpecError` with fields below ``model``."""
    if candidate.source is not None:
        try:
            return inspect_source(candidate.source).model
        except SourceError as error:
            raise SpecError([source_problem(candidate, error)]) from error
    assert candidate.model is not None
    try:
        return resolve_model(candidate.model, vocab_size, sequence_length)
    except ModelError as error:
        raise SpecError([Problem(error.field, error.value, error.problem, "").below("model")]) from error
    except ValidationError as error:
        family: type[ModelConfig] = load(FAMILIES[candidate.model.get("family", "gpt")].options)
        raise SpecError([problem.below("model") for problem in of_validation(error, family)]) from error


def _choose(spec: JobSpec, candidate: CandidateSpec, model: ModelConfig, tokens: float, cluster: Cluster) -> Choice:
    """The layout that the candidate gives, or the best one."""
    case = _case(spec, candidate, model, tokens, cluster)
    if candidate.layout is None:
        choice = best_layout(case, cluster)
        if choice is None:
            raise SpecError([too_large(case, cluster, None, case.training)])
        return choice
    return _at_layout(case, candidate.layout, cluster)


def _case(spec: JobSpec, candidate: CandidateSpec, model: ModelConfig, tokens: float, cluster: Cluster) -> Case:
    """What is to be spread, with every ``auto`` settled that does not depend on the layout (micro-batch: 1)."""
    given = candidate.training
    length = spec.data.sequence_length
    free = {name for name in ("micro_batch", "global_batch", "precision") if getattr(given, name) == "auto"}
    if "recompute" not in given.model_fields_set:
        free.add("recompute")
    settled = given.model_copy(update={"micro_batch": 1}) if given.micro_batch == "auto" else given
    try:
        training = resolve_training(settled, model, candidate.layout or Layout(), length, tokens, cluster.device_kind)
    except ValidationError as error:
        raise SpecError([problem.below("training") for problem in of_validation(error, TrainingConfig)]) from error
    saves_devices = spec.training_budget.unit in ("device_hours", "cost")
    return Case(model, training, frozenset(free), length, saves_devices)


def _at_layout(case: Case, layout: Layout, cluster: Cluster) -> Choice:
    """The best micro-batch at a given layout."""
    choices, problems = [], []
    smallest: tuple[int, TrainingConfig] | None = None
    for training in trainings(case, layout):
        found = problems_of(case, layout, training, cluster)
        problems += found
        if found:
            continue
        memory = memory_per_rank(case.model, layout, training, case.sequence_length, cluster.device_kind)
        smallest = min(smallest or (memory.total, training), (memory.total, training), key=lambda pair: pair[0])
        if fits(memory, cluster):
            cost = step_cost(case.model, layout, training, case.sequence_length, cluster)
            choices.append(Choice(layout, training, cost, memory))
    if choices:
        return min(choices, key=lambda choice: choice.cost.total / _batch(choice))
    if smallest:
        raise SpecError([too_large(case, cluster, layout, smallest[1])])
    raise SpecError(
        [
            problem if problem.field.startswith(("layout", "training")) else problem.below("layout")
            for problem in dict.fromkeys(problems)
        ]
    )


def _batch(choice: Choice) -> int:
    assert isinstance(choice.training.global_batch, int)
    return choice.training.global_batch


# Budget


def needs_calibration(compression: CompressionConfig) -> bool:
    """Whether some recipe of the grid asks for statistics of the layers' inputs."""
    return any(recipe.needs_statistics for recipe in grid(compression))


def _training_budget(spec: JobSpec, model: ModelConfig, cluster: Cluster) -> Budget:
    """The budget less the reserves for calibration and recovery."""
    recover = spec.compression.recover
    fraction = recover.budget_fraction if recover else 0.0
    if not needs_calibration(spec.compression):
        return spec.training_budget.share(1.0 - fraction) if fraction else spec.training_budget
    sequences, length = spec.compression.calibration.sequences, spec.data.sequence_length
    flops = calibration_flops(model, length, sequences)
    seconds = flops / (cluster.peak_flops * EFFICIENCY[cluster.device_kind])
    reserve = {
        "flops": flops,
        "tokens": float(sequences * length),
        "wall_clock": seconds,
        "device_hours": seconds / 3600.0,
        "cost": seconds / 3600.0 * spec.execution.price_per_device_hour,
    }[spec.training_budget.unit]
    try:
        return training_share(spec.training_budget, reserve, fraction)
    except ValueError as error:
        raise SpecError([Problem("model", None, str(error), "")]) from error


def _first_guess(spec: JobSpec, budget: Budget, model: ModelConfig, cluster: Cluster) -> float:
    """Tokens that the budget buys; where it limits a clock, at the speed of large matrices on all devices."""
    per_token = train_flops_per_token(model, spec.data.sequence_length)
    if budget.unit == "tokens":
        return budget.limit
    if budget.unit == "flops":
        return budget.limit / per_token
    seconds = _clock_seconds(spec, budget, cluster.devices, cluster)
    return max(1.0, seconds * cluster.devices * cluster.peak_flops * EFFICIENCY[cluster.device_kind] / per_token)


def _clock_seconds(spec: JobSpec, budget: Budget, devices: int, cluster: Cluster) -> float:
    """Seconds of training that a budget in clock units gives ``devices`` devices; their start is paid from it."""
    if budget.unit == "wall_clock":
        seconds = budget.limit
    elif budget.unit == "device_hours":
        seconds = budget.limit * 3600.0 / devices
    else:
        seconds = budget.limit / spec.execution.price_per_device_hour * 3600.0 / devices
    return max(0.0, seconds - START_SECONDS[cluster.device_kind])


def _steps(spec: JobSpec, budget: Budget, choice: Choice, model: ModelConfig, cluster: Cluster) -> int:
    """Whole steps within the budget."""
    length = spec.data.sequence_length
    if budget.unit == "flops":
        return int(budget.limit // (_batch(choice) * train_flops_per_sequence(model, length)))
    if budget.unit == "tokens":
        return int(budget.limit // (_batch(choice) * length))
    return int(_clock_seconds(spec, budget, choice.layout.world_size, cluster) // choice.cost.total)


def _too_small(spec: JobSpec, budget: Budget, choice: Choice, model: ModelConfig, cluster: Cluster) -> SpecError:
    """A budget that does not buy one step."""
    length, batch, devices = spec.data.sequence_length, _batch(choice), choice.layout.world_size
    seconds = choice.cost.total + START_SECONDS[cluster.device_kind]
    need = {
        "flops": batch * train_flops_per_sequence(model, length),
        "tokens": float(batch * length),
        "wall_clock": seconds,
        "device_hours": seconds * devices / 3600.0,
        "cost": seconds * devices / 3600.0 * spec.execution.price_per_device_hour,
    }[budget.unit]
    what = (
        f"the budget leaves {budget.limit:g} {budget.unit} for training and one step of {batch} sequences needs"
        f" {need:.3g}"
    )
    smaller = ", a smaller training.global_batch" if batch > 1 else ""
    hint = f"raise budget.{budget.unit}, or use a smaller model{smaller} or a shorter data.sequence_length"
    return SpecError([Problem("training.global_batch", batch, what, hint)])


# What it takes


@dataclass(frozen=True)
class _Size:
    """Bytes per parameter of a checkpoint: weights, master weights where they differ, two moments."""

    weights: int
    optimizer: int

    @classmethod
    def of(cls, layout: Layout, training: TrainingConfig) -> "_Size":
        if layout.engine == "lean":
            return cls(4, 4)
        return cls(2, 12) if training.precision == "bf16" else cls(4, 8)


def _planned(
    spec: JobSpec,
    candidate: CandidateSpec,
    model: ModelConfig,
    budget: Budget,
    choice: Choice,
    cluster: Cluster,
    text_bytes: int,
) -> CandidatePlan:
    length, layout, kind = spec.data.sequence_length, choice.layout, cluster.device_kind
    steps = _steps(spec, budget, choice, model, cluster)
    if steps == 0:
        raise _too_small(spec, budget, choice, model, cluster)
    tokens = steps * _batch(choice) * length
    seconds = steps * choice.cost.total + START_SECONDS[kind]
    parameters = model.parameter_count()
    size = _Size.of(layout, choice.training)
    checkpoint_bytes = parameters * (size.weights + size.optimizer)
    policy = _checkpoint_policy(spec, choice, cluster)
    return CandidatePlan(
        name=candidate.name,
        model=model,
        parameters=parameters,
        layout=layout,
        layout_chosen=candidate.layout is None,
        training=choice.training,
        budget=budget,
        checkpoint=policy,
        flops_per_token=train_flops_per_token(model, length),
        steps=steps,
        tokens=tokens,
        flops=tokens * train_flops_per_token(model, length),
        step_seconds=choice.cost.total,
        step_parts=_parts(choice.cost),
        seconds=seconds,
        device_seconds=seconds * layout.world_size,
        cost=seconds * layout.world_size / 3600.0 * spec.execution.price_per_device_hour,
        memory=choice.memory,
        memory_bytes=choice.memory.total,
        baseline_bytes=BASELINE_BYTES[kind],
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=(policy.keep + 1) * checkpoint_bytes + _variant_bytes(spec, parameters),
        notes=_notes(spec, candidate, choice, policy, steps, tokens, text_bytes),
    )


def _parts(cost: StepCost) -> dict[str, float]:
    return {name: getattr(cost, name) for name in ("compute", "tensor", "pipeline", "data", "optimizer")}


def _checkpoint_policy(spec: JobSpec, choice: Choice, cluster: Cluster) -> CheckpointPolicy:
    """On CPUs the snapshot of an asynchronous checkpoint is memory that training then changes: all of the state."""
    policy, memory = spec.execution.checkpoint_every, choice.memory
    snapshot = memory.weights + memory.master_weights + memory.moments
    if cluster.device_kind == "cpu" and memory.total + snapshot > room_bytes(cluster):
        return policy.model_copy(update={"asynchronous": False})
    return policy


def _variant_bytes(spec: JobSpec, parameters: int) -> int:
    """Every variant: its layers, the compact file made of them, and the export in two bytes per parameter."""
    total = 0.0
    for recipe in grid(spec.compression):
        compact = (recipe.stored_bits / 8 + 0.25 if recipe.quantize else 2.0) * parameters
        total += 2 * compact + (2.0 * parameters if spec.export.variants != "none" else 0.0)
    return round(total)


def data_disk_bytes(spec: JobSpec, text_bytes: int) -> int:
    """Tokens of two bytes (four for very large vocabularies): one for each byte, or for a few of them."""
    return text_bytes * 2 if spec.data.tokenizer.kind == "bytes" else text_bytes


def _notes(
    spec: JobSpec,
    candidate: CandidateSpec,
    choice: Choice,
    policy: CheckpointPolicy,
    steps: int,
    tokens: int,
    text_bytes: int,
) -> list[str]:
    """What the owner of the job should know."""
    notes = []
    if choice.layout.engine == "lean" and candidate.layout is None:
        notes.append("no other engine fits: lean keeps bf16 moments and clips by the last step's gradient norm")
    if choice.training.recompute and not candidate.training.recompute:
        notes.append("activations are recomputed in the backward pass, to fit or to be faster")
    if spec.execution.checkpoint_every.asynchronous and not policy.asynchronous:
        notes.append("training waits for its checkpoints: a snapshot of the state would not fit beside it")
    if steps < FEWEST_STEPS:
        notes.append(f"only {steps} steps: a larger budget or a smaller training.global_batch would use it better")
    # A token of BPE is about three bytes of text or more; of the bytes tokenizer, one.
    passes = tokens * (1 if spec.data.tokenizer.kind == "bytes" else 3) / text_bytes if text_bytes else 0.0
    if passes > MANY_PASSES:
        notes.append(f"about {passes:.0f} passes over the same text: more text would teach more")
    return notes
