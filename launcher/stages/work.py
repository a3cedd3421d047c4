"""The tasks that make the variants of one dense model: a graph, in which results make further tasks possible.

Shards of text go through a layer side by side, and the next layer waits for the last of them; a layer whose shards are
through is compressed at once by all recipes, and its statistics are deleted, so that the disk holds those of a few
layers only (:mod:`launcher.planning.disk`). Where a recipe's strength follows from a look at all layers, the layers are
measured first, and the statistics stay until the end. With ``statistics: sequential``, recipes that need statistics are
chains of their own. Torch-free.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from compression.allocation import Allotment, allocate, bins_to_refine
from compression.measures import LayerCounts, LayerMeasures
from compression.recipe import Recipe, Strength
from compression.results import LayerResult, VariantFile
from compression.text import CalibrationText, shards
from compression.workspace import Workspace, chain_directory
from launcher.actors.pool import Task
from launcher.context import JobContext
from parallelism.models.base import ModelConfig


@dataclass(frozen=True)
class Dense:
    """A dense model that is compressed: a candidate's, or a variant that was finetuned."""

    candidate: str
    source: str
    model: ModelConfig
    inputs: str
    """Hash of what the model depends on."""


@dataclass
class GridWork:
    """All recipes on one dense model: which tasks come first, and which follow from what has ended.

    Everything is written below ``out``. ``allotment`` is given where the strengths are known before.
    """

    job: JobContext
    stage: str
    dense: Dense
    recipes: list[Recipe]
    out: str
    allotment: Allotment | None = None
    _calibrated: dict[int, set[int]] = field(default_factory=dict)
    _measures: dict[int, LayerMeasures] = field(default_factory=dict)
    _counts: dict[int, LayerCounts] = field(default_factory=dict)
    _outer_done: bool = False
    _chains_started: bool = False
    _compressed: set[int | None] = field(default_factory=set)
    _files: dict[str, VariantFile] = field(default_factory=dict)

    @property
    def _layers(self) -> int:
        return self.dense.model.layers

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
            yield from self._calibrate(0)
        elif self._allocated:
            yield from (self._measure(layer) for layer in range(self._layers))
        else:
            yield from self._settle(self.allotment)

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
        through = self._calibrated.setdefault(layer, set())
        through.add(shard)
        if len(through) < len(shards(self.text.sequences)):
            return
        self._tell("layer_calibrated", task, layer=layer)
        # Compressed before the next layer is looked at: a shard that ran ahead would leave its statistics behind.
        yield self._measure(layer) if self._allocated else self._compress(layer)
        if layer + 1 < self._layers:
            yield from self._calibrate(layer + 1)
        elif not self._allocated:
            yield from self._start_chains(self.allotment or Allotment(allocations={}))

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
        config, measures, counts = self.dense.model, self._by_layer(self._measures), self._by_layer(self._counts)
        allotment = allocate(config, self._allocated, measures, counts)
        facts = {"recipes": sorted(allotment.allocations), "removed": allotment.removed}
        self.job.journal.append("strengths_allocated", {"candidate": self.dense.candidate, **facts})
        yield from self._settle(allotment)

    def _settle(self, allotment: Allotment | None) -> Iterator[Task]:
        """Nothing stands between the layers and their compression any more."""
        self.allotment = allotment
        yield from (self._compress(layer) for layer in range(self._layers))
        yield from self._start_chains(allotment or Allotment(allocations={}))

    def _start_chains(self, allotment: Allotment) -> Iterator[Task]:
        """Chains begin when the strengths are known and their embeddings are there, whichever comes last."""
        self.allotment = allotment
        if self._outer_done and not self._chains_started:
            self._chains_started = True
            yield from (self._next(recipe, None) for recipe in self.chains)

    def _after_outer(self, task: Task, result: LayerResult) -> Iterator[Task]:
        self._outer_done = True
        if self.allotment is not None:
            yield from self._start_chains(self.allotment)
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

    def _calibrate(self, layer: int) -> Iterator[Task]:
        for shard in range(len(shards(self.text.sequences))):
            yield self._task(f"calibrate {layer}.{shard}", "calibrate", layer=layer, shard=shard, text=self.text)

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
            removed=self.allotment.removed if self.allotment else {},
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
        return self.allotment.allocations if self.allotment else {}

    def _removed(self, recipe: Recipe) -> tuple[int, ...]:
        return self.allotment.removed.get(recipe.name, ()) if self.allotment else ()

    def _left(self, recipe: Recipe) -> list[int]:
        """Layers that the recipe's variant has."""
        return [layer for layer in range(self._layers) if layer not in self._removed(recipe)]

    def _by_layer(self, found: dict[int, Any]) -> list[Any]:
        return [found[layer] for layer in sorted(found)]

    def _task(self, name: str, function: str, **arguments: Any) -> Task:
        common = {"source": self.dense.source, "out": self.out}
        return Task(f"{self.stage}/{name}", f"compression.tasks:{function}", common | arguments, self.dense.candidate)

    def _tell(self, kind: str, task: Task, **fields: Any) -> None:
        self.job.journal.append(kind, {"candidate": self.dense.candidate, "task": task.name, **fields})

    def close(self) -> None:
        """Delete what nobody needs once the variants are there."""
        Workspace(self.out).remove_statistics()
        for recipe in self.chains:
            Workspace(chain_directory(self.out, recipe)).remove_statistics()
        Workspace(self.out).remove_drafts()


def run_works(job: JobContext, works: Iterable[GridWork]) -> None:
    """All works side by side on the job's pool. Raises what the pool raises."""
    by_out = {work.out: work for work in works}
    job.pool.run(
        [task for work in by_out.values() for task in work.first()],
        lambda task, result: by_out[task.arguments["out"]].after(task, result),
    )
    for work in by_out.values():
        work.close()
