"""Every variant on the same held-out text, all variants of a candidate in one pass over its layers. Torch-free."""

import time

from compression.results import Quality, Variant, VariantFile
from launcher.actors.pool import Task
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.stages.compress import compressed, dense_candidates, variant_files
from launcher.stages.recover import recovered_files
from launcher.stages.work import Dense

STAGE = "evaluate"


def evaluate(job: JobContext) -> None:
    """Measure all variants that have not been measured."""
    inputs = {candidate.candidate: _inputs(job, candidate) for candidate in dense_candidates(job)}
    open_names = [name for name, value in inputs.items() if not job.journal.stage_done(f"{STAGE}/{name}", value)]
    if not open_names:
        return
    with job.stage(STAGE):
        started = time.monotonic()

        def done(task: Task, qualities: list[Quality]) -> None:
            name = task.candidate or ""
            variants = _measured(job, name, qualities)
            for variant in variants:
                job.journal.append("variant", variant.row())
            outputs = {
                "variants": [variant.row() for variant in variants],
                "qualities": [quality.model_dump(mode="json") for quality in qualities],
            }
            job.journal.commit_stage(f"{STAGE}/{name}", inputs[name], outputs, time.monotonic() - started)

        job.pool.run(
            [_task(job, candidate) for candidate in dense_candidates(job) if candidate.candidate in open_names], done
        )


def measured_variants(job: JobContext) -> list[Variant]:
    """All variants of all candidates."""
    records = [job.journal.stage(f"{STAGE}/{candidate.candidate}") for candidate in dense_candidates(job)]
    return [Variant.model_validate(row) for record in records if record for row in record.outputs["variants"]]


def measured_qualities(job: JobContext, candidate: str) -> dict[str, Quality]:
    """Variant file's name (the recipe's) → what was measured, of one candidate."""
    record = job.journal.stage(f"{STAGE}/{candidate}")
    rows = [Quality.model_validate(row) for row in record.outputs["qualities"]] if record else []
    return {quality.name: quality for quality in rows}


def text_arguments(job: JobContext) -> dict[str, object]:
    """The held-out text that everything is measured on."""
    return {
        "data_dir": str(job.journal.data_dir),
        "sequence_length": job.spec.data.sequence_length,
        "tokens": job.spec.evaluation.tokens,
        "seed": job.spec.seed,
    }


def _inputs(job: JobContext, candidate: Dense) -> str:
    recovered = [file.model_dump(mode="json") for file in recovered_files(job, candidate)]
    evaluation = job.spec.evaluation.model_dump(mode="json")
    return hash_inputs(STAGE, compressed(job, candidate).inputs_hash, recovered, evaluation)


def _files(job: JobContext, candidate: Dense) -> list[VariantFile]:
    return [*variant_files(compressed(job, candidate)), *recovered_files(job, candidate)]


def _task(job: JobContext, candidate: Dense) -> Task:
    paths = [file.path for file in _files(job, candidate)]
    arguments = {"variants": paths, **text_arguments(job)}
    return Task(f"{STAGE}/{candidate.candidate}", "compression.tasks:evaluate", arguments, candidate.candidate)


def _measured(job: JobContext, name: str, qualities: list[Quality]) -> list[Variant]:
    candidate = next(candidate for candidate in dense_candidates(job) if candidate.candidate == name)
    files = _files(job, candidate)
    return [Variant.measured(name, file, quality) for file, quality in zip(files, qualities, strict=True)]
