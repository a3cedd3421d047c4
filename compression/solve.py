"""One part of the model under all recipes of the grid: who removes, rescales, prunes and quantises, in this order.

What recipes share is done once: recipes with the same structure and rescaling start from the same *base*, a matrix is
pruned once for all recipes that prune it alike, and everything that is solved column by column with the same inputs
goes through one loop (:mod:`compression.columns`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compression.columns import ColumnJob, solve_columns
from compression.compact import CompactPart
from compression.matrix import STORED_DTYPE, CompressedMatrix, Quantized
from compression.methods.base import InputStatistics, LayerStatistics, Pruned, Pruner, Quantizer, Rescaler
from compression.methods.rtn import round_to_nearest
from compression.recipe import Pruning, Quantization, Recipe, Strengths, Structure
from compression.registry import PRUNING, QUANTIZATION
from compression.results import MatrixFacts
from compression.structure import reduced_layer
from parallelism.models.base import ModelConfig
from parallelism.registry import load

UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class Solved:
    """One layer under one recipe."""

    weights: dict[str, CompressedMatrix | Tensor]
    """Canonical name → matrix, or vector in float32."""
    facts: MatrixFacts

    def part(self, prefix: str) -> CompactPart:
        """What is written, every name with ``prefix`` in front."""
        part = CompactPart()
        for name, value in self.weights.items():
            if isinstance(value, CompressedMatrix):
                part.add_matrix(prefix + name, value)
            else:
                part.add_vector(prefix + name, value)
        return part

    def dense(self) -> dict[str, Tensor]:
        """Canonical name → float32 tensor, exactly as the file will be read back."""
        return {
            name: value.dense() if isinstance(value, CompressedMatrix) else value.to(STORED_DTYPE).float()
            for name, value in self.weights.items()
        }


@dataclass(frozen=True)
class _Base:
    """A layer as some recipes find it: parts removed and rescaled."""

    weights: dict[str, Tensor]
    statistics: LayerStatistics | None


def solve_layer(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    recipes: Sequence[Recipe],
    statistics: LayerStatistics | None = None,
    strengths: Strengths | None = None,
) -> list[Solved]:
    """One layer (canonical name → float32 tensor) under every recipe; every two-dimensional weight is a linear layer's.

    Raises ``ValueError`` naming the linear layer where a method cannot work with its statistics.
    """
    solved: list[Solved | None] = [None] * len(recipes)
    strengths = {recipe.as_solved.name: (strengths or {}).get(recipe.name, {}) for recipe in recipes}
    recipes = [recipe.as_solved for recipe in recipes]
    bases: dict[tuple[Structure | None, str | None], list[int]] = {}
    for place, recipe in enumerate(recipes):
        rescaler = QUANTIZATION[recipe.quantize.method].rescaler if recipe.quantize else None
        # What a rescaler does depends on the whole recipe, so that only recipes without one share a base.
        bases.setdefault((recipe.structure, f"{rescaler} {recipe.name}" if rescaler else None), []).append(place)
    for places in bases.values():
        chosen = [recipes[place] for place in places]
        base = _base(config, weights, statistics, chosen[0])
        for place, result in zip(places, _solve_base(base, chosen, strengths), strict=True):
            solved[place] = result
    assert all(result is not None for result in solved)
    return [result for result in solved if result is not None]


def solve_outer(weights: Mapping[str, Tensor], embedding_bits: int) -> CompactPart:
    """What stands outside the layers: matrices at ``embedding_bits`` with one scale per row, the rest in bfloat16."""
    part = CompactPart()
    for name, weight in weights.items():
        if weight.ndim != 2:
            part.add_vector(name, weight)
        elif embedding_bits == UNQUANTIZED_BITS:
            part.add_matrix(name, CompressedMatrix(None, weight=weight.to(STORED_DTYPE)))
        else:
            part.add_matrix(name, CompressedMatrix(None, quantized=round_to_nearest(weight, embedding_bits)))
    return part


def solve_matrix(
    weight: Tensor, recipes: Sequence[Recipe], statistics: InputStatistics | None = None
) -> list[CompressedMatrix]:
    """``weight`` [out, in] float32 under every (uniform) recipe: prune, then quantise what is left, masks kept."""
    return [result[""] for result in solve_group({"": weight}, [{"": recipe} for recipe in recipes], statistics)]


def _base(
    config: ModelConfig, weights: Mapping[str, Tensor], statistics: LayerStatistics | None, recipe: Recipe
) -> _Base:
    base = _Base(dict(weights), statistics)
    if recipe.structure is not None:
        base = _Base(*reduced_layer(config, base.weights, _required(base.statistics, recipe), recipe.structure))
    dotted = QUANTIZATION[recipe.quantize.method].rescaler if recipe.quantize else None
    if dotted:
        rescaler: Rescaler = load(dotted)
        base = _Base(*rescaler(config, base.weights, _required(base.statistics, recipe), recipe))
    return base


def _required(statistics: LayerStatistics | None, recipe: Recipe) -> LayerStatistics:
    assert statistics is not None, f"recipe {recipe.name} needs statistics"
    return statistics


def _solve_base(base: _Base, recipes: Sequence[Recipe], strengths: Strengths) -> list[Solved]:
    """All recipes that start from one base."""
    results: list[dict[str, CompressedMatrix]] = [{} for _ in recipes]
    for names, statistics in _groups(base):
        matrices = {name: base.weights[f"{name}.weight"] for name in names}
        uniform = [
            {name: recipe.at(strengths.get(recipe.name, {}).get(name)) for name in matrices} for recipe in recipes
        ]
        for result, solved in zip(results, solve_group(matrices, uniform, statistics), strict=True):
            result |= {f"{name}.weight": matrix for name, matrix in solved.items()}
    solved_layers = []
    for result in results:
        weights = {name: result.get(name, tensor) for name, tensor in base.weights.items()}
        facts = (_facts(base.weights[name], matrix) for name, matrix in result.items())
        solved_layers.append(Solved(weights, sum(facts, MatrixFacts())))
    return solved_layers


def _groups(base: _Base) -> list[tuple[list[str], InputStatistics | None]]:
    """Linear layers that share their inputs, so that they are solved together."""
    linear = [name.removesuffix(".weight") for name, weight in base.weights.items() if weight.ndim == 2]
    if base.statistics is None:
        return [([name], None) for name in linear]
    groups: dict[int, tuple[list[str], InputStatistics | None]] = {}
    for name in linear:
        known = base.statistics.inputs[name]
        groups.setdefault(id(known), ([], known))[0].append(name)
    return list(groups.values())


def solve_group(
    matrices: Mapping[str, Tensor], recipes: Sequence[Mapping[str, Recipe]], statistics: InputStatistics | None
) -> list[dict[str, CompressedMatrix]]:
    """Matrices [out, in] float32 that share their inputs, under every recipe (name → its uniform recipe).

    First whatever looks at a matrix as it is, then all that is solved by columns in one loop, then the quantisation of
    what was pruned by columns only.
    """
    cells = [_Cell(name, weight, row[name]) for row in recipes for name, weight in matrices.items()]
    _prune(cells, statistics)
    _solve_columns(cells, statistics)
    _quantize(cells, statistics)
    found = iter(cells)
    return [{name: next(found).result() for name in matrices} for _ in recipes]


@dataclass
class _Cell:
    """One matrix under one recipe, on its way."""

    name: str
    weight: Tensor
    recipe: Recipe
    mask: Tensor | None = None
    quantized: Quantized | None = None

    @property
    def prunes_by_columns(self) -> bool:
        return self.recipe.prune is not None and PRUNING[self.recipe.prune.method].by_columns

    @property
    def quantizes_by_columns(self) -> bool:
        return self.recipe.quantize is not None and QUANTIZATION[self.recipe.quantize.method].by_columns

    def result(self) -> CompressedMatrix:
        if self.quantized is not None:
            return CompressedMatrix(self.mask, quantized=self.quantized)
        return CompressedMatrix(self.mask, weight=self.weight.to(STORED_DTYPE))


def _prune(cells: Sequence[_Cell], statistics: InputStatistics | None) -> None:
    """Each distinct pruning of a matrix once; one call per matrix and method."""
    waiting: dict[tuple[str, str], dict[Pruning, list[_Cell]]] = {}
    for cell in cells:
        prune = cell.recipe.prune
        if prune is not None and not cell.prunes_by_columns:
            waiting.setdefault((cell.name, prune.method), {}).setdefault(prune, []).append(cell)
    for (_, method), by_pruning in waiting.items():
        pruner: Pruner = load(PRUNING[method].implementation)
        weight = next(iter(by_pruning.values()))[0].weight
        results: list[Pruned] = pruner(weight, list(by_pruning), statistics)
        for result, sharing in zip(results, by_pruning.values(), strict=True):
            for cell in sharing:
                cell.weight, cell.mask = result.weight, result.mask


def _solve_columns(cells: Sequence[_Cell], statistics: InputStatistics | None) -> None:
    """One loop over the columns for all cells that prune or quantise so; equal ones are solved once."""
    jobs: dict[tuple[object, ...], list[_Cell]] = {}
    for cell in cells:
        if cell.prunes_by_columns or cell.quantizes_by_columns:
            jobs.setdefault((cell.name, id(cell.weight), *_column_parts(cell)), []).append(cell)
    if not jobs:
        return
    assert statistics is not None, "what is solved by columns needs statistics"
    wanted = [ColumnJob(same[0].name, same[0].weight, same[0].mask, *_column_parts(same[0])) for same in jobs.values()]
    for result, same in zip(solve_columns(wanted, statistics), jobs.values(), strict=True):
        for cell in same:
            cell.mask, cell.quantized = result.mask, result.quantized
            if result.quantized is None:
                cell.weight = result.weight


def _column_parts(cell: _Cell) -> tuple[Pruning | None, Quantization | None]:
    """What of a cell's recipe is solved by columns. Pruned by columns and quantised otherwise: pruning alone."""
    prune = cell.recipe.prune if cell.prunes_by_columns else None
    return prune, cell.recipe.quantize if cell.quantizes_by_columns else None


def _quantize(cells: Sequence[_Cell], statistics: InputStatistics | None) -> None:
    """Whatever quantises a matrix as it is now; one call per matrix and method."""
    waiting: dict[tuple[str, str], list[_Cell]] = {}
    for cell in cells:
        if cell.recipe.quantize is not None and not cell.quantizes_by_columns:
            waiting.setdefault((cell.name, cell.recipe.quantize.method), []).append(cell)
    for (_, method), same in waiting.items():
        quantizer: Quantizer = load(QUANTIZATION[method].implementation)
        recipes = [cell.recipe.quantize for cell in same if cell.recipe.quantize]
        results = quantizer([cell.weight for cell in same], [cell.mask for cell in same], recipes, statistics)
        for cell, result in zip(same, results, strict=True):
            cell.quantized = result


def _facts(weight: Tensor, matrix: CompressedMatrix) -> MatrixFacts:
    kept = weight.numel() if matrix.mask is None else int(matrix.mask.sum())
    return MatrixFacts(
        weights=weight.numel(),
        pruned=weight.numel() - kept,
        squared_error=_squared(matrix.dense() - weight),
        squared_norm=_squared(weight),
    )


def _squared(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
