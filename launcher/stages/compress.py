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

from compression.allocation import Allotment, allocate, bins_to_refine
from compression.measures import LayerCounts, LayerMeasures
from compression.recipe import Recipe, Strength, grid
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
    _measures: dict[int, LayerMeasures] = field(default_factory=dict)
    _counts: dict[int, LayerCounts] = field(default_factory=dict)
    _allotment: Allotment | None = None
    _outer_done: bool = False
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
    def _allocated(self) -> list[Recipe]:
        return [recipe for recipe in self.recipes if recipe.allocated]

    @property
    def _calibrates(self) -> bool:
        return any(recipe.needs_statistics for recipe in [*self.together, *self._allocated])

    def first(self) -> Iterator[Task]:
        """What can be done at once."""
        yield self._task("outer", "compress_outer", recipes=self.recipes)
        if self._calibrates:
            yield from (self._calibrate(0, shard) for shard in range(len(shards(self.text.sequences))))
        elif self._allocated:
            yield from (self._measure(layer) for layer in range(self._layers))
        else:
            yield from self._settle(None)

    def after(self, task: Task, result: Any) -> Iterable[Task]:
        """What a result makes possible."""
        follow: dict[str, Callable[[Task, Any], Iterable[Task]]] = {
            "calibrate": self._after_calibrate,
            "measure": self._after_measure,
            "count": self._after_count,
            "compress_outer": self._after_outer,
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
            if self._allocated:
                yield self._measure(layer)
            else:
                yield self._compress(layer)
                if layer + 1 == self._layers:
                    yield from self._start_chains(Allotment(allocations={}))

    def _after_measure(self, task: Task, result: LayerMeasures) -> Iterator[Task]:
        self._measures[result.layer] = result
        if len(self._measures) < self._layers:
            return
        bins = bins_to_refine(self._allocated, self._by_layer(self._measures))
        if bins:
            yield from (self._count(layer, bins) for layer in range(self._layers))
        else:
            yield from self._allocate()

    def _after_count(self, task: Task, result: LayerCounts) -> Iterator[Task]:
        self._counts[result.layer] = result
        if len(self._counts) == self._layers:
            yield from self._allocate()

    def _allocate(self) -> Iterator[Task]:
        """Every layer has been measured: decide, and go on."""
        config, measures, counts = self.candidate.model, self._by_layer(self._measures), self._by_layer(self._counts)
        allotment = allocate(config, self._allocated, measures, counts)
        facts = {"recipes": sorted(allotment.allocations), "removed": allotment.removed}
        self.job.journal.append("strengths_allocated", {"candidate": self.candidate.name, **facts})
        yield from self._settle(allotment)

    def _settle(self, allotment: Allotment | None) -> Iterator[Task]:
        """Nothing stands between the layers and their compression any more."""
        self._allotment = allotment
        yield from (self._compress(layer) for layer in range(self._layers))
        yield from self._start_chains(allotment or Allotment(allocations={}))

    def _start_chains(self, allotment: Allotment) -> Iterator[Task]:
        """Chains begin when the strengths are known and their embeddings are there, whichever comes last."""
        self._allotment = allotment
        if self._outer_done:
            yield from (self._next(recipe, None) for recipe in self.chains)

    def _after_outer(self, task: Task, result: LayerResult) -> Iterator[Task]:
        self._outer_done = True
        if self._allotment is not None:
            yield from self._start_chains(self._allotment)
        yield from self._after_compress(task, result)

    def _after_compress(self, task: Task, result: LayerResult) -> Iterator[Task]:
        self._tell("layer_compressed", task, layer=result.layer, seconds=result.seconds, recipes=len(result.parts))
        self._compressed.add(result.layer)
        if len(self._compressed) == self._layers + 1:
            yield from (self._assemble(recipe, sequential=False) for recipe in self.together)

    def _after_next(self, task: Task, result: LayerResult) -> Iterator[Task]:
        recipe, layer = task.arguments["recipe"], task.arguments["layer"]
        self._tell("layer_compressed", task, layer=layer, seconds=result.seconds, recipes=1)
        if layer < self._left(recipe)[-1]:
            yield self._next(recipe, layer)
        else:
            yield self._assemble(recipe, sequential=True)

    def _after_assemble(self, task: Task, result: VariantFile) -> tuple[()]:
        self._files[result.name] = result
        return ()

    def _calibrate(self, layer: int, shard: int) -> Task:
        return self._task(f"calibrate {layer}.{shard}", "calibrate", layer=layer, shard=shard, text=self.text)

    def _measure(self, layer: int) -> Task:
        return self._task(f"measure {layer}", "measure", layer=layer, recipes=self.recipes, text=self._known_text)

    def _count(self, layer: int, bins: dict[str, list[int]]) -> Task:
        arguments = {"layer": layer, "recipes": self.recipes, "bins": bins, "text": self._known_text}
        return self._task(f"count {layer}", "count", **arguments)

    def _compress(self, layer: int) -> Task:
        return self._task(
            str(layer),
            "compress_layer",
            layer=layer,
            recipes=self.together,
            text=self._known_text,
            allocations=self._allocations,
            keep_statistics=bool(self._allocated),
        )

    def _next(self, recipe: Recipe, layer: int | None) -> Task:
        """The step of a chain behind ``layer`` (None: the first)."""
        following = next(index for index in self._left(recipe) if layer is None or index > layer)
        arguments = {"layer": following, "recipe": recipe, "text": self.text, "allocations": self._allocations}
        return self._task(f"{recipe.name} {following}", "compress_next", **arguments)

    def _assemble(self, recipe: Recipe, sequential: bool) -> Task:
        removed = self._removed(recipe)
        return self._task(recipe.name, "assemble", recipe=recipe, sequential=sequential, removed=removed)

    @property
    def _known_text(self) -> CalibrationText | None:
        return self.text if self._calibrates else None

    @property
    def _allocations(self) -> dict[str, dict[str, Strength]]:
        return self._allotment.allocations if self._allotment else {}

    def _removed(self, recipe: Recipe) -> tuple[int, ...]:
        return self._allotment.removed.get(recipe.name, ()) if self._allotment else ()

    def _left(self, recipe: Recipe) -> list[int]:
        """Layers that the recipe's variant has."""
        return [layer for layer in range(self._layers) if layer not in self._removed(recipe)]

    def _by_layer(self, found: dict[int, Any]) -> list[Any]:
        return [found[layer] for layer in sorted(found)]

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
