"""Activations in eight bits: what an inference engine does to the inputs of linear layers at run time.

Dynamic, symmetric, each token by itself, as compressed-tensors defines its ``token`` strategy, so that what is
evaluated here is what a loaded export computes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compression.config import Number
from compression.recipe import Recipe

FP8 = torch.float8_e4m3fn


def round_int8(inputs: Tensor) -> Tensor:
    """Inputs [..., in] on the 256 levels of their row: x' = s · clamp(round(x / s), -128, 127), s = max|x| / 127.5."""
    scales = _scales(inputs, 127.5)
    return (inputs / scales).round().clamp(-128, 127) * scales


def round_fp8(inputs: Tensor) -> Tensor:
    """Inputs [..., in] as e4m3 numbers (Micikevicius et al. 2022) times their row's s = max|x| / 448."""
    largest = torch.finfo(FP8).max
    scales = _scales(inputs, largest)
    return (inputs / scales).clamp(-largest, largest).to(FP8).to(inputs.dtype) * scales


ROUNDING: Mapping[Number, Callable[[Tensor], Tensor]] = {"int": round_int8, "fp8": round_fp8}


class RoundedInputs:
    """An observer (:data:`parallelism.models.base.Observer`) that puts rounded inputs in the place of the exact ones.

    Neighbours that take the same tensor get the same rounded one.
    """

    def __init__(self, number: Number) -> None:
        self._round = ROUNDING[number]
        self._last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "RoundedInputs | None":
        """What a recipe does to the inputs of its linear layers, if anything."""
        quantization = recipe.quantize
        return cls(quantization.number) if quantization and quantization.activation_bits == 8 else None

    def __call__(self, name: str, inputs: Tensor) -> Tensor:
        """The rounded input [..., in] of one linear layer."""
        if self._last is None or self._last[0] is not inputs:
            self._last = (inputs, self._round(inputs))
        return self._last[1]


def _scales(inputs: Tensor, levels: float) -> Tensor:
    """One scale per row [..., 1]; 1 for a row of zeros."""
    largest = inputs.abs().amax(-1, keepdim=True)
    return torch.where(largest == 0.0, 1.0, largest / levels)
