"""All variants held against each other: rows for machines, a figure and a table for people. Torch-free."""

from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.stages.evaluate import measured_variants
from launcher.stages.export import exported, with_frontier

STAGE = "report"


def report(job: JobContext) -> None:
    """Write the job's report and its rows."""
    exports = exported(job)
    variants = [
        variant.model_copy(update={"export_bytes": exports[variant.name].export_bytes})
        if variant.name in exports
        else variant
        for variant in with_frontier(measured_variants(job))
    ]
    rows = [variant.row() for variant in variants]
    inputs = hash_inputs(STAGE, rows)
    if job.journal.stage_done(STAGE, inputs):
        return
    with job.stage(STAGE) as clock:
        outputs = {"variants": rows, "directory": str(job.journal.report_dir)}
        job.journal.commit_stage(STAGE, inputs, outputs, clock.seconds())
