"""The linear weights of decoder layers among an engine's parameters, matrix by matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import Parameter

from parallelism.engines.state import StoredParameter
from parallelism.layer_reader import LAYER_PREFIX, plain_family
from parallelism.models.base import ModelConfig, PlainFamily, StoredMatrix


@dataclass(frozen=True)
class LinearParameter:
    """A parameter of this rank that holds one or several linear matrices of a layer, or this rank's part of them."""

    stored: StoredParameter
    layer: int
    name: str
    """In the checkpoint, ``decoder.layers.{layer}.`` left off."""
    config: ModelConfig
    family: PlainFamily

    @property
    def parameter(self) -> Parameter:
        """The engine's parameter."""
        return self.stored.parameter

    def matrices(self, values: Tensor) -> list[StoredMatrix]:
        """Views of ``values``, of the parameter's shape, named like ``layers.3.attention.q``."""
        found = self.family.matrices(self.config, self.name, values)
        return [replace(matrix, name=f"layers.{self.layer}.{matrix.name}") for matrix in found]


def linear_parameters(config: ModelConfig, parameters: Sequence[StoredParameter]) -> list[LinearParameter]:
    """Those of ``parameters`` that hold linear matrices, in their order."""
    family, found = plain_family(config), []
    for stored in parameters:
        if not stored.key.startswith(LAYER_PREFIX) or stored.parameter.ndim != 2:
            continue
        layer, _, name = stored.key.removeprefix(LAYER_PREFIX).partition(".")
        linear = LinearParameter(stored, int(layer), name, config, family)
        if linear.matrices(stored.parameter.detach()):
            found.append(linear)
    return found
