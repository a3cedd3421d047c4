"""Keeping the zeros that a model has already: of one that was pruned elsewhere, or finetuned with its zeros held."""

from collections.abc import Sequence

from torch import Tensor

from compression.methods.base import InputStatistics, Pruned
from compression.recipe import Pruning


def prune(weight: Tensor, recipes: Sequence[Pruning], statistics: InputStatistics | None = None) -> list[Pruned]:
    """``weight`` [out, in] as it is, its zeros as the mask; the recipes' sparsity is what somebody else has reached."""
    return [Pruned(weight, weight != 0.0)] * len(recipes)
