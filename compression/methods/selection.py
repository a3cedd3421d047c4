"""Which weights stay, given a score for each: the largest of a row, or n of every m neighbours."""

from functools import cache

import torch
from torch import Tensor

from compression.config import pattern_of


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mask [rows, columns] that drops the ``count`` smallest scores of every row; of equal ones the first go."""
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    mask = scores > threshold
    if bool((mask.sum(1) == scores.shape[1] - count).all()):
        return mask
    ties = scores == threshold
    dropped = count - (scores < threshold).sum(1, keepdim=True)
    return mask | (ties & (ties.cumsum(1) > dropped))


def keep_of_each(scores: Tensor, kept: int) -> Tensor:
    """Mask [m, ...] that keeps the ``kept`` largest scores along the first dimension; of equal ones the first go.

    By counting for every score which of the m go before it: for the small m of n:m patterns faster than sorting.
    """
    below = scores[:, None] < scores
    earlier = _earlier(len(scores), scores.device).view(*below.shape[:2], *[1] * (scores.ndim - 1))
    # Of a pair the later one goes first only where it is smaller.
    before = torch.where(earlier, below.transpose(0, 1).logical_not(), below)
    return before.sum(0) >= len(scores) - kept


@cache
def _earlier(count: int, device: torch.device) -> Tensor:
    """[i, j] bool: i < j."""
    return torch.ones(count, count, dtype=torch.bool, device=device).triu(1)


def keep_pattern(scores: Tensor, pattern: str) -> Tensor:
    """Mask [rows, columns] that keeps the n largest of every m neighbouring columns, ``pattern`` being ``n:m``.

    m divides the columns (:mod:`compression.checks`).
    """
    kept, width = pattern_of(pattern)
    rows, columns = scores.shape
    groups = scores.view(rows, columns // width, width)
    return keep_of_each(groups.movedim(2, 0), kept).movedim(0, 2).reshape(rows, columns)
