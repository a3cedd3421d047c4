"""Wanda (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compression.methods.base import InputStatistics, Pruned
from compression.methods.selection import keep_largest, keep_pattern
from compression.recipe import Pruning


def prune(weight: Tensor, recipes: Sequence[Pruning], statistics: InputStatistics | None) -> list[Pruned]:
    """Set the weights of ``weight`` [out, in] with the smallest S to zero, compared within each output (row).

    Eq. 1: S_ij = |W_ij| · ‖X_j‖₂, and ‖X_j‖₂ = √H_jj. round(sparsity · in) of every row go, or m - n of every m
    neighbours; of equal scores the first.
    """
    assert statistics is not None, "wanda needs statistics"
    scores = weight.abs() * statistics.hessian.diagonal().clamp(min=0.0).sqrt()
    masks = [_keep(scores, recipe) for recipe in recipes]
    return [Pruned(torch.where(mask, weight, 0.0), mask) for mask in masks]


def _keep(scores: Tensor, recipe: Pruning) -> Tensor:
    if recipe.pattern is not None:
        return keep_pattern(scores, recipe.pattern)
    return keep_largest(scores, round(recipe.sparsity * scores.shape[1]))
