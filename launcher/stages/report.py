"""All variants held against each other: rows for machines, a figure and a table for people. Torch-free."""

from typing import Any

from compression.report import mark_frontier, short_number
from compression.results import Variant
from launcher.actors.pool import Task
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.stages.evaluate import measured_variants
from launcher.stages.export import exported
from launcher.stages.harness import harness_scores

STAGE = "report"


def report(job: JobContext) -> None:
    """Write the job's report and its rows."""
    variants = mark_frontier(_with_scores(job, _with_exports(job, measured_variants(job))))
    rows = [variant.row() for variant in variants]
    inputs = hash_inputs(STAGE, job.spec.name, rows)
    if job.journal.stage_done(STAGE, inputs):
        return
    with job.stage(STAGE) as clock:
        directory = str(job.journal.report_dir)
        arguments: dict[str, Any] = {"variants": variants, "directory": directory, "title": _title(job)}
        job.pool.run([Task(STAGE, "compression.report:write_report", arguments)], lambda *_: None)
        job.journal.commit_stage(STAGE, inputs, {"variants": rows, "directory": directory}, clock.seconds())


def _with_exports(job: JobContext, variants: list[Variant]) -> list[Variant]:
    exports = exported(job)
    return [
        variant.model_copy(update={"export_bytes": exports[variant.name].export_bytes})
        if variant.name in exports
        else variant
        for variant in variants
    ]


def _with_scores(job: JobContext, variants: list[Variant]) -> list[Variant]:
    scores = harness_scores(job)
    return [
        variant.model_copy(update={"metrics": variant.metrics | scores.get(variant.name, {})}) for variant in variants
    ]


def _title(job: JobContext) -> str:
    budget = job.spec.budget
    if budget is None:
        return f"{job.spec.name}: quality against size"
    unit = "FLOPs" if budget.unit == "flops" else budget.unit.replace("_", " ")
    return f"{job.spec.name}: every candidate trained for {short_number(budget.limit)} {unit}"
