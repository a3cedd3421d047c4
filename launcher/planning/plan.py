"""What a job will do and take, said before it starts. Torch-free.

The layout, where a candidate gives none, is the best of all legal ones that fit (:mod:`launcher.planning.layouts`)
under the cost model of :mod:`launcher.planning.costs`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, SerializeAsAny, ValidationError

from compression.config import CompressionConfig
from compression.recipe import grid
from launcher.planning.choices import batch_of, choose
from launcher.planning.cluster import Cluster
from launcher.planning.costs import EFFICIENCY
from launcher.planning.disk import CalibrationDisk, calibration_disk, data_bytes, start_bytes, variant_bytes
from launcher.planning.layouts import Case, Choice
from launcher.planning.planned import PlannedRun, TooSmall, first_guess, planned_run, whole_steps
from launcher.planning.recoveries import RecoveryPlan, plan_recoveries
from launcher.planning.sources import SourceError, inspect_source, source_problem
from launcher.problems import Problem, SpecError, of_validation
from launcher.spec import CandidateSpec, JobSpec
from parallelism.accounting import calibration_flops, train_flops_per_token, training_share
from parallelism.budget import Budget
from parallelism.checkpoint_store import read_model
from parallelism.layout import Layout
from parallelism.memory import BASELINE_BYTES
from parallelism.models.base import ModelConfig
from parallelism.options import Options
from parallelism.presets import ModelError, resolve_model
from parallelism.registry import FAMILIES, load
from parallelism.rules import FEWEST_STEPS, DeviceKind, resolve_training
from parallelism.training import TrainingConfig

DOCUMENT = "plan"
"""The journal's document that holds a job's plan."""
LAYOUTS = "layouts"
"""The document with the layouts that the job's owner asked for after it was submitted: candidate → layout."""
MANY_PASSES = 4.0
"""More passes than this over the same text bring less and less (Muennighoff et al. 2023)."""


class Lineage(Options):
    """A dense model and what becomes of it."""

    name: str
    model: SerializeAsAny[ModelConfig]
    parameters: PositiveInt
    calibration: CalibrationDisk = CalibrationDisk()
    recoveries: list[RecoveryPlan] = Field(default_factory=list)
    disk_bytes: NonNegativeInt
    """Of everything that is written for it: calibration and recoveries, too."""


class CandidatePlan(PlannedRun, Lineage):
    """One candidate: the model, where it runs, and what its budget buys.

    The budget is what is left for training: the reserves for calibration and recovery are taken off.
    """

    layout_chosen: bool
    """Whether the planner chose the layout."""
    baseline_bytes: NonNegativeInt
    notes: list[str] = Field(default_factory=list)


class SourcePlan(Lineage):
    """A candidate that exists: nothing of it is trained but what is recovered."""

    source: str
    fingerprint: str
    """What identifies its weights."""


class Plan(Options):
    """The whole job."""

    device_kind: DeviceKind = "cpu"
    candidates: list[CandidatePlan]
    """Those that are trained."""
    sources: list[SourcePlan] = Field(default_factory=list)
    variants: PositiveInt
    seconds: NonNegativeFloat
    """Of training and recovery, one after the other."""
    data_bytes: NonNegativeInt = 0
    """Of the prepared text."""
    calibration_bytes: NonNegativeInt = 0
    """The part of :attr:`disk_bytes` that calibration holds for a while, at most."""
    disk_bytes: NonNegativeInt
    cost: NonNegativeFloat

    @property
    def lineages(self) -> list[Lineage]:
        """Of all candidates, those first that are trained."""
        return [*self.candidates, *self.sources]


def read_plan(document: dict[str, Any]) -> Plan:
    """A plan from its JSON document, every model as its family's class."""
    rows = {
        part: [row | {"model": read_model(row["model"])} for row in document.get(part, [])]
        for part in ("candidates", "sources")
    }
    return Plan.model_validate(document | rows)


def with_layouts(spec: JobSpec, layouts: Mapping[str, Layout]) -> JobSpec:
    """The spec with other layouts for the candidates that are named."""
    candidates = [
        candidate.model_copy(update={"layout": layouts.get(candidate.name, candidate.layout)})
        for candidate in spec.candidates
    ]
    return spec.model_copy(update={"candidates": candidates})


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
                sources.append(plan_source(spec, candidate, cluster))
            else:
                candidates.append(plan_candidate(spec, candidate, cluster, vocab_size, text_bytes))
        except SpecError as error:
            problems += [_placed(problem, index) for problem in error.problems]
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    lineages: list[Lineage] = [*candidates, *sources]
    runs: list[PlannedRun] = [*candidates, *(one for each in lineages for one in each.recoveries)]
    text = data_bytes(spec, text_bytes)
    return Plan(
        device_kind=cluster.device_kind,
        candidates=candidates,
        sources=sources,
        variants=len(grid(spec.compression)) * len(spec.candidates),
        seconds=sum(run.seconds for run in runs),
        data_bytes=text,
        calibration_bytes=sum(one.calibration.bytes for one in lineages),
        disk_bytes=text + sum(one.disk_bytes for one in lineages),
        cost=sum(run.cost for run in runs),
    )


def _placed(problem: Problem, index: int) -> Problem:
    """A problem of candidate ``index``; its field is relative to the candidate, or one of the whole job."""
    return problem if problem.field.startswith("compression.") else problem.below(f"candidates.{index}")


def plan_source(spec: JobSpec, candidate: CandidateSpec, cluster: Cluster) -> SourcePlan:
    """The plan of a candidate that exists. Raises :class:`launcher.problems.SpecError`."""
    assert candidate.source is not None
    try:
        facts = inspect_source(candidate.source)
    except SourceError as error:
        raise SpecError([source_problem(candidate, error)]) from error
    model = facts.model
    recoveries = plan_recoveries(spec, candidate, model, candidate.layout, candidate.training, cluster)
    calibration = calibration_disk(spec, model, cluster.devices)
    distills = bool(recoveries) and spec.compression.recover is not None and spec.compression.recover.distill
    return SourcePlan(
        name=candidate.name,
        source=facts.path,
        fingerprint=facts.fingerprint,
        model=model,
        parameters=model.parameter_count(),
        calibration=calibration,
        recoveries=recoveries,
        disk_bytes=variant_bytes(spec, model.parameter_count())
        + calibration.bytes
        + sum(recovery.disk_bytes for recovery in recoveries)
        + (start_bytes(model) if distills else 0),
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
    tokens = first_guess(spec, budget, train_flops_per_token(model, length), cluster)
    case = _case(spec, candidate, model, tokens, cluster)
    choice = choose(case, candidate.layout, cluster)
    if not budget.counts_progress and candidate.training.global_batch == "auto":
        # What a clock buys depends on the layout, and the batch on what is bought: once more, knowing the speed.
        steps = whole_steps(spec, case, budget, choice, cluster)
        case = _case(spec, candidate, model, max(1, steps * batch_of(choice) * length), cluster)
        choice = choose(case, candidate.layout, cluster)
    return _planned(spec, candidate, case, budget, choice, cluster, text_bytes)


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


# What it takes


def _planned(
    spec: JobSpec,
    candidate: CandidateSpec,
    case: Case,
    budget: Budget,
    choice: Choice,
    cluster: Cluster,
    text_bytes: int,
) -> CandidatePlan:
    model = case.model
    try:
        run = planned_run(spec, case, budget, choice, cluster)
    except TooSmall as error:
        raise SpecError([_too_small(budget, batch_of(choice), error)]) from error
    calibration = calibration_disk(spec, model, cluster.devices)
    recoveries = plan_recoveries(spec, candidate, model, choice.layout, choice.training, cluster)
    return CandidatePlan(
        name=candidate.name,
        model=model,
        parameters=model.parameter_count(),
        layout_chosen=candidate.layout is None,
        baseline_bytes=BASELINE_BYTES[cluster.device_kind],
        calibration=calibration,
        recoveries=recoveries,
        disk_bytes=(run.checkpoint.keep + 1) * run.checkpoint_bytes
        + variant_bytes(spec, model.parameter_count())
        + calibration.bytes
        + sum(recovery.disk_bytes for recovery in recoveries),
        notes=_notes(spec, candidate, run, text_bytes),
        **{name: getattr(run, name) for name in PlannedRun.model_fields},
    )


def _too_small(budget: Budget, batch: int, error: TooSmall) -> Problem:
    smaller = ", a smaller training.global_batch" if batch > 1 else ""
    hint = f"raise budget.{budget.unit}, or use a smaller model{smaller} or a shorter data.sequence_length"
    return Problem("training.global_batch", batch, str(error), hint)


def _notes(spec: JobSpec, candidate: CandidateSpec, run: PlannedRun, text_bytes: int) -> list[str]:
    """What the owner of the job should know."""
    notes = []
    if run.layout.engine == "lean" and candidate.layout is None:
        notes.append("no other engine fits: lean keeps bf16 moments and clips by the last step's gradient norm")
    if run.training.recompute and not candidate.training.recompute:
        notes.append("activations are recomputed in the backward pass, to fit or to be faster")
    if spec.execution.checkpoint_every.asynchronous and not run.checkpoint.asynchronous:
        notes.append("training waits for its checkpoints: a snapshot of the state would not fit beside it")
    if run.steps < FEWEST_STEPS:
        notes.append(f"only {run.steps} steps: a larger budget or a smaller training.global_batch would use it better")
    # A token of BPE is about three bytes of text or more; of the bytes tokenizer, one.
    read = run.tokens * (1 if spec.data.tokenizer.kind == "bytes" else 3)
    passes = read / text_bytes if text_bytes else 0.0
    if passes > MANY_PASSES:
        notes.append(f"about {passes:.0f} passes over the same text: more text would teach more")
    return notes
