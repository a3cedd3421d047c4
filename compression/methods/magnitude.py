"""Magnitude pruning: the weights of smallest absolute value go (Han et al. 2015), per matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compression.methods.base import InputStatistics, Pruned
from compression.recipe import Pruning


def prune(weight: Tensor, recipes: Sequence[Pruning], statistics: InputStatistics | None = None) -> list[Pruned]:
    """Set exactly round(sparsity · weights) weights of ``weight`` [out, in] to zero, for every recipe.

    Of weights equal in magnitude those that come first in row-major order go. One sort serves all recipes.
    """
    magnitudes = weight.abs()
    ascending = magnitudes.flatten().sort().values
    masks = [_keep(magnitudes, ascending, round(recipe.sparsity * weight.numel())) for recipe in recipes]
    return [Pruned(torch.where(mask, weight, 0.0), mask) for mask in masks]


def _keep(magnitudes: Tensor, ascending: Tensor, count: int) -> Tensor:
    """Mask that drops the ``count`` smallest."""
    if count == 0:
        return torch.ones_like(magnitudes, dtype=torch.bool)
    threshold = ascending[count - 1]
    keep = magnitudes > threshold
    below = int((magnitudes < threshold).sum())
    ties = (magnitudes == threshold).flatten().nonzero().squeeze(1)
    keep.view(-1)[ties[count - below :]] = True
    return keep
