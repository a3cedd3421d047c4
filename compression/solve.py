"""One part of the model under all recipes of the grid: who prunes, who quantises, and in which order."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compression.compact import CompactPart
from compression.matrix import STORED_DTYPE, CompressedMatrix, Quantized
from compression.methods.base import LinearStatistics, Pruned, Pruner, Quantizer
from compression.methods.rtn import round_to_nearest
from compression.recipe import Pruning, Recipe
from compression.registry import PRUNING, QUANTIZATION
from compression.results import MatrixFacts
from parallelism.registry import load

UNQUANTIZED_BITS = 16


def solve_layer(
    prefix: str,
    weights: Mapping[str, Tensor],
    recipes: Sequence[Recipe],
    statistics: Mapping[str, LinearStatistics] | None = None,
) -> list[tuple[CompactPart, MatrixFacts]]:
    """One layer (canonical name → float32 tensor) under every recipe, named with ``prefix`` in front.

    Every two-dimensional weight is a linear layer's. ``statistics`` by linear layer (``attention.q``).
    """
    parts = [CompactPart() for _ in recipes]
    facts = [MatrixFacts() for _ in recipes]
    for name, weight in weights.items():
        if weight.ndim != 2:
            for part in parts:
                part.add_vector(prefix + name, weight)
            continue
        known = statistics[name.removesuffix(".weight")] if statistics else None
        solved = solve_matrix(weight, recipes, known)
        for place, matrix in enumerate(solved):
            parts[place].add_matrix(prefix + name, matrix)
            facts[place] += _facts(weight, matrix)
    return list(zip(parts, facts, strict=True))


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
    weight: Tensor, recipes: Sequence[Recipe], statistics: LinearStatistics | None = None
) -> list[CompressedMatrix]:
    """``weight`` [out, in] float32 under every recipe: prune first, then quantise what is left, masks kept."""
    pruned = _prune(weight, recipes, statistics)
    starts = [pruned[recipe.prune] if recipe.prune else None for recipe in recipes]
    quantized = _quantize(weight, starts, recipes, statistics)
    return [_matrix(weight, start, codes) for start, codes in zip(starts, quantized, strict=True)]


def _prune(weight: Tensor, recipes: Sequence[Recipe], statistics: LinearStatistics | None) -> dict[Pruning, Pruned]:
    """Each distinct pruning of the grid, solved once; one call per method."""
    wanted = dict.fromkeys(recipe.prune for recipe in recipes if recipe.prune)
    solved: dict[Pruning, Pruned] = {}
    for method in dict.fromkeys(pruning.method for pruning in wanted):
        prunings = [pruning for pruning in wanted if pruning.method == method]
        pruner: Pruner = load(PRUNING[method].implementation)
        solved |= zip(prunings, pruner(weight, prunings, statistics), strict=True)
    return solved


def _quantize(
    weight: Tensor,
    starts: Sequence[Pruned | None],
    recipes: Sequence[Recipe],
    statistics: LinearStatistics | None,
) -> list[Quantized | None]:
    """Every recipe's codes, None where it does not quantise; one call per method."""
    solved: list[Quantized | None] = [None] * len(recipes)
    for method in dict.fromkeys(recipe.quantize.method for recipe in recipes if recipe.quantize):
        rows = [
            (index, start, recipe.quantize)
            for index, (start, recipe) in enumerate(zip(starts, recipes, strict=True))
            if recipe.quantize and recipe.quantize.method == method
        ]
        quantizer: Quantizer = load(QUANTIZATION[method].implementation)
        results = quantizer(
            [start.weight if start else weight for _, start, _ in rows],
            [start.mask if start else None for _, start, _ in rows],
            [quantization for _, _, quantization in rows],
            statistics,
        )
        for (index, _, _), result in zip(rows, results, strict=True):
            solved[index] = result
    return solved


def _matrix(weight: Tensor, pruned: Pruned | None, quantized: Quantized | None) -> CompressedMatrix:
    mask = pruned.mask if pruned else None
    if quantized is not None:
        return CompressedMatrix(mask, quantized=quantized)
    return CompressedMatrix(mask, weight=(pruned.weight if pruned else weight).to(STORED_DTYPE))


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
