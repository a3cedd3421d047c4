"""What training sees of a matrix that will be quantised: quantisation-aware recovery (:mod:`parallelism.start`)."""

from torch import Tensor

from compression.config import Number
from compression.levels import Levels
from compression.methods.rtn import round_to_levels


def round_weight(
    weight: Tensor, bits: int, group_size: int | None = None, symmetric: bool = True, number: Number = "int"
) -> Tensor:
    """``weight`` [out, in] float32 as it reads back after rounding to nearest, a new tensor of its shape.

    By the levels and the stored scales of :mod:`compression.methods.rtn`: quantising the trained weights with it in the
    end gives exactly what was trained. A row, or each ``group_size`` columns of it (which must divide), has its own
    scale; zeros stay exactly zero.
    """
    return round_to_levels(weight, Levels(bits, symmetric, number), group_size).dense()
