"""lm-evaluation-harness on the exports, where a job asks for it: tasks are checked first, models last. Torch-free."""

from compression.harness import HarnessConfig
from compression.results import ExportResult
from launcher.actors.pool import Task
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.stages.export import exported

CHECK, STAGE = "harness-check", "harness"


def check_harness(job: JobContext) -> None:
    """Read the tasks and their data, so that a task that is not there is told before anything is trained."""
    config = job.spec.evaluation.harness
    inputs = hash_inputs(CHECK, config.model_dump(mode="json") if config else None)
    if config is None or job.journal.stage_done(CHECK, inputs):
        return
    found: list[str] = []
    with job.stage(CHECK) as clock:
        task = Task(CHECK, "compression.harness:check_tasks", {"config": config})
        job.pool.run([task], lambda _, names: found.extend(names))
        job.journal.commit_stage(CHECK, inputs, {"tasks": found}, clock.seconds())


def score_exports(job: JobContext) -> None:
    """Score every export; what has been scored is not scored again."""
    config, exports = job.spec.evaluation.harness, exported(job)
    if config is None or not exports:
        return
    checksums = {name: export.checksums for name, export in exports.items()}
    inputs = hash_inputs(STAGE, config.model_dump(mode="json"), checksums)
    if job.journal.stage_done(STAGE, inputs):
        return
    scores: dict[str, dict[str, float]] = {}
    with job.stage(STAGE) as clock:
        candidates = dict.fromkeys(_candidate(name) for name in exports)
        tasks = [
            _task(one, {name: export for name, export in exports.items() if _candidate(name) == one}, config)
            for one in candidates
        ]
        job.pool.run(tasks, lambda _, found: scores.update(found))
        job.journal.commit_stage(STAGE, inputs, {"scores": scores}, clock.seconds())


def harness_scores(job: JobContext) -> dict[str, dict[str, float]]:
    """Variant's name → metric's name → value."""
    record = job.journal.stage(STAGE)
    return dict(record.outputs["scores"]) if record else {}


def _candidate(variant: str) -> str:
    return variant.partition("/")[0]


def _task(candidate: str, exports: dict[str, ExportResult], config: HarnessConfig) -> Task:
    arguments = {"directories": {name: export.directory for name, export in exports.items()}, "config": config}
    return Task(f"{STAGE}/{candidate}", "compression.harness:score", arguments, candidate)
