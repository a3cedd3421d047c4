"""Everything that is solved column by column with the inverse of H: one loop for all jobs that share their inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compression.matrix import Quantized
from compression.methods.base import InputStatistics
from compression.recipe import Pruning, Quantization


@dataclass(frozen=True, eq=False)
class ColumnJob:
    """One matrix under one recipe: at least one of ``prune`` and ``quantize`` is given.

    ``weight`` [out, in] float32. ``mask`` [out, in] bool is what another method has pruned already, and is kept.
    """

    name: str
    weight: Tensor
    mask: Tensor | None
    prune: Pruning | None
    quantize: Quantization | None


@dataclass(frozen=True, eq=False)
class ColumnResult:
    """``weight`` [out, in] float32, zero where ``mask`` is False, and its codes where it was quantised."""

    weight: Tensor
    mask: Tensor | None
    quantized: Quantized | None


def solve_columns(jobs: Sequence[ColumnJob], statistics: InputStatistics) -> list[ColumnResult]:
    """One result per job, in one loop over the columns."""
    raise AssertionError("no method is solved by columns yet")
