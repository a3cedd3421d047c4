"""SparseGPT (Frantar & Alistarh 2023, "Massive Language Models Can Be Accurately Pruned in One-Shot").

What is its own in the column loop (:mod:`compression.columns`): which weights go, chosen as the loop comes to them,
from the weights as they then are. What the loop does with their errors is GPTQ's (the paper's algorithm 1).
"""

import torch
from torch import Tensor

from compression.methods.selection import keep_largest, keep_of_each


def keep_in_block(weights: Tensor, spread: Tensor, sparsity: float) -> Tensor:
    """Mask [columns, rows] of a block of columns: round(sparsity · columns · rows) of its weights go.

    Those of smallest w² / [H⁻¹]_jj (algorithm 1), anywhere in the block; of equal ones the first in row-major order of
    [out, in]. ``weights`` [columns, rows], ``spread`` [columns] is √[H⁻¹]_jj of the columns from j on.
    """
    scores = _scores(weights, spread)
    count = round(sparsity * scores.numel())
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    mask = scores > scores.flatten().kthvalue(count).values
    if int(mask.sum()) == scores.numel() - count:
        return mask
    # Equal scores at the border: their order decides.
    return keep_largest(scores.t().reshape(1, -1), count).view(scores.shape[::-1]).t()


def keep_in_pattern(weights: Tensor, spread: Tensor, kept: int) -> Tensor:
    """Mask [m, rows] of m neighbouring columns: of every row the ``kept`` weights of largest w² / [H⁻¹]_jj stay."""
    return keep_of_each(_scores(weights, spread), kept)


def _scores(weights: Tensor, spread: Tensor) -> Tensor:
    return (weights / spread[:, None]).square()
