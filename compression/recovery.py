"""What recovering a compressed variant asks of its training. Torch-free."""

from collections.abc import Collection, Mapping
from typing import Any

from compression.config import RecoverConfig
from compression.recipe import Quantization, Recipe, Strength
from parallelism.start import Rounding, StartPoint

ROUND_WEIGHT = "compression.rounding:round_weight"


def start_point(
    recipe: Recipe,
    weights: str,
    recover: RecoverConfig,
    *,
    teacher: str | None = None,
    strengths: Mapping[str, Strength] | None = None,
    removed: Collection[int] = (),
) -> StartPoint:
    """Where the recovery of ``recipe`` begins: at the checkpoint ``weights``; where it prunes, zeros are held.

    Quantisation-aware training rounds by itself, so that ``weights`` should not be rounded yet: those of the recipe
    without its quantisation. ``teacher`` is the dense parent's checkpoint, used where ``recover`` asks for
    distillation. ``strengths`` are what was allocated to the recipe's matrices, and ``removed`` the layers it leaves
    out, both numbered as in the dense model.
    """
    aware = recover.quantization_aware and recipe.quantize is not None
    return StartPoint(
        weights=weights,
        hold_zeros=recipe.prune is not None,
        rounding=rounding_of(recipe.quantize, strengths, removed) if aware and recipe.quantize else None,
        teacher=teacher if recover.distill else None,
    )


def rounding_of(
    quantize: Quantization, strengths: Mapping[str, Strength] | None = None, removed: Collection[int] = ()
) -> Rounding:
    """How training sees matrices that are rounded to nearest by ``quantize`` in the end, each at its own width."""
    arguments: dict[str, Any] = {"symmetric": quantize.symmetric, "number": quantize.number}
    if quantize.bits is not None:
        arguments["bits"] = quantize.bits
        return Rounding(function=ROUND_WEIGHT, group_size=quantize.group_size, arguments=arguments)
    assert strengths is not None, "widths are allocated before"
    own = {
        _renumbered(matrix, removed): {"bits": strength.bits}
        for matrix, strength in strengths.items()
        if int(matrix.split(".")[1]) not in removed
    }
    return Rounding(function=ROUND_WEIGHT, group_size=quantize.group_size, arguments=arguments, by_matrix=own)


def _renumbered(matrix: str, removed: Collection[int]) -> str:
    """``layers.3.attention.q`` of the dense model, in the model without the removed layers."""
    prefix, layer, name = matrix.split(".", 2)
    return f"{prefix}.{int(layer) - sum(gone < int(layer) for gone in removed)}.{name}"
