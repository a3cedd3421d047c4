"""The papers' algorithms written out, slowly: float64, one row and one column after the other.

Nothing here is shared with the solver but the rule by which levels are laid between a group's smallest and largest
weight, which no paper fixes, and which is written out once more in :func:`fitted`.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Solution:
    """What comes out for a matrix [out, in]."""

    weight: Tensor
    mask: Tensor
    codes: Tensor
    scales: dict[tuple[int, int], float] = field(default_factory=dict)
    """(row, group) → scale."""


@dataclass(frozen=True)
class Rounding:
    """How to quantise: bits, columns that share a scale (None: all), kind."""

    bits: int
    group: int | None = None
    symmetric: bool = True
    fp8: bool = False


@dataclass(frozen=True)
class Thinning:
    """How to prune: a share of every block, or the kept and the width of an n:m pattern."""

    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None


def e4m3_numbers() -> list[float]:
    """Every finite number of FP8 e4m3 (bias 7; the largest mantissa of the largest exponent is no number)."""
    positive = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    for exponent in range(1, 16):
        positive += [(1 + mantissa / 8) * 2.0 ** (exponent - 7) for mantissa in range(8)]
    positive.pop()
    return [-number for number in positive] + positive


def fitted(weights: list[float], rounding: Rounding) -> tuple[float, int]:
    """Scale (as float16 holds it) and zero code for the weights of a group."""
    low, high = min(0.0, *weights), max(0.0, *weights)
    steps = 2**rounding.bits - 1
    if rounding.fp8:
        span, parts = max(-low, high), 448
    elif rounding.symmetric:
        span, parts = 2 * max(-low, high), steps
    else:
        span, parts = high - low, steps
    scale = float(torch.tensor(span / parts if span else 1.0, dtype=torch.float64).half())
    scale = scale or 2.0**-24
    if rounding.symmetric or rounding.fp8:
        return scale, 2 ** (rounding.bits - 1)
    return scale, min(max(round(-low / scale), 0), steps)


def rounded(weight: float, scale: float, zero: int, rounding: Rounding) -> tuple[float, float]:
    """The nearest code (FP8: number), and the weight that it stands for."""
    if rounding.fp8:
        nearest = min(e4m3_numbers(), key=lambda number: abs(number - weight / scale))
        return nearest, nearest * scale
    code = min(max(round(weight / scale) + zero, 0), 2**rounding.bits - 1)
    return code, (code - zero) * scale


def solve(
    weight: Tensor,
    hessian: Tensor,
    rounding: Rounding | None = None,
    thinning: Thinning | None = None,
    mask: Tensor | None = None,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
) -> Solution:
    """GPTQ (``rounding``), SparseGPT (``thinning``), both in one, or GPTQ with a given ``mask``.

    Frantar et al. 2023, algorithm 1, and Frantar & Alistarh 2023, algorithm 1, with every update done at once instead
    of block by block: ``block`` is only that in which SparseGPT chooses.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    rows, columns = weight.shape
    _drop_dead_inputs(weight, hessian)
    order = list(range(columns))
    if act_order:
        order.sort(key=lambda column: -float(hessian[column, column]))
    group = (rounding.group if rounding else None) or columns
    keep = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask.clone()
    fits: Fits = {}
    if rounding and act_order:
        for first in range(0, columns, group):
            _fit_group(fits, weight, keep, first, group, rounding)
    upper = _upper_root_of_inverse(hessian[order][:, order], damping)
    result = Solution(torch.zeros_like(weight), keep, torch.zeros_like(weight))
    for step, column in enumerate(order):
        if thinning:
            _thin(weight, keep, upper, order, step, block, thinning)
        if rounding and not act_order and step % group == 0:
            _fit_group(fits, weight, keep, step, group, rounding)
        for row in range(rows):
            value, fit = float(weight[row, column]), fits.get((row, column // group))
            code, solved = _solved(value, bool(keep[row, column]), fit, rounding)
            result.codes[row, column], result.weight[row, column] = code, solved
            error = (value - solved) / float(upper[step, step])
            weight[row, order[step:]] -= error * upper[step, step:]
    result.scales = {place: scale for place, (scale, _) in fits.items()}
    return result


Fits = dict[tuple[int, int], tuple[float, int]]
"""(row, group) → scale and zero code."""


def _drop_dead_inputs(weight: Tensor, hessian: Tensor) -> None:
    """An input that is always zero: its weights do nothing, and its column stands alone."""
    for column in range(len(hessian)):
        if hessian[column, column] == 0.0:
            hessian[column, column] = 1.0
            weight[:, column] = 0.0


def _upper_root_of_inverse(hessian: Tensor, damping: float) -> Tensor:
    """U with H⁻¹ = UᵀU, of the damped H."""
    ridge = damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(hessian + ridge)).T


def _fit_group(fits: Fits, weight: Tensor, keep: Tensor, first: int, group: int, rounding: Rounding) -> None:
    """Scales of the group of columns that begins at ``first``, from what is not known to be pruned."""
    for row in range(len(weight)):
        left = [float(weight[row, column]) if keep[row, column] else 0.0 for column in range(first, first + group)]
        fits[row, first // group] = fitted(left, rounding)


def _solved(value: float, kept: bool, fit: tuple[float, int] | None, rounding: Rounding | None) -> tuple[float, float]:
    """The code of a weight (0 without rounding), and what the weight becomes."""
    if rounding is None:
        return 0.0, value if kept else 0.0
    assert fit is not None
    if not kept:
        return 0.0 if rounding.fp8 else fit[1], 0.0
    return rounded(value, *fit, rounding)


def _thin(
    weight: Tensor, keep: Tensor, upper: Tensor, order: list[int], step: int, block: int, thinning: Thinning
) -> None:
    """Choose what goes of the block, or of the n:m pattern's columns, where one begins at ``step``."""
    if thinning.pattern is None and step % block == 0:
        _thin_block(weight, keep, upper, order, step, min(block, len(order) - step), thinning.sparsity)
    if thinning.pattern and step % thinning.pattern[1] == 0:
        for row in range(len(weight)):
            _thin_neighbours(weight, keep, upper, row, step, *thinning.pattern)


def _thin_block(
    weight: Tensor, keep: Tensor, upper: Tensor, order: list[int], first: int, width: int, sparsity: float
) -> None:
    """Drop the smallest w² / [H⁻¹]_cc of a block, the first of equal ones."""
    scores = []
    for row in range(weight.shape[0]):
        for step in range(first, first + width):
            score = float(weight[row, order[step]]) ** 2 / float(upper[step, step]) ** 2
            scores.append((score, row, step))
    scores.sort()
    for _, row, step in scores[: round(sparsity * len(scores))]:
        keep[row, order[step]] = False


def _thin_neighbours(weight: Tensor, keep: Tensor, upper: Tensor, row: int, first: int, kept: int, width: int) -> None:
    """Of ``width`` neighbours in a row keep the ``kept`` with the largest w² / [H⁻¹]_cc."""
    scores = [
        (float(weight[row, column]) ** 2 / float(upper[column, column]) ** 2, column)
        for column in range(first, first + width)
    ]
    for _, column in sorted(scores)[: width - kept]:
        keep[row, column] = False


def wanda(weight: Tensor, inputs: Tensor, thinning: Thinning) -> Tensor:
    """The mask of Sun et al. 2023, from the inputs X [tokens, in] themselves: |W_ij| · ‖X_j‖₂ within each row."""
    keep = torch.ones_like(weight, dtype=torch.bool)
    rows, columns = weight.shape
    norms = [float(inputs[:, column].double().square().sum().sqrt()) for column in range(columns)]
    for row in range(rows):
        scores = [(abs(float(weight[row, column])) * norms[column], column) for column in range(columns)]
        if thinning.pattern is None:
            dropped = sorted(scores)[: round(thinning.sparsity * columns)]
        else:
            kept, width = thinning.pattern
            parts = [sorted(scores[first : first + width]) for first in range(0, columns, width)]
            dropped = [score for part in parts for score in part[: width - kept]]
        for _, column in dropped:
            keep[row, column] = False
    return keep
