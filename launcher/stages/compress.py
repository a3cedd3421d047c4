"""Every recipe on every candidate's dense model: calibration, one task per layer, and the variants' files put together.

A candidate's work is a graph of tasks. Shards of text go through the layers one after the other; a layer whose shards
are through is compressed at once by all recipes, and its statistics are deleted, so that the disk holds those of a few
layers only. Where a recipe's strength follows from a look at all layers, the layers are measured first, and the
statistics stay until the end. With ``statistics: sequential``, recipes that need statistics are chains of their own.
Torch-free.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from compression.recipe import Recipe, grid
from compression.results import LayerResult, VariantFile
from compression.text import CalibrationText, shards
from compression.workspace import Workspace
from launcher.context import JobContext
from launcher.journal import StageRecord, hash_inputs
from launcher.pool import Task
from launcher.stages.planning import settled_plan
from launcher.stages.prepare import STAGE as PREPARE
from parallelism.checkpoint_store import read_info
from parallelism.models.base import ModelConfig

STAGE = "compress"


@dataclass(frozen=True)
class Dense:
    """A candidate's dense model: a trained checkpoint, or what the job starts from."""

    name: str
    source: str
    model: ModelConfig
    inputs: str
    """Hash of what the model depends on."""

    @property
    def stage(self) -> str:
        """Name of the candidate's own stage."""
        return f"{STAGE}/{self.name}"


def dense_candidates(job: JobContext) -> list[Dense]:
    """The candidates whose dense model is there, in the order of the spec."""
    given = {source.name: source for source in settled_plan(job).sources}
    found = []
    for spec in job.spec.candidates:
        record = job.journal.stage(f"train/{spec.name}")
        if spec.name in given:
            source = given[spec.name]
            found.append(Dense(spec.name, source.source, source.model, _given_inputs(job, source.fingerprint)))
        elif record and spec.name not in job.failures:
            checkpoint = record.outputs["checkpoint"]
            found.append(Dense(spec.name, checkpoint, read_info(checkpoint).model, record.inputs_hash))
    return found


def _given_inputs(job: JobContext, fingerprint: str) -> str:
    """The text matters as well: it is what the model is calibrated and measured on."""
    prepared = job.journal.stage(PREPARE)
    assert prepared is not None
    return hash_inputs("source", fingerprint, prepared.inputs_hash)


def compress(job: JobContext) -> None:
    """Compress all layers of all candidates side by side; a layer that is committed is not made again."""
    recipes = grid(job.spec.compression)
    works = [
        CandidateWork(job, candidate, recipes)
        for candidate in dense_candidates(job)
        if not job.journal.stage_done(candidate.stage, _inputs(job, candidate, recipes))
    ]
    if not works:
        return
    by_name = {work.candidate.name: work for work in works}
    with job.stage(STAGE):
        started = time.monotonic()
        job.pool.run(
            [task for work in works for task in work.first()],
            lambda task, result: by_name[task.candidate or ""].after(task, result),
        )
        for work in works:
            outputs = {"variants": [file.model_dump(mode="json") for file in work.variants()]}
            seconds = (time.monotonic() - started) / len(works)
            inputs = _inputs(job, work.candidate, recipes)
            job.journal.commit_stage(work.candidate.stage, inputs, outputs, seconds)
            Workspace(work.out).remove_statistics()


@dataclass
class CandidateWork:
    """The tasks of one candidate: what comes first, and what follows from what has ended."""

    job: JobContext
    candidate: Dense
    recipes: list[Recipe]
    _calibrated: dict[int, set[int]] = field(default_factory=dict)
    _compressed: set[int | None] = field(default_factory=set)
    _chained: set[str] = field(default_factory=set)
    _files: dict[str, VariantFile] = field(default_factory=dict)

    @property
    def _layers(self) -> int:
        return self.candidate.model.layers

    @property
    def out(self) -> str:
        """The candidate's directory."""
        return str(self.job.journal.candidate_dir(self.candidate.name))

    @property
    def text(self) -> CalibrationText:
        """What statistics are taken from."""
        calibration = self.job.spec.compression.calibration
        return CalibrationText(
            data_dir=str(self.job.journal.data_dir),
            sequence_length=self.job.spec.data.sequence_length,
            sequences=calibration.sequences,
            seed=self.job.spec.seed,
            damping=calibration.damping,
        )

    @property
    def chains(self) -> list[Recipe]:
        """Recipes that are calibrated on their own compressed layers."""
        sequential = self.job.spec.compression.calibration.statistics == "sequential"
        return [recipe for recipe in self.recipes if sequential and recipe.needs_statistics]

    @property
    def together(self) -> list[Recipe]:
        """Recipes that are solved together, layer by layer."""
        return [recipe for recipe in self.recipes if recipe not in self.chains]

    @property
    def _calibrates(self) -> bool:
        return any(recipe.needs_statistics for recipe in self.together)

    def first(self) -> Iterator[Task]:
        """What can be done at once."""
        yield self._task("outer", "compress_outer", recipes=self.recipes)
        if self._calibrates:
            yield from (self._calibrate(0, shard) for shard in range(len(shards(self.text.sequences))))
        else:
            yield from (self._compress(layer) for layer in range(self._layers))

    def after(self, task: Task, result: Any) -> Iterable[Task]:
        """What a result makes possible."""
        follow: dict[str, Callable[[Task, Any], Iterable[Task]]] = {
            "calibrate": self._after_calibrate,
            "compress_outer": self._after_compress,
            "compress_layer": self._after_compress,
            "compress_next": self._after_next,
            "assemble": self._after_assemble,
        }
        return follow[task.function.rpartition(":")[2]](task, result)

    def variants(self) -> list[VariantFile]:
        """The variants' files in the order of the grid."""
        return [self._files[recipe.name] for recipe in self.recipes]

    def _after_calibrate(self, task: Task, result: float) -> Iterator[Task]:
        layer, shard = task.arguments["layer"], task.arguments["shard"]
        if layer + 1 < self._layers:
            yield self._calibrate(layer + 1, shard)
        through = self._calibrated.setdefault(layer, set())
        through.add(shard)
        if len(through) == len(shards(self.text.sequences)):
            self._tell("layer_calibrated", task, layer=layer)
            yield self._compress(layer)

    def _after_compress(self, task: Task, result: LayerResult) -> Iterator[Task]:
        self._tell("layer_compressed", task, layer=result.layer, seconds=result.seconds, recipes=len(result.parts))
        self._compressed.add(result.layer)
        if result.layer is None:
            yield from (self._next(recipe, 0) for recipe in self.chains)
        if len(self._compressed) == self._layers + 1:
            yield from (self._assemble(recipe, sequential=False) for recipe in self.together)

    def _after_next(self, task: Task, result: LayerResult) -> Iterator[Task]:
        recipe, layer = task.arguments["recipe"], task.arguments["layer"]
        self._tell("layer_compressed", task, layer=layer, seconds=result.seconds, recipes=1)
        if layer + 1 < self._layers:
            yield self._next(recipe, layer + 1)
        else:
            yield self._assemble(recipe, sequential=True)

    def _after_assemble(self, task: Task, result: VariantFile) -> tuple[()]:
        self._files[result.name] = result
        return ()

    def _calibrate(self, layer: int, shard: int) -> Task:
        return self._task(f"calibrate {layer}.{shard}", "calibrate", layer=layer, shard=shard, text=self.text)

    def _compress(self, layer: int) -> Task:
        text = self.text if self._calibrates else None
        return self._task(
            str(layer), "compress_layer", layer=layer, recipes=self.together, text=text, keep_statistics=False
        )

    def _next(self, recipe: Recipe, layer: int) -> Task:
        return self._task(f"{recipe.name} {layer}", "compress_next", layer=layer, recipe=recipe, text=self.text)

    def _assemble(self, recipe: Recipe, sequential: bool) -> Task:
        return self._task(recipe.name, "assemble", recipe=recipe, sequential=sequential)

    def _task(self, name: str, function: str, **arguments: Any) -> Task:
        common = {"source": self.candidate.source, "out": self.out}
        return Task(
            f"{self.candidate.stage}/{name}", f"compression.tasks:{function}", common | arguments, self.candidate.name
        )

    def _tell(self, kind: str, task: Task, **fields: Any) -> None:
        self.job.journal.append(kind, {"candidate": self.candidate.name, "task": task.name, **fields})


def compressed(job: JobContext, candidate: Dense) -> StageRecord:
    """The record of a candidate's compression. An assertion: the stage runs before whoever asks."""
    record = job.journal.stage(candidate.stage)
    assert record is not None
    return record


def variant_files(record: StageRecord) -> list[VariantFile]:
    """The variants' files of one candidate, the dense one first."""
    return [VariantFile.model_validate(row) for row in record.outputs["variants"]]


def _inputs(job: JobContext, candidate: Dense, recipes: list[Recipe]) -> str:
    calibration = job.spec.compression.calibration.model_dump(mode="json")
    rows = [recipe.model_dump(mode="json") for recipe in recipes]
    return hash_inputs(STAGE, candidate.inputs, candidate.source, rows, calibration)
