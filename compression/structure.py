"""Removing whole parts: key/value heads with their queries, feed-forward neurons, layers. What is left is smaller."""

from collections.abc import Mapping

from torch import Tensor

from compression.methods.base import LayerStatistics
from compression.recipe import Structure
from parallelism.models.base import ModelConfig


def reduced_layer(
    config: ModelConfig, weights: Mapping[str, Tensor], statistics: LayerStatistics, structure: Structure
) -> tuple[dict[str, Tensor], LayerStatistics]:
    """One layer (canonical name → float32 tensor) without the heads and neurons that ``structure`` removes."""
    raise AssertionError("structure is not carried out yet")


def reduced_config(config: ModelConfig, structure: Structure | None) -> ModelConfig:
    """The smaller model that is left."""
    assert structure is None, "structure is not carried out yet"
    return config
