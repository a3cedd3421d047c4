"""Round-to-nearest quantisation: every weight goes to the nearest level of its channel or group."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compression.matrix import SCALE_DTYPE, Quantized
from compression.methods.base import InputStatistics
from compression.recipe import Quantization


def quantize(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    recipes: Sequence[Quantization],
    statistics: InputStatistics | None = None,
) -> list[Quantized]:
    """Round every matrix [out, in] by its own recipe. Zero is always a level, so pruned weights stay exactly zero."""
    return [_round(weight, recipe) for weight, recipe in zip(weights, recipes, strict=True)]


def _round(weight: Tensor, recipe: Quantization) -> Quantized:
    assert recipe.bits is not None, "widths are allocated before"
    return round_to_nearest(weight, recipe.bits, recipe.group_size, recipe.symmetric)


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None, symmetric: bool = True) -> Quantized:
    """Codes for ``weight`` [out, in]: a scale per row, or per ``group_size`` columns of a row (which must divide)."""
    rows, columns = weight.shape
    grouped = weight.view(rows, -1, group_size or columns)
    scales, zeros = scales_and_zeros(grouped, bits, symmetric)
    codes = codes_of(grouped, scales[..., None], zeros[..., None], bits)
    return Quantized(codes.view(rows, columns), scales, None if symmetric else zeros.to(torch.uint8), bits)


def scales_and_zeros(grouped: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Levels for weights [..., group]: scales [...] in the stored type, zero codes [...] float32.

    With N = 2^bits - 1 steps. Symmetric: scale = 2·max|w| / N, zero = 2^(bits-1). Asymmetric (Jacob et al. 2018,
    eq. 1): scale = (max(w, 0) - min(w, 0)) / N, zero = round(-min(w, 0) / scale). Groups of zeros get scale 1.
    """
    steps = 2**bits - 1
    if symmetric:
        span = 2.0 * grouped.abs().amax(-1)
    else:
        low = grouped.amin(-1).clamp(max=0.0)
        span = grouped.amax(-1).clamp(min=0.0) - low
    limits = torch.finfo(SCALE_DTYPE)
    scales = (span / steps).clamp(min=limits.smallest_normal * limits.eps, max=limits.max)
    scales = torch.where(span == 0.0, 1.0, scales).to(SCALE_DTYPE)
    if symmetric:
        return scales, torch.full_like(span, 2 ** (bits - 1))
    return scales, (-low / scales.float()).round().clamp(0, steps)


def codes_of(weights: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes of ``weights``, uint8 in their shape; halves go to the even level. Scales as stored."""
    return ((weights / scales.float()).round() + zeros).clamp(0, 2**bits - 1).to(torch.uint8)
