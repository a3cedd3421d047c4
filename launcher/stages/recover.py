"""Finetuning of compressed variants under their own share of the budget, and what becomes of them. Torch-free.

A variant is recovered in three steps: the weights before quantisation become a checkpoint; from there it is trained
like any candidate (its zeros held, rounded weights and the dense parent's predictions as asked); then it is compressed
anew, its zeros kept. The training is charged to the variant's lineage: the candidate's budget was smaller by as much.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from compression.allocation import Allotment
from compression.config import RecoverConfig
from compression.recipe import Recipe, grid
from compression.recovery import start_point
from compression.reduced import reduced_config
from compression.results import VariantFile
from launcher.actors.gang import CandidateRun
from launcher.actors.pool import Task
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.stages.compress import allotment_of, compressed, dense_candidates, variant_files
from launcher.stages.planning import settled_plan
from launcher.stages.train import LAYOUT_ONLY, RunPlan, candidate_run
from launcher.stages.training import failures, train_candidates
from launcher.stages.work import Dense, GridWork, run_works
from parallelism import places
from parallelism.checkpoint_store import MANIFEST, read_info
from parallelism.start import check_start

STAGE = "recover"


@dataclass(frozen=True)
class Recovery:
    """One variant that is recovered."""

    dense: Dense
    recipe: Recipe
    start: VariantFile
    allotment: Allotment
    """Strengths under the recovered recipe's name, layers numbered as in the recovered model."""
    plan: RunPlan
    inputs: str
    folder: Path

    @property
    def name(self) -> str:
        """As the variant is called."""
        return f"{self.dense.candidate}/{self.recipe.name}"

    @property
    def weights(self) -> str:
        """The checkpoint that training begins with."""
        return str(self.folder / "start")

    @property
    def trained_stage(self) -> str:
        """Name of the stage that trains it."""
        return f"{STAGE}/train/{self.name}"

    @property
    def stage(self) -> str:
        """Name of the stage that is done when its file stands."""
        return f"{STAGE}/{self.name}"


def recover(job: JobContext) -> None:
    """Recover all variants that are to be recovered; what is done is not done again."""
    recoveries = [one for one in wanted(job) if not job.journal.stage_done(one.stage, one.inputs)]
    if not recoveries:
        return
    with job.stage(STAGE):
        _train(job, [one for one in recoveries if not job.journal.stage_done(one.trained_stage, one.inputs)])
        _compress(job, [one for one in recoveries if job.journal.stage_done(one.trained_stage, one.inputs)])


def recovered_files(job: JobContext, dense: Dense) -> list[VariantFile]:
    """The files of a candidate's recovered variants, in the order of the grid."""
    records = [job.journal.stage(one.stage) for one in wanted(job) if one.dense.candidate == dense.candidate]
    return [VariantFile.model_validate(record.outputs["variant"]) for record in records if record]


def wanted(job: JobContext) -> list[Recovery]:
    """Every recovery that the job asks for."""
    recipes = [recipe for recipe in grid(job.spec.compression) if recipe.recovered]
    if not recipes:
        return []
    return [_recovery(job, dense, recipe) for dense in dense_candidates(job) for recipe in recipes]


def _recovery(job: JobContext, dense: Dense, recipe: Recipe) -> Recovery:
    record, settings = compressed(job, dense), _settings(job)
    start = next(file for file in variant_files(record) if file.recipe == recipe.start)
    allotment = _renumbered(allotment_of(record), recipe)
    plan = _plan(job, dense, recipe)
    facts = (record.inputs_hash, recipe.model_dump(mode="json"), settings.model_dump(mode="json"))
    training = plan.training.model_dump(mode="json", exclude=LAYOUT_ONLY)
    inputs = hash_inputs(STAGE, *facts, training, plan.budget.model_dump(mode="json"))
    folder = job.journal.candidate_dir(dense.candidate) / "recovered" / recipe.name
    return Recovery(dense, recipe, start, allotment, plan, inputs, folder)


def _settings(job: JobContext) -> RecoverConfig:
    settings = job.spec.compression.recover
    assert settings is not None, "recovered recipes come from compression.recover"
    return settings


def _renumbered(allotment: Allotment, recipe: Recipe) -> Allotment:
    """The strengths of the recipe before recovery, for the recovered one in the model that is left."""
    before = recipe.model_copy(update={"recovered": False, "quantization_aware": False}).name
    removed = allotment.removed.get(before, ())
    strengths = {}
    for matrix, strength in allotment.allocations.get(before, {}).items():
        prefix, layer, name = matrix.split(".", 2)
        if int(layer) not in removed:
            strengths[f"{prefix}.{int(layer) - sum(gone < int(layer) for gone in removed)}.{name}"] = strength
    return Allotment(allocations={recipe.name: strengths} if strengths else {})


def _plan(job: JobContext, dense: Dense, recipe: Recipe) -> RunPlan:
    """As it was planned before the job began."""
    lineage = next(one for one in settled_plan(job).lineages if one.name == dense.candidate)
    planned = next(one for one in lineage.recoveries if one.recipe == recipe.name)
    return RunPlan.of(planned, f"{dense.candidate}/{recipe.name}", reduced_config(dense.model, recipe.structure))


def _train(job: JobContext, recoveries: list[Recovery]) -> None:
    """Train all, side by side where the cluster has room. One that fails is left out, and the job says so."""
    if not recoveries:
        return
    starts = [_to_checkpoint(one, one.start.path, one.weights) for one in recoveries]
    job.pool.run([*starts, *_teachers(job, recoveries)], lambda *_: None)
    job.pool.close()
    by_name = {one.name: one for one in recoveries}
    runs = [candidate_run(job, _with_start(job, one)) for one in recoveries]

    def trained(run: CandidateRun) -> None:
        assert run.result is not None
        one, seconds = by_name[run.name], job.journal.view().candidate(run.name).wall_seconds
        job.journal.commit_stage(one.trained_stage, one.inputs, run.result.model_dump(mode="json"), seconds)

    train_candidates(job, runs, trained)
    job.failures.update(failures(runs))


def _with_start(job: JobContext, one: Recovery) -> RunPlan:
    settings = _settings(job)
    teacher = _teacher(one) if settings.distill else None
    strengths = one.allotment.allocations.get(one.recipe.name)
    start = start_point(one.recipe, one.weights, settings, teacher=teacher, strengths=strengths)
    check_start(start, one.plan.model, one.plan.layout)
    return replace(one.plan, start=start)


def _teachers(job: JobContext, recoveries: list[Recovery]) -> list[Task]:
    """Dense parents that are no checkpoints yet."""
    if not _settings(job).distill:
        return []
    given = {one.dense.candidate: one for one in recoveries if _teacher(one) != one.dense.source}
    return [_to_checkpoint(one, one.dense.source, _teacher(one)) for one in given.values()]


def _teacher(one: Recovery) -> str:
    """The dense parent as a checkpoint."""
    if places.exists(Path(one.dense.source) / MANIFEST):
        return one.dense.source
    return str(one.folder.parent / "teacher")


def _to_checkpoint(one: Recovery, source: str, directory: str) -> Task:
    arguments = {"source": source, "directory": directory}
    return Task(
        f"{one.stage}/{Path(directory).name}", "compression.tasks:to_checkpoint", arguments, one.dense.candidate
    )


def _compress(job: JobContext, recoveries: list[Recovery]) -> None:
    """Compress what was trained, all side by side."""
    started = time.monotonic()
    works = [_work(job, one) for one in recoveries]
    run_works(job, works)
    for one, work in zip(recoveries, works, strict=True):
        (variant,) = work.variants()
        seconds = (time.monotonic() - started) / len(works)
        job.journal.commit_stage(one.stage, one.inputs, {"variant": variant.model_dump(mode="json")}, seconds)


def _work(job: JobContext, one: Recovery) -> GridWork:
    record = job.journal.stage(one.trained_stage)
    assert record is not None
    checkpoint = record.outputs["checkpoint"]
    recovered = Dense(one.dense.candidate, checkpoint, read_info(checkpoint).model, one.inputs)
    return GridWork(job, one.stage, recovered, [one.recipe], str(one.folder), one.allotment)
