"""What a method is. A new one is a file beside this one and a line in :mod:`compression.registry`.

A method sees one matrix and *all* recipes of the grid that use it, so that whatever they share (a sort, a
factorisation, a column loop) is done once. It holds no state and touches no files.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from compression.matrix import Quantized
from compression.recipe import Pruning, Quantization, Recipe


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What calibration knows of the inputs X [rows, in] that one or several linear layers share (contract 5)."""

    hessian: Tensor
    """H = XᵀX [in, in] float32."""
    rows: int
    absmax: Tensor
    """Largest |x| of every column [in] float32."""
    mean_abs: Tensor
    """Mean |x| of every column [in] float32."""
    damping: float = 0.01
    """Added to the diagonal of H, times its mean, before it is inverted."""
    factors: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What methods have computed from H, such as its factorisation: once for all recipes that need it."""


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of one layer."""

    inputs: Mapping[str, InputStatistics]
    """Linear layer (``attention.q``) → its inputs; linear layers with the same inputs share one object."""
    influence: float
    """1 - mean cos(hidden state before the layer, after it), 0 to 2: small for a layer that changes little."""


@dataclass(frozen=True)
class Pruned:
    """One recipe's result: ``weight`` [out, in] float32, zero wherever ``mask`` [out, in] bool is False."""

    weight: Tensor
    mask: Tensor


class Pruner(Protocol):
    """A pruning method that looks at one matrix as it is."""

    def __call__(self, weight: Tensor, recipes: Sequence[Pruning], statistics: InputStatistics | None) -> list[Pruned]:
        """One result per recipe for ``weight`` [out, in] float32, which is left as it is."""


class Quantizer(Protocol):
    """A quantisation method that looks at one matrix as it is."""

    def __call__(
        self,
        weights: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        recipes: Sequence[Quantization],
        statistics: InputStatistics | None,
    ) -> list[Quantized]:
        """One result per recipe: recipe *i* quantises ``weights[i]`` [out, in] float32 pruned by ``masks[i]``.

        Recipes that start from the same weights are given the same tensor object. A pruned weight stays exactly zero.
        """


class Rescaler(Protocol):
    """Moves scale between neighbouring operations of a layer, before it is quantised, without changing its output."""

    def __call__(
        self, config: Any, weights: Mapping[str, Tensor], statistics: LayerStatistics, recipe: Recipe
    ) -> tuple[dict[str, Tensor], LayerStatistics]:
        """One layer (canonical name → float32 tensor) and its statistics, both rescaled for ``recipe``."""
