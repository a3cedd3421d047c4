"""What a method is. A new one is a file beside this one and a line in :mod:`compression.registry`.

A method sees one matrix and *all* recipes of the grid that use it, so that whatever they share (a sort, a
factorisation, a column loop) is done once. It holds no state and touches no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from compression.matrix import Quantized
from compression.recipe import Pruning, Quantization


@dataclass(frozen=True)
class LinearStatistics:
    """What calibration stores of one linear layer's inputs X [rows, in] (contract 5)."""

    hessian: Tensor
    """XᵀX [in, in] float32."""
    rows: int
    absmax: Tensor
    """Largest |x| of every column [in] float32."""
    mean_abs: Tensor
    """Mean |x| of every column [in] float32."""


@dataclass(frozen=True)
class Pruned:
    """One recipe's result: ``weight`` [out, in] float32, zero wherever ``mask`` [out, in] bool is False."""

    weight: Tensor
    mask: Tensor


class Pruner(Protocol):
    """A pruning method."""

    def __call__(self, weight: Tensor, recipes: Sequence[Pruning], statistics: LinearStatistics | None) -> list[Pruned]:
        """One result per recipe for ``weight`` [out, in] float32, which is left as it is."""


class Quantizer(Protocol):
    """A quantisation method."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        recipes: Sequence[Quantization],
        statistics: LinearStatistics | None,
    ) -> list[Quantized]:
        """One result per recipe: recipe *i* quantises ``weights[i]`` [out, in] float32 pruned by ``masks[i]``.

        Recipes that start from the same weights are given the same tensor object. A pruned weight stays exactly zero.
        """
