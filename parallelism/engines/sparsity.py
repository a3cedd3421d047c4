"""The smallest weights of matrices that are divided over tensor-parallel ranks, found by counting."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallelism.models.base import StoredMatrix

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS
SHIFTS = (24, 16, 8, 0)


@torch.no_grad()
def smallest(matrices: Sequence[StoredMatrix], sparsity: float, group: dist.ProcessGroup) -> list[Tensor]:
    """Which weights are the smallest of their matrix: round(sparsity · size) of each, bool of the view's shape.

    Every rank of ``group`` holds its part of all matrices, in the same order. The k-th smallest magnitude is found by
    a radix selection on the bits of float32, which are in the order of the magnitudes: four counts of 256 digits, added
    up over ranks. Of equal magnitudes at the threshold the first go, by rows where rows are divided and by columns
    where columns are, so that the choice does not depend on the number of ranks. Collective.
    """
    bits = [_magnitude_bits(matrix) for matrix in matrices]
    sizes = _summed(torch.tensor([values.numel() for values in bits]), bits, group)
    wanted = torch.tensor([round(sparsity * size) for size in sizes.tolist()], device=sizes.device)
    thresholds, at_threshold = _select(bits, wanted, group)
    equal = [values == threshold for values, threshold in zip(bits, thresholds.tolist(), strict=True)]
    shares = _shares(equal, at_threshold, group)
    chosen = []
    for matrix, values, threshold, ties, share in zip(
        matrices, bits, thresholds.tolist(), equal, shares.tolist(), strict=True
    ):
        flat = (values < threshold) | (ties & (ties.cumsum(0) <= share))
        chosen.append(_in_shape(flat, matrix))
    return chosen


def _select(bits: Sequence[Tensor], wanted: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Of each matrix the ``wanted``-th smallest value (counted from 1), and how many that are equal to it go.

    Where none is wanted, a value below all others.
    """
    thresholds, left = torch.zeros_like(wanted), wanted.clone()
    for shift in SHIFTS:
        upper = thresholds >> (shift + DIGIT_BITS)
        counts = torch.stack([_digit_counts(*row, shift) for row in zip(bits, upper.tolist(), strict=True)])
        totals = _summed(counts, bits, group).cumsum(1)
        digit = (totals < left[:, None]).sum(1).clamp_(max=DIGITS - 1)
        below = totals.gather(1, (digit - 1).clamp_(min=0)[:, None]).squeeze(1)
        left -= torch.where(digit > 0, below, 0)
        thresholds |= digit << shift
    return torch.where(wanted > 0, thresholds, -1), torch.where(wanted > 0, left, 0)


def _digit_counts(values: Tensor, upper: int, shift: int) -> Tensor:
    """How often each digit [256] stands at ``shift`` in the values whose bits above it are ``upper``."""
    here = values[values >> (shift + DIGIT_BITS) == upper]
    return torch.bincount((here >> shift) & (DIGITS - 1), minlength=DIGITS)


def _shares(equal: Sequence[Tensor], count: Tensor, group: dist.ProcessGroup) -> Tensor:
    """How many of this rank's ties go, where ``count`` [matrices] go of those of all ranks, lower ranks' first."""
    mine = torch.stack([ties.sum() for ties in equal])
    table = mine.new_zeros(dist.get_world_size(group), len(equal))
    rank = dist.get_rank(group)
    table[rank] = mine
    dist.all_reduce(table, group=group)
    return (count - table[:rank].sum(0)).clamp(min=0).minimum(mine)


def _magnitude_bits(matrix: StoredMatrix) -> Tensor:
    """|w| of every weight as the integer its float32 bits make, int64 [size], in the order in which ties go."""
    values = matrix.view.transpose(-2, -1) if matrix.split_dim == 1 else matrix.view
    return values.reshape(-1).float().abs().view(torch.int32).long()


def _in_shape(flat: Tensor, matrix: StoredMatrix) -> Tensor:
    """What :func:`_magnitude_bits` flattened, in the view's shape."""
    if matrix.split_dim == 1:
        rows, columns = matrix.view.shape
        return flat.view(columns, rows).t()
    return flat.view(matrix.view.shape)


def _summed(counts: Tensor, like: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Added up over the ranks, on the device of the weights."""
    total = counts.to(like[0].device)
    dist.all_reduce(total, group=group)
    return total
