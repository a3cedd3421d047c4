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
        """Levels for weights between ``low`` and ``high`` [...]: scales [...] as stored, zero codes [...] like ``low``.

        With N = 2^bits - 1 steps and m = max|w|. Symmetric: scale = 2m / N, zero = 2^(bits-1). Asymmetric (Jacob et
        al. 2018, eq. 1): scale = (max(w, 0) - min(w, 0)) / N, zero = round(-min(w, 0) / scale). FP8 (Micikevicius et
        al. 2022): scale = m / 448, no zero. Groups of zeros get scale 1.
        """
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        largest = torch.maximum(-low, high)
        if self.number == "fp8":
            return _stored(largest, torch.finfo(FP8_DTYPE).max), torch.zeros_like(low)
        steps = 2**self.bits - 1
        if self.symmetric:
            return _stored(2.0 * largest, steps), torch.full_like(low, 2 ** (self.bits - 1))
        scales = _stored(high - low, steps)
        return scales, (-low / scales.to(low.dtype)).round().clamp(0, steps)

    def bounds(self, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level [...] where the zero codes are ``zeros`` [...]."""
        if self.number == "fp8":
            largest = torch.full_like(zeros, torch.finfo(FP8_DTYPE).max)
            return -largest, largest
        return -zeros, 2**self.bits - 1 - zeros

    def round_(self, scaled: Tensor) -> Tensor:
        """Round weights over scales, which lie between the bounds, to levels in place; halves go to the even level."""
        return scaled.copy_(scaled.to(FP8_DTYPE)) if self.number == "fp8" else scaled.round_()

    def codes(self, levels: Tensor, zeros: Tensor) -> Tensor:
        """Levels as they are stored, uint8: distances from the lowest one, or the bytes of e4m3, its zero without sign.

        ``zeros`` broadcasts against ``levels``.
        """
        if self.number == "fp8":
            return (levels.to(torch.float32) + 0.0).to(FP8_DTYPE).view(torch.uint8)
        return (levels + zeros).to(torch.uint8)


def _stored(span: Tensor, steps: float) -> Tensor:
    """span / steps in the stored type, never zero and never infinite."""
    limits = torch.finfo(SCALE_DTYPE)
    scales = (span / steps).clamp(min=limits.smallest_normal * limits.eps, max=limits.max)
    return torch.where(span == 0.0, 1.0, scales).to(SCALE_DTYPE)
