"""Activation-aware weight quantisation (Lin et al. 2024, AWQ): channels with large inputs get finer steps.

Before it is rounded, column j of every linear layer is multiplied by s_j = (mean |x_j|)^α (eq. 5), and what makes
its input is divided by s_j. α is searched per input, from 0 (nothing changes) to 1, for the least squared error of the
outputs. Clipping of the largest weights, the paper's second step, is left out. What is then rounded goes to the nearest
level (:mod:`compression.methods.rtn`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compression.methods.base import InputStatistics, LayerStatistics
from compression.methods.rescaling import move_scales
from compression.methods.rtn import quantize
from compression.recipe import Quantization, Recipe
from compression.reduced import anatomy
from parallelism.models.base import ModelConfig

GRID = 20
"""α = 0, 1/20, …, 1."""
SMALLEST = 1e-4
"""Of a channel's mean |x| relative to the mean of all: channels that are always zero are scaled like this."""


def rescale(
    config: ModelConfig, weights: Mapping[str, Tensor], statistics: LayerStatistics, recipe: Recipe
) -> tuple[dict[str, Tensor], LayerStatistics]:
    """The layer with the best scales for ``recipe``, wherever the family lets scales move, in the forward's order."""
    assert recipe.quantize is not None
    quantization, result = _uniform(recipe.quantize), dict(weights)
    for fold in anatomy(config).folds(config):
        matrices = [result[f"{reader}.weight"] for reader in fold.readers]
        scales = search(matrices, statistics.inputs[fold.readers[0]], quantization)
        result, statistics = move_scales(result, statistics, fold, scales)
    return result, statistics


def search(matrices: Sequence[Tensor], statistics: InputStatistics, quantization: Quantization) -> Tensor:
    """The scales [in] of least output error for matrices [out, in] with the same inputs; of equals the smallest α."""
    best, least = torch.ones_like(statistics.mean_abs), float("inf")
    for step in range(GRID + 1):
        scales = scales_for(statistics.mean_abs, step / GRID)
        error = output_error(matrices, statistics.hessian, scales, quantization)
        if error < least:
            best, least = scales, error
    return best


def scales_for(mean_abs: Tensor, alpha: float) -> Tensor:
    """s = (mean |x|)^α [in], up to a factor that rounding to levels of a channel or group does not see."""
    mean = mean_abs.mean()
    relative = mean_abs / mean if mean > 0 else torch.ones_like(mean_abs)
    return relative.clamp(min=SMALLEST) ** alpha


def output_error(matrices: Sequence[Tensor], hessian: Tensor, scales: Tensor, quantization: Quantization) -> float:
    """Σ ‖ΔW X‖² = Σ tr(ΔW H ΔWᵀ) with ΔW = Q(W·s)/s - W over the matrices (eq. 4, summed over all tokens)."""
    scaled = [weight * scales for weight in matrices]
    rounded = quantize(scaled, [None] * len(scaled), [quantization] * len(scaled))
    error = torch.zeros((), dtype=torch.float64)
    for weight, result in zip(matrices, rounded, strict=True):
        delta = result.dense() / scales - weight
        error += ((delta @ hessian) * delta).sum(dtype=torch.float64).cpu()
    return float(error)


def _uniform(quantization: Quantization) -> Quantization:
    """Where widths are found by matrix, the scales are searched at the average, or at 4 bits for a size."""
    if quantization.bits is not None:
        return quantization
    wanted = quantization.average_bits or 4.0
    nearest = min((8, 6, 4, 3, 2), key=lambda bits: abs(bits - wanted))
    return quantization.model_copy(update={"bits": nearest})
