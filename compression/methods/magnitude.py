"""Magnitude pruning: the weights of smallest absolute value go (Han et al. 2015), per matrix, row or pattern."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compression.methods.base import InputStatistics, Pruned
from compression.methods.selection import keep_largest, keep_pattern
from compression.recipe import Pruning


def prune(weight: Tensor, recipes: Sequence[Pruning], statistics: InputStatistics | None = None) -> list[Pruned]:
    """Set weights of ``weight`` [out, in] to zero, for every recipe exactly as many as it asks for.

    round(sparsity · weights) of the matrix, or round(sparsity · in) of every row, or m - n of every m neighbours. Of
    weights equal in magnitude those that come first in row-major order go. (Scope global is allocated beforehand.)
    """
    magnitudes = weight.abs()
    masks = [_keep(magnitudes, recipe) for recipe in recipes]
    return [Pruned(torch.where(mask, weight, 0.0), mask) for mask in masks]


def _keep(magnitudes: Tensor, recipe: Pruning) -> Tensor:
    if recipe.pattern is not None:
        return keep_pattern(magnitudes, recipe.pattern)
    compared = magnitudes if recipe.scope == "row" else magnitudes.reshape(1, -1)
    return keep_largest(compared, round(recipe.sparsity * compared.shape[1])).view_as(magnitudes)
