"""The variants worth keeping in a format that other software loads, each loaded again and measured. Torch-free."""

from collections.abc import Iterable
from pathlib import Path

from compression.report import mark_frontier
from compression.results import ExportResult, Variant, Verification
from launcher.actors.pool import Task
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.stages.evaluate import measured_qualities, measured_variants, text_arguments

EXPORT, VERIFY = "export", "verify"


def export(job: JobContext) -> None:
    """Write the chosen variants; an export that stands is not written again."""
    chosen = _chosen(job)
    inputs = _inputs(job, EXPORT, chosen)
    if job.journal.stage_done(EXPORT, inputs):
        return
    results: dict[str, ExportResult] = {}
    with job.stage(EXPORT) as clock:
        tasks = [_export_task(job, variant) for variant in chosen]
        job.pool.run(tasks, lambda task, result: results.update({task.name: result}))
        outputs = {task.name: results[task.name].model_dump(mode="json") for task in tasks}
        job.journal.commit_stage(EXPORT, inputs, {"exports": outputs}, clock.seconds())


def verify(job: JobContext) -> None:
    """Load every export in a fresh process and hold it against what was measured."""
    chosen, exports = _chosen(job), exported(job)
    inputs = _inputs(job, VERIFY, chosen)
    if job.journal.stage_done(VERIFY, inputs):
        return
    found: list[Verification] = []
    with job.stage(VERIFY) as clock:
        names = sorted({variant.candidate for variant in chosen})
        tasks = [_verify_task(job, name, [one for one in chosen if one.candidate == name], exports) for name in names]
        job.pool.run(tasks, lambda _, verifications: found.extend(verifications))
        outputs = {"verifications": [one.model_dump(mode="json") for one in found]}
        job.journal.commit_stage(VERIFY, inputs, outputs, clock.seconds())


def exported(job: JobContext) -> dict[str, ExportResult]:
    """Variant's name → its export."""
    record = job.journal.stage(EXPORT)
    return {name: ExportResult.model_validate(row) for name, row in record.outputs["exports"].items()} if record else {}


def _chosen(job: JobContext) -> list[Variant]:
    which = job.spec.export.variants
    variants = mark_frontier(measured_variants(job))
    if which == "none":
        return []
    return variants if which == "all" else [variant for variant in variants if variant.on_frontier]


def _inputs(job: JobContext, stage: str, chosen: Iterable[Variant]) -> str:
    return hash_inputs(stage, job.spec.export.model_dump(mode="json"), [variant.row() for variant in chosen])


def _export_task(job: JobContext, variant: Variant) -> Task:
    arguments = {
        "variant": variant.path,
        "directory": str(_directory(job, variant)),
        "data_dir": str(job.journal.data_dir),
        "format": job.spec.export.format,
        "quality": measured_qualities(job, variant.candidate)[variant.recipe.name],
        "lineage": {"job": job.journal.job_id, "candidate": variant.candidate},
    }
    return Task(variant.name, "compression.export:export", arguments, variant.candidate)


def _directory(job: JobContext, variant: Variant) -> Path:
    return job.journal.exports_dir / variant.candidate / variant.recipe.name


def _verify_task(job: JobContext, candidate: str, variants: list[Variant], exports: dict[str, ExportResult]) -> Task:
    measured = measured_qualities(job, candidate)
    arguments = {
        "exports": [exports[variant.name] for variant in variants],
        "qualities": [measured[variant.recipe.name] for variant in variants],
        **text_arguments(job),
    }
    return Task(f"{VERIFY}/{candidate}", "compression.verification:verify", arguments, candidate)
