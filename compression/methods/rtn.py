"""Round-to-nearest quantisation: every weight goes to the nearest level of its channel or group."""

from collections.abc import Sequence

from torch import Tensor

from compression.levels import Levels
from compression.matrix import Quantized
from compression.methods.base import InputStatistics
from compression.recipe import Quantization


def quantize(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    recipes: Sequence[Quantization],
    statistics: InputStatistics | None = None,
) -> list[Quantized]:
    """Round every matrix [out, in] by its own recipe. Zero is always a level, so pruned weights stay exactly zero."""
    return [
        round_to_levels(weight, Levels.of(recipe), recipe.group_size)
        for weight, recipe in zip(weights, recipes, strict=True)
    ]


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None, symmetric: bool = True) -> Quantized:
    """Integer codes for ``weight`` [out, in]: a scale per row, or per ``group_size`` columns (which must divide)."""
    return round_to_levels(weight, Levels(bits, symmetric), group_size)


def round_to_levels(weight: Tensor, levels: Levels, group_size: int | None = None) -> Quantized:
    """Codes for ``weight`` [out, in]: a scale per row, or per ``group_size`` columns of a row (which must divide)."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, group_size or columns)
    scales, zeros = levels.fit(*grouped.aminmax(dim=-1))
    rounded = levels.round(grouped / scales[..., None].to(weight.dtype), zeros[..., None])
    codes = levels.codes(rounded, zeros[..., None]).view(rows, columns)
    return Quantized(codes, scales, None if levels.symmetric else zeros.byte(), levels.bits, levels.number)
