"""One made layer with what calibration would know of it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compression.calibration import Gathered
from compression.methods.base import LayerStatistics
from parallelism.models.gpt import plain
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made


@dataclass
class MadeLayer:
    """A layer, hidden states [B, S, D] before it, its output, and the statistics of its linear layers' inputs."""

    config: GPTConfig
    weights: dict[str, Tensor]
    hidden: Tensor
    statistics: LayerStatistics

    @property
    def output(self) -> Tensor:
        return plain.layer(self.config, self.weights, self.hidden)


def weights_of(config: GPTConfig, seed: int = 0) -> dict[str, Tensor]:
    whole = made.weights(config, seed)
    return {name.removeprefix("layers.0."): value for name, value in whole.items() if name.startswith("layers.0.")}


def layer(config: GPTConfig, weights: dict[str, Tensor] | None = None, *, seed: int = 0, rows: int = 20) -> MadeLayer:
    """Random hidden states with some large channels through ``weights``, or random ones."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 24, config.hidden, generator=generator)
    hidden *= torch.rand(config.hidden, generator=generator) * 3
    found, gathered = weights or weights_of(config, seed), Gathered()
    gathered.compare(hidden, plain.layer(config, found, hidden, gathered))
    return MadeLayer(config, found, hidden, gathered.statistics(damping=0.01))
