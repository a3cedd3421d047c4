"""What a cluster runs: plain functions whose arguments and results are JSON-able or paths.

A task is one (candidate, layer), all recipes: it reads one layer of the sharded checkpoint and commits one compact file
per recipe, so that a killed worker loses one layer at most. Every task may be run again at any time: what is
committed is not made twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from compression import compact
from compression.allocation import strengths_of
from compression.calibration import CalibrationFiles, calibrate_step, read_statistics, statistics_hash
from compression.checks import check_names, check_recipes
from compression.compact import CompactFile, CompactPart
from compression.evaluation import held_out_sequences, tally
from compression.export import export
from compression.measures import LayerCounts, LayerMeasures
from compression.methods.base import LayerStatistics
from compression.recipe import Allocations, Recipe
from compression.results import LayerResult, MatrixFacts, Part, Quality, VariantFile
from compression.sensitivity import count_layer, measure_layer
from compression.sequential import SHARD, Chain, RecipeStart, advance, solve_next
from compression.solve import Solved, solve_layer, solve_outer
from compression.source import open_weights, read_source
from compression.structure import reduced_config
from compression.text import CalibrationText, shards
from compression.verification import verify
from compression.workspace import Workspace, chain_directory, inputs_hash
from parallelism import places
from parallelism.data.batches import TokenBatches
from parallelism.layer_reader import CheckpointWeights
from parallelism.models.base import ModelConfig
from parallelism.plain_checkpoint import write_checkpoint

__all__ = [
    "assemble",
    "calibrate",
    "compress_layer",
    "compress_next",
    "compress_outer",
    "count",
    "evaluate",
    "evaluate_checkpoint",
    "export",
    "measure",
    "read_variant",
    "to_checkpoint",
    "verify",
]


def calibrate(
    source: str, layer: int, shard: int, text: CalibrationText, out: str, *, device: str | None = None
) -> float:
    """Take one shard of the text through one layer and commit, below ``out``, what its linear layers saw.

    The shard's earlier layers have to be done; what is done is not done again. Returns the seconds it took. Raises
    ``ValueError`` for a damaged model.
    """
    started, weights = time.monotonic(), open_weights(source, default_device(device))
    calibrate_step(
        weights, text.batches().rows, layer, shard, shards(text.sequences)[shard], _statistics(source, text, out)
    )
    return time.monotonic() - started


def compress_layer(
    source: str,
    layer: int,
    recipes: list[Recipe],
    out: str,
    *,
    text: CalibrationText | None = None,
    allocations: Allocations | None = None,
    removed: Mapping[str, Sequence[int]] | None = None,
    keep_statistics: bool = True,
    device: str | None = None,
) -> LayerResult:
    """Compress one layer by every recipe and commit it below ``out``; committed already, it is not done again.

    ``text`` is what ``out`` was calibrated with, where a recipe needs statistics; ``removed`` (recipe's name → layers)
    are left out by those recipes, which do nothing then. Without ``keep_statistics`` those of this layer are deleted in
    the end. Raises ``ValueError`` for a damaged model, weights that are not finite, or
    recipes that do not fit the layer.
    """
    check_names(recipes)
    place, model = default_device(device), read_source(source)
    needs_text = any(recipe.needs_statistics for recipe in recipes)
    # Of all recipes, so that the layers of a grid have one and the same.
    inputs = _inputs(source, recipes, text if needs_text else None, allocations, *([removed] if removed else []))
    keeping = [recipe for recipe in recipes if layer not in (removed or {}).get(recipe.name, ())]

    def solve() -> list[_Part]:
        check_recipes(model.config, [recipe.as_solved for recipe in keeping])
        tensors, statistics = _read_layer(source, layer, out, text if needs_text else None, place)
        assert statistics or not needs_text, "some recipe needs statistics, and there is no text"
        solved = solve_layer(model.config, tensors, keeping, statistics, strengths_of(allocations, layer))
        prefix = f"layers.{layer}."
        return [
            _Part(recipe.name, result.part(prefix), result.facts, [recipe])
            for recipe, result in zip(keeping, solved, strict=True)
        ]

    result = _commit(Workspace(out), layer, inputs, solve)
    if needs_text and text is not None and not keep_statistics:
        _statistics(source, text, out).remove_layer(layer)
    return result


def compress_next(
    source: str,
    layer: int,
    recipe: Recipe,
    out: str,
    *,
    text: CalibrationText,
    allocations: Allocations | None = None,
    device: str | None = None,
) -> LayerResult:
    """One step of a recipe's chain (:mod:`compression.sequential`), behind its earlier layers and ``compress_outer``.

    What is done is not done again. Raises ``ValueError`` as :func:`compress_layer` does.
    """
    place, model = default_device(device), read_source(source)
    directory = chain_directory(out, recipe)
    inputs = _inputs(source, [recipe], text, allocations)
    files = CalibrationFiles(directory, inputs)
    weights = open_weights(source, place)
    solved: list[Solved] = []

    def solve() -> list[_Part]:
        check_recipes(model.config, [recipe.as_solved])
        check_finite(weights.layer(layer), f"layer {layer}, ")
        strengths = strengths_of(allocations, layer)
        start = RecipeStart(weights.config, lambda: _outer_file(out, recipe, place).outer())
        rows = text.batches().rows
        chain = Chain(weights, start, rows, text.sequences, recipe, files, text.damping)
        solved.append(solve_next(chain, layer, strengths))
        return [_Part(recipe.name, solved[0].part(f"layers.{layer}."), solved[0].facts, [recipe])]

    result = _commit(Workspace(directory), layer, inputs, solve)
    if files.reached(SHARD) <= layer:
        (part,) = result.parts
        file = CompactFile(Workspace(directory).layer(layer) / part.file, place)
        advance(weights.config, layer, recipe, file.layer(layer), files)
    return result


def _outer_file(out: str, recipe: Recipe, device: torch.device) -> CompactFile:
    """What stands outside the layers under a recipe, committed before."""
    workspace = Workspace(out)
    return CompactFile(workspace.layer(None) / workspace.require(None).part(recipe).file, device)


def compress_outer(source: str, recipes: list[Recipe], out: str, *, device: str | None = None) -> LayerResult:
    """The same for embeddings, final norm and output layer. Recipes of equal ``embedding_bits`` share a file."""
    check_names(recipes)
    place = default_device(device)
    inputs = _inputs(source, recipes, None, None)

    def solve() -> list[_Part]:
        tensors = open_weights(source, place).outer()
        check_finite(tensors, "")
        return [
            _Part(
                f"embedding{bits}",
                solve_outer(tensors, bits),
                MatrixFacts(),
                [recipe for recipe in recipes if recipe.embedding_bits == bits],
            )
            for bits in sorted({recipe.embedding_bits for recipe in recipes})
        ]

    return _commit(Workspace(out), None, inputs, solve)


def measure(
    source: str,
    layer: int,
    recipes: list[Recipe],
    out: str,
    text: CalibrationText | None = None,
    *,
    device: str | None = None,
) -> LayerMeasures:
    """Measure one layer for those recipes whose strength follows from a look at all layers; commit it below ``out``.

    The statistics stay. Measured already, it is not done again. Raises ``ValueError`` as :func:`compress_layer` does.
    """
    asking = [recipe for recipe in recipes if recipe.allocated]
    known = text if any(recipe.needs_statistics for recipe in asking) else None
    inputs = _inputs(source, asking, known, None)

    def make() -> LayerMeasures:
        config = read_source(source).config
        check_recipes(config, asking)
        tensors, statistics = _read_layer(source, layer, out, known, default_device(device))
        return measure_layer(config, layer, tensors, statistics, asking)

    return _commit_measures(Workspace(out).measures(layer, "measures"), LayerMeasures, inputs, make)


def count(
    source: str,
    layer: int,
    recipes: list[Recipe],
    bins: dict[str, list[int]],
    out: str,
    text: CalibrationText | None = None,
    *,
    device: str | None = None,
) -> LayerCounts:
    """The second look at one layer that a global threshold takes, committed like :func:`measure`.

    ``bins`` are those that :func:`compression.allocation.bins_to_refine` found in the measures of all layers.
    """
    asking = [recipe for recipe in recipes if recipe.allocated]
    known = text if any(recipe.needs_statistics for recipe in asking) else None
    inputs = _inputs(source, asking, known, None, bins)

    def make() -> LayerCounts:
        tensors, statistics = _read_layer(source, layer, out, known, default_device(device))
        return count_layer(read_source(source).config, layer, tensors, statistics, asking, bins)

    return _commit_measures(Workspace(out).measures(layer, "counts"), LayerCounts, inputs, make)


def assemble(
    source: str, recipe: Recipe, out: str, *, sequential: bool = False, removed: Sequence[int] = ()
) -> VariantFile:
    """Put a recipe's committed layers together into the variant's compact file; ``sequential``: those of its chain.

    ``removed``: layers that its structure leaves out (:class:`compression.allocation.Allotment` tells them). Raises
    ``ValueError`` where a layer has not been committed, or not of the same inputs as the rest.
    """
    workspace, model = Workspace(out), read_source(source)
    places = Workspace(chain_directory(out, recipe)) if sequential else workspace
    config, layers = reduced_config(model.config, recipe.as_solved.structure), _layers_left(model.config, removed)
    assert config.layers == len(layers), f"{recipe.name} leaves {config.layers} layers, not {len(layers)}"
    results = [workspace.require(None), *(places.require(index) for index in layers)]
    if len({result.inputs for result in results[1:]}) > 1:
        raise ValueError(f"{out} holds layers of different grids or checkpoints: compress the layers again")
    parts = [result.part(recipe) for result in results]
    linear = sum((part.facts for part in parts), MatrixFacts())
    facts = {
        "model": config.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "trained": model.trained,
        "inputs": results[1].inputs,
        "sparsity": linear.sparsity,
        "relative_error": linear.relative_error,
    } | ({"removed_layers": list(removed)} if removed else {})
    folders = [workspace.layer(None), *(places.layer(index) for index in layers)]
    files = [folder / part.file for folder, part in zip(folders, parts, strict=True)]
    path = workspace.variant(recipe)
    compact.assemble(files, facts, path, {index: number for number, index in enumerate(layers)})
    return read_variant(str(path))


def _layers_left(config: ModelConfig, removed: Sequence[int]) -> list[int]:
    return [index for index in range(config.layers) if index not in removed]


def read_variant(path: str) -> VariantFile:
    """What a compact file says about itself. Raises ``ValueError`` where it is damaged."""
    file = CompactFile(path)
    return VariantFile(
        name=file.recipe.name,
        recipe=file.recipe,
        path=path,
        bytes=file.file.bytes,
        parameters=file.parameters,
        bits_per_parameter=8 * file.file.bytes / file.parameters,
        sparsity=file.facts["sparsity"],
        relative_error=file.facts["relative_error"],
    )


def evaluate(
    variants: list[str],
    data_dir: str,
    sequence_length: int,
    tokens: int,
    seed: int,
    *,
    device: str | None = None,
) -> list[Quality]:
    """Measure variants (paths of compact files) on ``tokens`` held-out tokens, all in one pass over the layers.

    The sequences are those at positions 0, 1, … of the validation split's order for ``seed``; whole sequences only, at
    least one, and no sequence twice.
    """
    place = default_device(device)
    models = [CompactFile(path, place) for path in variants]
    text = TokenBatches(data_dir, "validation", sequence_length, seed)
    totals = tally(models, text.rows, held_out_sequences(text, tokens), device=place)
    bytes_per_token = text.prepared.bytes_per_token
    return [total.quality(model.recipe.name, bytes_per_token) for model, total in zip(models, totals, strict=True)]


def evaluate_checkpoint(
    checkpoint: str, data_dir: str, sequence_length: int, tokens: int, seed: int, *, device: str | None = None
) -> Quality:
    """The same for a checkpoint's own weights, before anything is stored in fewer bits."""
    place = default_device(device)
    text = TokenBatches(data_dir, "validation", sequence_length, seed)
    (total,) = tally([CheckpointWeights(checkpoint, place)], text.rows, held_out_sequences(text, tokens), device=place)
    return total.quality("checkpoint", text.prepared.bytes_per_token)


def to_checkpoint(source: str, directory: str) -> str:
    """A checkpoint that training can start from: ``source`` itself where it is one, else made of it at ``directory``.

    It holds the weights in float32, without an optimizer, written one layer at a time; what is done is not done again.
    Raises ``ValueError`` for a damaged model.
    """
    weights = open_weights(source)
    if isinstance(weights, CheckpointWeights):
        return source
    with torch.inference_mode():
        return str(write_checkpoint(weights, directory, read_source(source).fingerprint).path)


def default_device(wanted: str | None) -> torch.device:
    """The device asked for; else the GPU where there is one."""
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


_Measured = TypeVar("_Measured", LayerMeasures, LayerCounts)


@dataclass(frozen=True)
class _Part:
    """A file to write and the recipes it serves."""

    stem: str
    content: CompactPart
    facts: MatrixFacts
    recipes: Sequence[Recipe]


def _commit(workspace: Workspace, layer: int | None, inputs: str, solve: Callable[[], list[_Part]]) -> LayerResult:
    """What is committed for these inputs, or else what ``solve`` makes, written and committed."""
    done = workspace.committed(layer, inputs)
    if done is not None:
        return done
    start = time.monotonic()
    with torch.inference_mode():
        solved = solve()
    parts = []
    for item in solved:
        name = f"{item.stem}.{inputs[:12]}.safetensors"
        size = item.content.write(workspace.layer(layer) / name)
        parts += [Part(recipe=recipe, file=name, bytes=size, facts=item.facts) for recipe in item.recipes]
    result = LayerResult(layer=layer, inputs=inputs, parts=parts, seconds=time.monotonic() - start)
    workspace.commit(result)
    return result


def _commit_measures(path: Path, kind: type[_Measured], inputs: str, make: Callable[[], _Measured]) -> _Measured:
    """What is committed for these inputs, or else what ``make`` finds, written."""
    try:
        done = kind.model_validate_json(places.read_bytes(path))
    except (FileNotFoundError, ValidationError):
        done = None
    if done is not None and done.inputs == inputs:
        return done
    with torch.inference_mode():
        found = make().model_copy(update={"inputs": inputs})
    places.write_text(path, found.model_dump_json())
    return found


def _read_layer(
    source: str, layer: int, out: str, text: CalibrationText | None, device: torch.device
) -> tuple[dict[str, Tensor], LayerStatistics | None]:
    """A layer's weights, and its statistics on ``text``. Raises ``ValueError`` for weights that are not finite."""
    tensors = open_weights(source, device).layer(layer)
    check_finite(tensors, f"layer {layer}, ")
    if text is None:
        return tensors, None
    return tensors, read_statistics(_statistics(source, text, out), layer, text.sequences, text.damping, device)


def _statistics(source: str, text: CalibrationText, out: str) -> CalibrationFiles:
    return CalibrationFiles(Path(out), _text_hash(source, text))


def _text_hash(source: str, text: CalibrationText) -> str:
    request = text.batches().prepared.request
    facts = (request, text.sequence_length, text.sequences, text.seed)
    return statistics_hash(read_source(source).fingerprint, *facts)


def _inputs(
    source: str, recipes: list[Recipe], text: CalibrationText | None, allocations: Allocations | None, *others: object
) -> str:
    """Hash of everything that the committed layers of a grid depend on."""
    calibrated = [_text_hash(source, text), text.damping] if text else None
    rows = {
        name: {matrix: strength.model_dump() for matrix, strength in row.items()}
        for name, row in (allocations or {}).items()
    }
    return inputs_hash(read_source(source).fingerprint, recipes, calibrated, rows, *others)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ``ValueError`` for weights that are not finite; ``where`` is put before the tensor's name."""
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{where}{name}: {bad} of {tensor.numel()} weights are not finite: the training diverged; compress an"
                " earlier checkpoint"
            )
