"""Quantisation-aware training with the straight-through estimator (Bengio et al. 2013, section 4)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from parallelism.engines.linear import LinearParameter
from parallelism.models.base import StoredMatrix
from parallelism.registry import load
from parallelism.start import Rounding


class Rounder:
    """Puts rounded values into the linear weights for a while, and the latent ones back.

    A forward and backward pass in between computes with the rounded weights W' = r(W); its gradient ∂L/∂W' is used for
    the latent W as if r were the identity. It costs a second copy of the linear weights as long as it lasts.
    """

    def __init__(self, rounding: Rounding, weights: Sequence[LinearParameter]) -> None:
        self._rounding = rounding
        self._function = load(rounding.function)
        self._weights = weights
        self._latent: dict[Parameter, Tensor] = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The weights are rounded inside, and bit for bit what they were afterwards unless :meth:`restore` came first.

        The parameters stay the same objects; optimizers that hold views of their memory see the latent values always.
        """
        for weight in self._weights:
            self._latent[weight.parameter] = weight.parameter.data
            weight.parameter.data = self._rounded(weight)
        try:
            yield
        finally:
            for parameter in list(self._latent):
                self.restore(parameter)

    def restore(self, parameter: Parameter) -> None:
        """Put the latent values back into one parameter, which is needed no more as rounded; others have none."""
        latent = self._latent.pop(parameter, None)
        if latent is not None:
            parameter.data = latent

    @torch.no_grad()
    def _rounded(self, weight: LinearParameter) -> Tensor:
        values = weight.parameter.detach().clone()
        for matrix in weight.matrices(values):
            matrix.view.copy_(self._round(matrix).view(matrix.view.shape))
        return values

    def _round(self, matrix: StoredMatrix) -> Tensor:
        """The matrix, or this rank's part of it, [out, in] float32, rounded."""
        rows = matrix.view.reshape(-1, matrix.view.shape[-1]).float()
        arguments = self._rounding.arguments | self._rounding.by_matrix.get(matrix.name, {})
        rounded: Tensor = self._function(rows, group_size=self._rounding.group_size, **arguments)
        return rounded
