"""Measuring one layer for what is decided over all layers (:mod:`compression.allocation`). Pure functions."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from compression.measures import (
    HIGH_BINS,
    LOW_BINS,
    SPARSITIES,
    WIDTHS,
    BinCounts,
    LayerCounts,
    LayerMeasures,
    MatrixMeasures,
    format_name,
    pack_counts,
    prunes_globally,
    structure_name,
)
from compression.methods.base import InputStatistics, LayerStatistics
from compression.methods.rtn import round_to_nearest
from compression.recipe import Quantization, Recipe
from compression.structure import reduced_layer
from parallelism.models.base import ModelConfig

Layer = tuple[dict[str, Tensor], LayerStatistics | None]
"""Canonical name → float32 tensor, and statistics."""


def measure_layer(
    config: ModelConfig,
    layer: int,
    weights: Mapping[str, Tensor],
    statistics: LayerStatistics | None,
    recipes: Sequence[Recipe],
) -> LayerMeasures:
    """What the allocated ones of ``recipes`` have to know of one layer (canonical name → float32 tensor).

    ``statistics`` may be missing where none of them needs statistics. Raises ``ValueError`` naming the linear layer
    where a structure cannot be carried out.
    """
    matrices: dict[str, dict[str, MatrixMeasures]] = {}
    magnitudes: dict[str, str] = {}
    for structure, asking in by_structure(recipes).items():
        base = _reduced(config, weights, statistics, asking[0])
        pruned, formats = _asked(asking)
        matrices[structure] = {
            name: _measure(base[0][f"{name}.weight"], _inputs_of(base, name), pruned, formats) for name in linears(base)
        }
        if any(prunes_globally(recipe) for recipe in asking):
            counts = sum(_bincount(_high(base[0][f"{name}.weight"]), HIGH_BINS) for name in linears(base))
            assert isinstance(counts, Tensor)
            magnitudes[structure] = pack_counts(counts.numpy())
    influence = statistics.influence if statistics else None
    return LayerMeasures(layer=layer, influence=influence, matrices=matrices, magnitudes=magnitudes)


def count_layer(
    config: ModelConfig,
    layer: int,
    weights: Mapping[str, Tensor],
    statistics: LayerStatistics | None,
    recipes: Sequence[Recipe],
    bins: Mapping[str, Iterable[int]],
) -> LayerCounts:
    """The second pass of the radix selection: the lower halves of magnitudes inside ``bins`` (structure → bins)."""
    found: dict[str, dict[int, dict[str, BinCounts]]] = {}
    for structure, asking in by_structure(recipes).items():
        if structure in bins:
            base = _reduced(config, weights, statistics, asking[0])
            found[structure] = {
                one: {name: _count(base[0][f"{name}.weight"], one) for name in linears(base)} for one in bins[structure]
            }
    return LayerCounts(layer=layer, bins=found)


def by_structure(recipes: Iterable[Recipe]) -> dict[str, list[Recipe]]:
    """The allocated ones of ``recipes`` by the name of their structure."""
    found: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        if recipe.allocated:
            found.setdefault(structure_name(recipe), []).append(recipe)
    return found


def linears(base: Layer) -> list[str]:
    """The linear layers of a layer."""
    return [name.removesuffix(".weight") for name, weight in base[0].items() if weight.ndim == 2]


def pruning_errors(weight: Tensor, statistics: InputStatistics) -> tuple[float, ...]:
    """Relative output error at each of :data:`SPARSITIES` when the weights of smallest w²·H_jj go, [out, in].

    The score is Wanda's (Sun et al. 2024, eq. 1: |w|·‖x_j‖) squared: what a weight's removal adds to the squared
    error while inputs are taken as uncorrelated. Summed from the smallest up and divided by tr(W H Wᵀ).
    """
    scores = weight.square() * statistics.hessian.diagonal()
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), scores.flatten().sort().values.double().cpu().cumsum(0)])
    counts = torch.tensor([round(sparsity * weight.numel()) for sparsity in SPARSITIES])
    return _relative(sums[counts].tolist(), weight, statistics)


def rounding_errors(weight: Tensor, statistics: InputStatistics, quantization: Quantization) -> tuple[float, ...]:
    """Relative output error tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of round-to-nearest at each of :data:`WIDTHS`, [out, in]."""
    errors = []
    for bits in WIDTHS:
        rounded = round_to_nearest(weight, bits, quantization.group_size, quantization.symmetric)
        errors.append(_energy(rounded.dense() - weight, statistics))
    return _relative(errors, weight, statistics)


def _reduced(
    config: ModelConfig, weights: Mapping[str, Tensor], statistics: LayerStatistics | None, recipe: Recipe
) -> Layer:
    if recipe.structure is None:
        return dict(weights), statistics
    assert statistics is not None, f"recipe {recipe.name} needs statistics"
    return reduced_layer(config, weights, statistics, recipe.structure)


def _asked(recipes: Iterable[Recipe]) -> tuple[bool, dict[str, Quantization]]:
    """Whether pruning is to be measured, and which formats of rounding."""
    pruned, formats = False, {}
    for recipe in recipes:
        prune, quantize = recipe.prune, recipe.quantize
        pruned |= prune is not None and prune.allocated and prune.allocation == "sensitivity"
        if quantize is not None and quantize.allocated:
            formats[format_name(quantize)] = quantize
    return pruned, formats


def _inputs_of(base: Layer, name: str) -> InputStatistics | None:
    return base[1].inputs[name] if base[1] is not None else None


def _measure(
    weight: Tensor, statistics: InputStatistics | None, pruned: bool, formats: Mapping[str, Quantization]
) -> MatrixMeasures:
    if not pruned and not formats:
        return MatrixMeasures(weights=weight.numel())
    assert statistics is not None, "errors are measured with statistics"
    return MatrixMeasures(
        weights=weight.numel(),
        pruned=pruning_errors(weight, statistics) if pruned else (),
        rounded={name: rounding_errors(weight, statistics, one) for name, one in formats.items()},
    )


def _energy(weight: Tensor, statistics: InputStatistics) -> float:
    """‖W X‖² = tr(W H Wᵀ)."""
    return float(((weight @ statistics.hessian) * weight).sum(dtype=torch.float64))


def _relative(errors: Iterable[float], weight: Tensor, statistics: InputStatistics) -> tuple[float, ...]:
    whole = _energy(weight, statistics)
    # Seven digits: what is measured lies in journals.
    return tuple(float(f"{error / whole:.7g}") if whole > 0 else 0.0 for error in errors)


def _pattern(weight: Tensor) -> Tensor:
    """The bits of |w| as a float32, [n] int32: they are ordered as the magnitudes are."""
    return weight.abs().float().contiguous().flatten().view(torch.int32)


def _high(weight: Tensor) -> Tensor:
    return _pattern(weight) >> 16


def _bincount(values: Tensor, size: int) -> Tensor:
    return torch.bincount(values, minlength=size).cpu()


def _count(weight: Tensor, one: int) -> BinCounts:
    high = _high(weight)
    inside = _pattern(weight)[high == one] & (LOW_BINS - 1)
    return BinCounts(below=int((high < one).sum()), inside=pack_counts(_bincount(inside, LOW_BINS).numpy()))
