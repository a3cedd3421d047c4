"""The candidates' training: what each process group has to do, and when a candidate counts as trained. Torch-free."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.actors.gang import CandidateRun
from launcher.actors.workers import GroupShape
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.planning.plan import CandidatePlan
from launcher.planning.planned import PlannedRun
from launcher.stages.planning import candidate_plans
from launcher.stages.prepare import STAGE as PREPARE
from launcher.stages.training import failures, train_candidates
from parallelism.budget import Budget, Burnt
from parallelism.checkpoint_store import CheckpointInfo
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.start import StartPoint
from parallelism.training import CheckpointPolicy, TrainingConfig, TrainTask

STAGE = "train"
LAYOUT_ONLY = {"micro_batch", "recompute", "distributed_optimizer"}
"""Of a training, what goes with its layout: a model that is trained is trained, whatever it was spread over."""


def train(job: JobContext) -> None:
    """Train all candidates that are not trained. Raises ``ValueError`` when not a single one could be."""
    plans = candidate_plans(job)
    inputs = {plan.name: _inputs(job, plan) for plan in plans}
    runs = [
        candidate_run(job, RunPlan.of(plan, plan.name, plan.model))
        for plan in plans
        if not job.journal.stage_done(_stage(plan.name), inputs[plan.name])
    ]

    def trained(run: CandidateRun) -> None:
        assert run.result is not None
        seconds = job.journal.view().candidate(run.name).wall_seconds
        job.journal.commit_stage(_stage(run.name), inputs[run.name], run.result.model_dump(mode="json"), seconds)

    if not runs:
        return
    job.pool.close()
    with job.stage(STAGE):
        train_candidates(job, runs, trained)
    job.failures.update(failures(runs))
    if len(job.failures) == len(job.spec.candidates):
        raise ValueError("no candidate could be trained: " + "; ".join(job.failures.values()))


def _stage(name: str) -> str:
    return f"{STAGE}/{name}"


def _inputs(job: JobContext, plan: CandidatePlan) -> str:
    prepared = job.journal.stage(PREPARE)
    assert prepared is not None
    return hash_inputs(
        STAGE,
        prepared.inputs_hash,
        plan.model.model_dump(mode="json"),
        plan.training.model_dump(mode="json", exclude=LAYOUT_ONLY),
        plan.budget.model_dump(mode="json"),
        job.spec.data.sequence_length,
        job.spec.seed,
    )


@dataclass(frozen=True)
class RunPlan:
    """What is trained, how, and for how much; ``start``: with which weights, instead of random ones."""

    name: str
    model: ModelConfig
    layout: Layout
    training: TrainingConfig
    budget: Budget
    checkpoint: CheckpointPolicy
    start: StartPoint | None = None

    @classmethod
    def of(cls, plan: PlannedRun, name: str, model: ModelConfig) -> "RunPlan":
        """The plan of a candidate, or of a recovery."""
        return cls(name, model, plan.layout, plan.training, plan.budget, plan.checkpoint)


def candidate_run(job: JobContext, plan: RunPlan) -> CandidateRun:
    """The process groups that carry out a plan, one after another."""
    execution = job.spec.execution
    return CandidateRun(
        job.journal,
        plan.name,
        GroupShape(plan.layout.world_size, plan.layout.tensor, job.room.threads, job.room.gpus, execution.environment),
        partial(training_task, job, plan),
        max_restarts=execution.max_restarts,
        stall_seconds=execution.stall_seconds,
        function=job.rank_function,
    )


def training_task(
    job: JobContext, plan: RunPlan, root: Path, resumed: CheckpointInfo | None, burnt: Burnt
) -> TrainTask:
    """What one process group does: go on from ``resumed``, writing checkpoints under ``root``."""
    spec = job.spec
    return TrainTask(
        name=plan.name,
        seed=spec.seed,
        model=plan.model,
        layout=plan.layout,
        training=plan.training,
        budget=plan.budget,
        data_dir=str(job.journal.data_dir),
        sequence_length=spec.data.sequence_length,
        checkpoint_dir=str(root),
        checkpoint=plan.checkpoint,
        resume_from=str(resumed.path) if resumed else None,
        epoch=job.journal.epoch,
        burnt_device_seconds=burnt.device_seconds,
        burnt_wall_seconds=burnt.wall_seconds,
        price_per_device_hour=spec.execution.price_per_device_hour,
        evaluation_tokens=spec.evaluation.tokens,
        start=plan.start,
        threads_per_rank=job.room.threads,
        stall_seconds=spec.execution.stall_seconds,
    )
