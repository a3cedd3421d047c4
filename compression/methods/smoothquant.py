"""SmoothQuant (Xiao et al. 2023): outliers of the activations move into the weights, so that both fit eight bits.

For recipes that round the inputs, too. Scales move into the norms only, as in the paper. What is then rounded goes to
the nearest level (:mod:`compression.methods.rtn`).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compression.methods.base import LayerStatistics
from compression.methods.rescaling import move_scales
from compression.recipe import Recipe
from compression.reduced import anatomy
from parallelism.models.base import ModelConfig

ALPHA = 0.5
"""How much of the range moves: 0 none of it, 1 all of it."""


def rescale(
    config: ModelConfig, weights: Mapping[str, Tensor], statistics: LayerStatistics, recipe: Recipe
) -> tuple[dict[str, Tensor], LayerStatistics]:
    """The layer with the ranges of its norms' outputs and of the columns that read them evened out."""
    result = dict(weights)
    for fold in anatomy(config).folds(config):
        if result[f"{fold.source}.weight"].ndim == 1:
            matrices = [result[f"{reader}.weight"] for reader in fold.readers]
            scales = scales_for(matrices, statistics.inputs[fold.readers[0]].absmax)
            result, statistics = move_scales(result, statistics, fold, scales)
    return result, statistics


def scales_for(matrices: Sequence[Tensor], absmax: Tensor, alpha: float = ALPHA) -> Tensor:
    """s_j = max|X_j|^α / max|W_j|^(1-α) [in] (eq. 4), W_j column j of all matrices [out, in] together.

    Where either range is zero there is nothing to even out, and s_j is 1.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in matrices]).amax(0)
    scales = absmax**alpha / largest ** (1.0 - alpha)
    return torch.where((absmax > 0) & (largest > 0), scales, 1.0)
