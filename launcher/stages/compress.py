"""Every recipe on every trained candidate, one task per layer, and the variants' files put together. Torch-free."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compression.recipe import Recipe, grid
from compression.results import LayerResult, VariantFile
from launcher.context import JobContext
from launcher.journal import StageRecord, hash_inputs
from launcher.pool import Task
from parallelism.checkpoint_store import read_info

STAGE = "compress"


@dataclass(frozen=True)
class Trained:
    """A candidate that has a trained checkpoint."""

    name: str
    checkpoint: str
    inputs: str

    @property
    def stage(self) -> str:
        """Name of the candidate's own stage."""
        return f"{STAGE}/{self.name}"


def trained_candidates(job: JobContext) -> list[Trained]:
    """The candidates whose training is done, in the order of the spec."""
    found = []
    for spec in job.spec.candidates:
        record = job.journal.stage(f"train/{spec.name}")
        if record and spec.name not in job.failures:
            found.append(Trained(spec.name, record.outputs["checkpoint"], record.inputs_hash))
    return found


def compress(job: JobContext) -> None:
    """Compress all layers of all candidates side by side; a layer that is committed is not made again."""
    recipes = grid(job.spec.compression)
    open_candidates = [
        candidate
        for candidate in trained_candidates(job)
        if not job.journal.stage_done(candidate.stage, _inputs(candidate, recipes))
    ]
    if not open_candidates:
        return
    with job.stage(STAGE):
        started = time.monotonic()
        layers = [task for candidate in open_candidates for task in _layer_tasks(job, candidate, recipes)]
        job.pool.run(layers, lambda task, result: _layer_done(job, task, result))
        files: dict[str, list[VariantFile]] = {candidate.name: [] for candidate in open_candidates}
        assembly = [task for candidate in open_candidates for task in _assembly_tasks(job, candidate, recipes)]
        job.pool.run(assembly, lambda task, file: files[task.candidate or ""].append(file))
        for candidate in open_candidates:
            order = {recipe.name: index for index, recipe in enumerate(recipes)}
            rows = sorted(files[candidate.name], key=lambda file: order[file.name])
            outputs = {"variants": [file.model_dump(mode="json") for file in rows]}
            seconds = (time.monotonic() - started) / len(open_candidates)
            job.journal.commit_stage(candidate.stage, _inputs(candidate, recipes), outputs, seconds)


def compressed(job: JobContext, candidate: Trained) -> StageRecord:
    """The record of a candidate's compression. An assertion: the stage runs before whoever asks."""
    record = job.journal.stage(candidate.stage)
    assert record is not None
    return record


def variant_files(record: StageRecord) -> list[VariantFile]:
    """The variants' files of one candidate, the dense one first."""
    return [VariantFile.model_validate(row) for row in record.outputs["variants"]]


def _inputs(candidate: Trained, recipes: list[Recipe]) -> str:
    return hash_inputs(
        STAGE, candidate.inputs, candidate.checkpoint, [recipe.model_dump(mode="json") for recipe in recipes]
    )


def _layer_tasks(job: JobContext, candidate: Trained, recipes: list[Recipe]) -> Iterator[Task]:
    common: dict[str, Any] = {
        "source": candidate.checkpoint,
        "recipes": recipes,
        "out": str(job.journal.candidate_dir(candidate.name)),
    }
    yield Task(f"{candidate.stage}/outer", "compression.tasks:compress_outer", common, candidate.name)
    for layer in range(read_info(candidate.checkpoint).model.layers):
        arguments = common | {"layer": layer}
        yield Task(f"{candidate.stage}/{layer}", "compression.tasks:compress_layer", arguments, candidate.name)


def _layer_done(job: JobContext, task: Task, result: LayerResult) -> None:
    fields = {"task": task.name, "layer": result.layer, "seconds": result.seconds, "recipes": len(result.parts)}
    job.journal.append("layer_compressed", {"candidate": task.candidate, **fields})


def _assembly_tasks(job: JobContext, candidate: Trained, recipes: list[Recipe]) -> Iterator[Task]:
    for recipe in recipes:
        arguments = {
            "source": candidate.checkpoint,
            "recipe": recipe,
            "out": str(job.journal.candidate_dir(candidate.name)),
        }
        yield Task(f"{candidate.stage}/{recipe.name}", "compression.tasks:assemble", arguments, candidate.name)
