"""What is measured of one layer where a recipe's strength follows from a look at all layers. Torch-free, JSON-able.

Everything is measured per *structure* (a recipe's ``structure.name``, empty without one), because weights that a
structure removes are neither pruned nor rounded.
"""

import base64
import zlib

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from compression.config import Bits
from compression.recipe import Quantization, Recipe
from parallelism.options import Options

SPARSITIES: tuple[float, ...] = tuple(step / 100 for step in range(96))
"""Where the error of pruning is measured. No matrix loses more than the last of them."""
WIDTHS: tuple[Bits, ...] = (2, 3, 4, 6, 8)
"""Where the error of rounding is measured."""
HIGH_BINS, LOW_BINS = 1 << 15, 1 << 16
"""Values of the upper 16 bits of a float32 without its sign bit, and of the lower 16."""

Counts = NDArray[np.int64]


class MatrixMeasures(Options):
    """One linear layer: error of its output relative to the output, ‖ΔW X‖² / ‖W X‖²."""

    weights: PositiveInt
    pruned: tuple[float, ...] = ()
    """At each of :data:`SPARSITIES`; empty where no recipe asks."""
    rounded: dict[str, tuple[float, ...]] = Field(default={})
    """Format (:func:`format_name`) → at each of :data:`WIDTHS`."""


class LayerMeasures(Options):
    """One layer. ``inputs`` hashes what it was measured on."""

    layer: NonNegativeInt
    influence: float | None
    """1 - mean cos(hidden state before the layer, after it); None without statistics."""
    matrices: dict[str, dict[str, MatrixMeasures]]
    """Structure → linear layer (``attention.q``) → its measures."""
    magnitudes: dict[str, str] = Field(default={})
    """Structure → packed counts [:data:`HIGH_BINS`] of the layer's weights by the upper half of |w|'s float32."""
    inputs: str = ""


class BinCounts(Options):
    """The weights of one linear layer seen from one bin of magnitudes."""

    below: NonNegativeInt
    """Weights in lower bins."""
    inside: str
    """Packed counts [:data:`LOW_BINS`] of those in the bin, by the lower half of |w|'s float32."""


class LayerCounts(Options):
    """One layer's magnitudes, looked at more closely in the bins where a global threshold lies."""

    layer: NonNegativeInt
    bins: dict[str, dict[int, dict[str, BinCounts]]]
    """Structure → bin → linear layer → its counts."""
    inputs: str = ""


def pack_counts(counts: Counts) -> str:
    """Counts below 2³² as text, compressed."""
    return base64.b64encode(zlib.compress(counts.astype("<u4").tobytes(), 9)).decode()


def unpack_counts(text: str) -> Counts:
    """The inverse of :func:`pack_counts`, int64."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<u4").astype(np.int64)


def structure_name(recipe: Recipe) -> str:
    """Under which the recipe's measures stand."""
    return recipe.structure.name if recipe.structure else ""


def prunes_globally(recipe: Recipe) -> bool:
    """Whether it needs the magnitudes of all layers."""
    return recipe.prune is not None and recipe.prune.allocated and recipe.prune.scope == "global"


def format_name(quantization: Quantization) -> str:
    """What besides the bits decides how far rounding goes wrong: ``g64``, ``channel-asym``."""
    group = f"g{quantization.group_size}" if quantization.group_size else "channel"
    return group if quantization.symmetric else f"{group}-asym"
