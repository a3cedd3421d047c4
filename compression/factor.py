"""The inverse of H in the form in which columns are solved one after another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.methods.base import InputStatistics

_MOST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Factor:
    """H⁻¹ = UᵀU with U upper triangular, the columns of H in the order in which they are solved.

    Row i of U is what GPTQ and SparseGPT take from the inverse: U_ij / U_ii says how column j makes up for an error in
    column i when the columns before i are fixed, and U_ii² is [H⁻¹]_ii of the columns from i on.
    """

    order: Tensor | None
    """Columns [in] in the order of solving; None: as they come."""
    steps: Tensor
    """U_ij / U_ii [in, in]: ones on the diagonal, zeros below."""
    spread: Tensor
    """U_ii [in]."""
    dead: Tensor
    """Columns [in] bool, as they come, whose inputs are always zero: their weights do nothing."""


def factor_of(statistics: InputStatistics, by_size: bool, dtype: torch.dtype, names: str) -> Factor:
    """The factor of H with the statistics' damping, in ``dtype``; computed once for all recipes.

    ``by_size``: columns in the order of falling H_jj (GPTQ's act-order). ``names``: the linear layers, for errors.
    Raises ``ValueError`` where H is not finite, or singular under any damping.
    """
    key = ("factor", by_size, statistics.damping, dtype)
    if key not in statistics.factors:
        statistics.factors[key] = _factorise(statistics, by_size, dtype, names)
    factor = statistics.factors[key]
    assert isinstance(factor, Factor)
    return factor


def _factorise(statistics: InputStatistics, by_size: bool, dtype: torch.dtype, names: str) -> Factor:
    hessian = statistics.hessian.double()
    if not hessian.isfinite().all():
        raise ValueError(
            f"{names}: the calibration statistics (H = XᵀX) are not finite: the model overflows on this text; compress"
            " an earlier checkpoint, or delete the statistics and calibrate again"
        )
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0.0
    # As the papers' code does: an input that is always zero gets H_jj = 1, which decouples its column.
    diagonal[dead] = 1.0
    order = diagonal.argsort(descending=True, stable=True) if by_size else None
    if order is not None:
        hessian, diagonal = hessian[order][:, order], diagonal[order]
    upper = _upper_root(hessian, diagonal, statistics.damping, names)
    pivots = upper.diagonal().clone()
    # H = RRᵀ with R upper triangular, so U = R⁻¹ and U_ii = 1 / R_ii; R with unit diagonal has U_ij / U_ii for inverse.
    unit = torch.eye(len(pivots), dtype=upper.dtype, device=upper.device)
    steps = torch.linalg.solve_triangular(upper / pivots, unit, upper=True, unitriangular=True)
    return Factor(order, steps.to(dtype), (1.0 / pivots).to(dtype), dead)


def _upper_root(hessian: Tensor, diagonal: Tensor, damping: float, names: str) -> Tensor:
    """R [in, in] upper triangular with RRᵀ = H + damping · mean(diagonal) · I; more damping where that has no root."""
    # The Cholesky factor of H with rows and columns reversed, reversed back, is upper triangular.
    turned, turned_diagonal = hessian.flip(0, 1), diagonal.flip(0)
    while damping <= _MOST_DAMPING:
        turned.diagonal().copy_(turned_diagonal + damping * diagonal.mean())
        root, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            return root.flip(0, 1)
        damping = max(10.0 * damping, 1e-4)
    raise ValueError(
        f"{names}: the calibration statistics (H = XᵀX) are singular even with damping {_MOST_DAMPING:g}: calibrate"
        " again with more sequences, or use methods without statistics (magnitude, rtn)"
    )
