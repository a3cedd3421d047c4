"""How strong a recipe is in every matrix, where that follows from a look at all layers. Torch-free."""

from compression.recipe import Allocations, Strengths


def strengths_of(allocations: Allocations | None, layer: int) -> Strengths:
    """The part of one layer: recipe's name → linear layer (``attention.q``) → its strength."""
    prefix = f"layers.{layer}."
    return {
        name: {matrix.removeprefix(prefix): strength for matrix, strength in row.items() if matrix.startswith(prefix)}
        for name, row in (allocations or {}).items()
    }
