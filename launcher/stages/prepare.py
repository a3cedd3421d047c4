"""Text into tokens, once for all candidates. Torch-free."""

from typing import Any

from launcher.actors.pool import Task
from launcher.context import JobContext
from launcher.journal import hash_inputs
from parallelism import places
from parallelism.data.config import DataConfig
from parallelism.data.prepared import PreparedData

STAGE = "prepare"


def prepare(job: JobContext) -> None:
    """Prepare the job's data; a worker does it, because it may take memory and minutes."""
    inputs = hash_inputs(STAGE, job.spec.data.model_dump(mode="json"), job.spec.seed)
    if job.journal.stage_done(STAGE, inputs):
        return
    facts_found: list[dict[str, Any]] = []
    with job.stage(STAGE) as clock:
        arguments = {"config": job.spec.data, "directory": str(job.journal.data_dir), "seed": job.spec.seed}
        task = Task(STAGE, "launcher.stages.prepare:prepare_data", arguments)
        job.pool.run([task], lambda _, facts: facts_found.append(facts))
        job.journal.commit_stage(STAGE, inputs, facts_found[0], clock.seconds())


def prepare_data(config: DataConfig, directory: str, seed: int) -> dict[str, Any]:
    """The task that a worker runs."""
    from parallelism.data.prepare import prepare as prepare_files

    prepared = prepare_files(config, places.need(directory), seed)
    places.share(prepared.directory)
    return facts_of(prepared)


def facts_of(prepared: PreparedData) -> dict[str, Any]:
    """What people and later stages want to know of prepared data; JSON-able."""
    return {
        "directory": str(prepared.directory),
        "vocab_size": prepared.vocab_size,
        "request": prepared.request,
        "corpus": prepared.corpus,
        "splits": {name: facts.model_dump(mode="json") for name, facts in prepared.splits.items()},
        "bytes_per_token": prepared.bytes_per_token,
        "input_bytes": prepared.input_bytes,
    }
