"""How strong a recipe is in every matrix, where that follows from a look at all layers. Torch-free.

All layers are measured first (:mod:`compression.sensitivity`), by tasks of their own; what follows from the measures is
decided here, once, in a moment:

- *layers to remove*: those of smallest influence;
- *global magnitude*: an exact radix selection in two passes. The first counts magnitudes by the upper 16 bits of their
  float32; :func:`bins_to_refine` says in which bin each threshold lies; the second counts the lower 16 bits there;
- *sparsity by sensitivity*: the sum of the matrices' relative output errors is least for the given total;
- *bits by sensitivity*: the same, for an average of bits or for bytes.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pydantic import Field

from compression.checks import linear_shapes
from compression.config import Bits
from compression.measures import (
    SPARSITIES,
    WIDTHS,
    Counts,
    LayerCounts,
    LayerMeasures,
    MatrixMeasures,
    format_name,
    prunes_globally,
    structure_name,
    unpack_counts,
)
from compression.recipe import Allocations, Recipe, Strength, Strengths
from compression.reduced import reduced_config, removed_layers
from compression.sizes import cost_in_bytes, fixed_bytes
from compression.tradeoff import choose, spread
from parallelism.models.base import ModelConfig
from parallelism.options import Options


class Allotment(Options):
    """What was decided for the allocated recipes of a grid. JSON-able."""

    allocations: dict[str, dict[str, Strength]]
    """Recipe's name → matrix (``layers.3.attention.q``) → its strength; layers numbered as in the dense model."""
    removed: dict[str, tuple[int, ...]] = Field(default={})
    """Recipe's name → layers that its variant leaves out, ascending."""


def strengths_of(allocations: Allocations | None, layer: int) -> Strengths:
    """The part of one layer: recipe's name → linear layer (``attention.q``) → its strength."""
    prefix = f"layers.{layer}."
    return {
        name: {matrix.removeprefix(prefix): strength for matrix, strength in row.items() if matrix.startswith(prefix)}
        for name, row in (allocations or {}).items()
    }


def allocate(
    config: ModelConfig,
    recipes: Sequence[Recipe],
    measures: Sequence[LayerMeasures],
    counts: Sequence[LayerCounts] = (),
) -> Allotment:
    """Strengths and removed layers of every allocated recipe, from the measures of all layers in their order.

    ``config`` is of the dense model. ``counts`` (of all layers) are needed where :func:`bins_to_refine` asks for any.
    Raises ``ValueError`` naming the field where a total cannot be met.
    """
    assert [one.layer for one in measures] == list(range(config.layers)), "every layer is measured once"
    allocations: dict[str, dict[str, Strength]] = {}
    removed: dict[str, tuple[int, ...]] = {}
    for recipe in recipes:
        if recipe.allocated:
            gone = _removed(recipe, measures)
            allocations[recipe.name] = _strengths(config, recipe, measures, counts, gone)
            if gone:
                removed[recipe.name] = gone
    return Allotment(allocations=allocations, removed=removed)


def bins_to_refine(recipes: Sequence[Recipe], measures: Sequence[LayerMeasures]) -> dict[str, list[int]]:
    """Structure → bins of magnitudes in which global thresholds lie; empty where no recipe prunes globally."""
    bins: dict[str, set[int]] = {}
    for recipe in recipes:
        if prunes_globally(recipe):
            gone, structure = _removed(recipe, measures), structure_name(recipe)
            found = _threshold_bin(_sparsity(recipe), structure, [one for one in measures if one.layer not in gone])
            bins.setdefault(structure, set()).add(found)
    return {structure: sorted(found) for structure, found in bins.items()}


def _strengths(
    config: ModelConfig,
    recipe: Recipe,
    measures: Sequence[LayerMeasures],
    counts: Sequence[LayerCounts],
    gone: tuple[int, ...],
) -> dict[str, Strength]:
    """Matrix → strength of one recipe, of the layers that stay."""
    left = [one for one in measures if one.layer not in gone]
    matrices = _matrices(left, structure_name(recipe))
    sparsities: dict[str, float] = {}
    bits: dict[str, Bits] = {}
    if prunes_globally(recipe):
        sparsities = _as_shares(matrices, global_counts(recipe, left, [one for one in counts if one.layer not in gone]))
    elif recipe.prune is not None and recipe.prune.allocated:
        sparsities = _as_shares(matrices, spread_zeros(matrices, recipe.prune.sparsity))
    if recipe.quantize is not None and recipe.quantize.allocated:
        bits = _widths(config, recipe, left, matrices, sparsities)
    if not (sparsities or bits):
        return {}
    return {name: Strength(sparsity=sparsities.get(name), bits=bits.get(name)) for name in matrices}


def spread_zeros(matrices: Mapping[str, MatrixMeasures], sparsity: float) -> dict[str, int]:
    """Matrix → how many of its weights go, round(sparsity · all weights) together, for the least sum of errors.

    Each matrix's error is taken as linear between the sparsities at which it was measured. No matrix loses more than
    the last of :data:`SPARSITIES`; raises ``ValueError`` where that is not enough.
    """
    curves = {
        name: [(round(share * one.weights), error) for share, error in zip(SPARSITIES, one.pruned, strict=True)]
        for name, one in matrices.items()
    }
    taken = spread(curves, round(sparsity * sum(one.weights for one in matrices.values())))
    if taken is None:
        raise ValueError(
            f"prune.sparsity {sparsity} is more than {SPARSITIES[-1]}, which a matrix loses at most by sensitivity:"
            " ask for less, or leave prune.allocation out"
        )
    return taken


def global_counts(recipe: Recipe, measures: Sequence[LayerMeasures], counts: Sequence[LayerCounts]) -> dict[str, int]:
    """Matrix → how many of its weights are among the round(sparsity · all weights) smallest of all matrices.

    Of weights as large as the last of them, those of earlier matrices go first.
    """
    structure, sparsity = structure_name(recipe), _sparsity(recipe)
    one_bin = _threshold_bin(sparsity, structure, measures)
    rows = {
        f"layers.{layer.layer}.{name}": row for layer in counts for name, row in layer.bins[structure][one_bin].items()
    }
    assert len(counts) == len(measures), "every layer's magnitudes are counted twice"
    inside = {name: unpack_counts(row.inside) for name, row in rows.items()}
    wanted = _wanted(sparsity, structure, measures)
    missing = wanted - sum(row.below for row in rows.values())
    last = _place(np.sum(list(inside.values()), axis=0), missing)
    taken = {name: row.below + int(inside[name][:last].sum()) for name, row in rows.items()}
    ties = wanted - sum(taken.values())
    for name in taken:
        extra = min(ties, int(inside[name][last]))
        taken[name] += extra
        ties -= extra
    assert ties == 0, "the threshold's own weights are enough"
    return taken


def _widths(
    config: ModelConfig,
    recipe: Recipe,
    measures: Sequence[LayerMeasures],
    matrices: Mapping[str, MatrixMeasures],
    sparsities: Mapping[str, float],
) -> dict[str, Bits]:
    """Matrix → bits.

    ``average_bits`` counts the codes of linear weights alone, as ``bits`` does: no scales, no embeddings.
    ``target_bytes`` counts the whole compact file: scales and zero points, masks, embeddings at ``embedding_bits``,
    norms, biases and the header.
    """
    quantize = recipe.quantize
    assert quantize is not None
    key = format_name(quantize)
    if quantize.average_bits is not None:
        costs = {name: {bits: bits * one.weights for bits in WIDTHS} for name, one in matrices.items()}
        budget = quantize.average_bits * sum(one.weights for one in matrices.values())
    else:
        assert quantize.target_bytes is not None
        costs = cost_in_bytes(recipe, _shapes(config, recipe, measures), sparsities)
        budget = quantize.target_bytes - fixed_bytes(config, recipe)
    curves = {
        name: {bits: (costs[name][bits], error) for bits, error in zip(WIDTHS, one.rounded[key], strict=True)}
        for name, one in matrices.items()
    }
    widths = choose(curves, budget)
    if widths is None:
        least = sum(min(by_bits.values()) for by_bits in costs.values())
        raise ValueError(
            f"{recipe.name}: quantize.target_bytes is too small by {least - budget:g} bytes even at {min(WIDTHS)} bits"
            " everywhere: raise it, or lower quantize.embedding_bits"
        )
    return widths


def _shapes(config: ModelConfig, recipe: Recipe, measures: Sequence[LayerMeasures]) -> dict[str, tuple[int, int]]:
    """Matrix → (out, in) as the structure leaves it, under its number in the dense model."""
    left, shapes = linear_shapes(reduced_config(config, recipe.structure)), {}
    for place, one in enumerate(measures):
        prefix = f"layers.{place}."
        for name, shape in left.items():
            if name.startswith(prefix):
                shapes[f"layers.{one.layer}.{name.removeprefix(prefix).removesuffix('.weight')}"] = shape
    return shapes


def _removed(recipe: Recipe, measures: Sequence[LayerMeasures]) -> tuple[int, ...]:
    if recipe.structure is None or recipe.structure.layers == 0.0:
        return ()
    influences = [one.influence for one in measures if one.influence is not None]
    assert len(influences) == len(measures), "layers are removed by their statistics"
    return removed_layers(influences, recipe.structure)


def _matrices(measures: Iterable[LayerMeasures], structure: str) -> dict[str, MatrixMeasures]:
    return {f"layers.{one.layer}.{name}": row for one in measures for name, row in one.matrices[structure].items()}


def _as_shares(matrices: Mapping[str, MatrixMeasures], counts: Mapping[str, int]) -> dict[str, float]:
    """Counts as sparsities below 1 that round back to them: a matrix may go whole under a global threshold."""
    return {name: min(count, matrices[name].weights - 0.25) / matrices[name].weights for name, count in counts.items()}


def _sparsity(recipe: Recipe) -> float:
    assert recipe.prune is not None
    return recipe.prune.sparsity


def _magnitudes(structure: str, measures: Sequence[LayerMeasures]) -> Counts:
    total: Counts = np.sum([unpack_counts(one.magnitudes[structure]) for one in measures], axis=0)
    return total


def _wanted(sparsity: float, structure: str, measures: Sequence[LayerMeasures]) -> int:
    return round(sparsity * int(_magnitudes(structure, measures).sum()))


def _threshold_bin(sparsity: float, structure: str, measures: Sequence[LayerMeasures]) -> int:
    counts = _magnitudes(structure, measures)
    return _place(counts, round(sparsity * int(counts.sum())))


def _place(counts: Counts, rank: int) -> int:
    """In which bin the ``rank``-th smallest lies, counted from 1 (for 0: the first bin)."""
    return int(np.searchsorted(counts.cumsum(), rank))
