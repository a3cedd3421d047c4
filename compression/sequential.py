"""``statistics: sequential``: every recipe's statistics come from its own compressed layers.

A recipe is a chain of steps, one per layer: the hidden states behind the recipe's compressed layers so far go through
the next dense layer, whose statistics they give; the layer is compressed; and the states go through the compressed
layer. It costs every recipe a calibration of its own, for the last bit of quality. Chains of different recipes are
independent. Each has a workspace of its own, so that a killed worker repeats one step at most.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compression.activations import RoundedInputs
from compression.calibration import CalibrationFiles, Gathered, embed, pass_through, write_states
from compression.evaluation import Rows, Weights
from compression.recipe import Recipe, Strengths
from compression.solve import Solved, solve_layer
from compression.structure import reduced_config
from parallelism import places
from parallelism.models.base import ModelConfig

SHARD = 0
"""All sequences of a chain are one shard: the chains themselves are what runs side by side."""


@dataclass(frozen=True)
class RecipeStart:
    """Where a chain begins: the embeddings as the recipe leaves them. The part of ``Weights`` that is needed."""

    config: ModelConfig
    outer: Callable[[], dict[str, Tensor]]

    def layer(self, index: int) -> dict[str, Tensor]:
        """Nobody asks for a layer."""
        raise AssertionError(f"layer {index} is the chain's own business")


@dataclass(frozen=True)
class Chain:
    """One recipe on its way through the layers of ``model``, calibrated on ``sequences`` of ``rows``."""

    model: Weights
    start: Weights
    rows: Rows
    sequences: int
    recipe: Recipe
    files: CalibrationFiles
    damping: float


def solve_next(chain: Chain, layer: int, strengths: Strengths) -> Solved:
    """Compress one layer; the steps before have to be done. Only :func:`advance` makes the step count."""
    states = _reached(chain.files)
    if not places.exists(states):
        embed(chain.start, chain.rows, range(chain.sequences), states)
    config, weights, gathered = chain.model.config, chain.model.layer(layer), Gathered()
    for _ in pass_through(config, weights, states, gathered, gathered.compare):
        pass
    (solved,) = solve_layer(config, weights, [chain.recipe], gathered.statistics(chain.damping), strengths)
    return solved


def advance(
    config: ModelConfig, layer: int, recipe: Recipe, weights: Mapping[str, Tensor], files: CalibrationFiles
) -> None:
    """Take the hidden states through the compressed layer (canonical name → tensor): the step is done.

    Where the recipe rounds activations, the layers to come are calibrated on what rounded ones lead to.
    """
    before = _reached(files)
    shape = tuple(np.load(places.need(before), mmap_mode="r").shape)
    with torch.inference_mode():
        reduced = reduced_config(config, recipe.as_solved.structure)
        outputs = pass_through(reduced, weights, before, RoundedInputs.of(recipe))
        write_states(files.hidden(layer + 1, SHARD), shape, outputs)
    places.remove(before)


def _reached(files: CalibrationFiles) -> Path:
    """The newest states: those before the next layer, or before the layers ahead of it that the recipe leaves out."""
    return files.hidden(files.reached(SHARD), SHARD)
