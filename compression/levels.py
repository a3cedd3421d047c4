"""Which numbers a code can stand for: integers between bounds, or FP8 e4m3, times the scale of their group.

A *level* is a weight divided by its scale and rounded. Zero is a level always, so that a pruned weight stays zero.
Round-to-nearest and the column solver share these rules, and so does reading a file back (:mod:`compression.matrix`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.config import Number
from compression.recipe import Quantization

SCALE_DTYPE = torch.float16
"""Scales are stored in this type, and codes are chosen for the scale as stored."""
FP8_DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True)
class Levels:
    """The levels of one recipe. FP8 has 8 bits and is symmetric."""

    bits: int
    symmetric: bool = True
    number: Number = "int"

    @classmethod
    def of(cls, recipe: Quantization) -> "Levels":
        """The levels that a (uniform) recipe asks for."""
        assert recipe.bits is not None, "widths are allocated before"
        return cls(recipe.bits, recipe.symmetric, recipe.number)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Levels for weights between ``low`` and ``high`` [...]: scales and zero codes [...], see :func:`fit`."""
        return fit(low, high, self.steps, self.symmetric, self.number)

    @property
    def steps(self) -> int:
        """Steps between the lowest and the highest code."""
        return 2**self.bits - 1

    def round(self, scaled: Tensor, zeros: Tensor) -> Tensor:
        """Weights over scales to the nearest levels, in place."""
        return round_(scaled.clamp_(*bounds(zeros, self.steps, self.number)), self.number)

    def codes(self, levels: Tensor, zeros: Tensor) -> Tensor:
        """Levels as they are stored, uint8: distances from the lowest one, or the bytes of e4m3, its zero without sign.

        ``zeros`` broadcasts against ``levels``, which is used up.
        """
        if self.number == "fp8":
            return levels.add_(0.0).to(FP8_DTYPE).view(torch.uint8)
        return levels.add_(zeros).to(torch.uint8)


def fit(low: Tensor, high: Tensor, steps: Tensor | float, symmetric: bool, number: Number) -> tuple[Tensor, Tensor]:
    """Levels for weights between ``low`` and ``high`` [...]: scales [...] as stored, zero codes [...] like ``low``.

    With N = 2^bits - 1 ``steps`` (one number, or one for each [...]) and m = max|w|. Symmetric: scale = 2m / N, zero =
    2^(bits-1). Asymmetric (Jacob et al. 2018, eq. 1): scale = (max(w, 0) - min(w, 0)) / N, zero = round(-min(w, 0) /
    scale). FP8 (Micikevicius et al. 2022): scale = m / 448, no zero. Groups of zeros get scale 1.
    """
    if number == "fp8":
        return _stored(torch.maximum(-low, high), torch.finfo(FP8_DTYPE).max), torch.zeros_like(low)
    if symmetric:
        return _stored(2.0 * torch.maximum(-low, high), steps), torch.zeros_like(low) + (steps + 1) / 2
    low = low.clamp(max=0.0)
    scales = _stored(high.clamp(min=0.0) - low, steps)
    return scales, torch.minimum((-low / scales.to(low.dtype)).round(), torch.zeros_like(low) + steps)


def bounds(zeros: Tensor, steps: Tensor | float, number: Number) -> tuple[Tensor, Tensor]:
    """The lowest and the highest level [...] where the zero codes are ``zeros`` [...]."""
    if number == "fp8":
        largest = torch.full_like(zeros, torch.finfo(FP8_DTYPE).max)
        return -largest, largest
    return -zeros, steps - zeros


def round_(scaled: Tensor, number: Number) -> Tensor:
    """Round weights over scales, which lie between the bounds, to levels in place; halves go to the even level."""
    return scaled.copy_(scaled.to(FP8_DTYPE)) if number == "fp8" else scaled.round_()


def _stored(span: Tensor, steps: Tensor | float) -> Tensor:
    """span / steps in the stored type, never zero and never infinite."""
    limits = torch.finfo(SCALE_DTYPE)
    scales = (span / steps).clamp(min=limits.smallest_normal * limits.eps, max=limits.max)
    return torch.where(span == 0.0, 1.0, scales).to(SCALE_DTYPE)
