"""How many bytes a compact file will have, before it is made. Torch-free; never less than the file has in the end.

Also what calibration writes of a layer.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence

from compression.config import Bits, pattern_of
from compression.errors import RecipeError
from compression.measures import WIDTHS
from compression.recipe import Pruning, Quantization, Recipe
from compression.reduced import anatomy, reduced_config
from parallelism.models.base import ModelConfig
from parallelism.registry import FAMILIES

HEADER_FACTS = 1024
"""Of the header: what is neither about a tensor nor the model's and the recipe's description."""
HEADER_TENSOR = 90
"""Of the header, for one tensor: type, shape and byte range, its name left out."""
HEADER_MATRIX = 105
"""Of the header, for one matrix: how it is encoded, its name left out."""
PADDED = ("embedding.tokens", "output.weight")
"""Their rows are the vocabulary's; files hold them without padding."""


def packed(count: int, bits: int) -> int:
    """Bytes of ``count`` codes of ``bits`` bits without gaps."""
    return -(-count * bits // 8)


def matrix_bytes(shape: tuple[int, int], bits: int, quantization: Quantization, kept: int | None = None) -> int:
    """A quantised matrix [out, in]: codes, scales (2 bytes each), zero points, and the mask where only the ``kept``
    weights' codes are stored because that is smaller."""
    rows, columns = shape
    codes = packed(rows * columns, bits)
    if kept is not None:
        codes = min(codes, packed(rows * columns, 1) + packed(kept, bits))
    groups = rows * (columns // (quantization.group_size or columns))
    return codes + 2 * groups + (0 if quantization.symmetric else packed(groups, bits))


def kept_weights(shape: tuple[int, int], prune: Pruning, sparsity: float | None = None) -> int:
    """Weights that stay at most; methods that prune by rows round in every row. ``sparsity``: if not the recipe's."""
    rows, columns = shape
    if prune.pattern:
        kept, width = pattern_of(prune.pattern)
        return rows * min(columns, math.ceil(columns / width) * kept)
    share = prune.sparsity if sparsity is None else sparsity
    return min(rows * columns, rows * columns - math.floor(share * rows * columns) + rows)


def fixed_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Everything but the linear layers' codes, scales and masks: embeddings, norms, biases, the header.

    ``config`` is of the dense model. Outside the layers, matrices have ``embedding_bits`` and a scale per row; what is
    no matrix is bfloat16.
    """
    left = reduced_config(config, recipe.structure)
    descriptions = json.dumps([left.model_dump(mode="json"), recipe.model_dump(mode="json")])
    total = HEADER_FACTS + len(descriptions) + descriptions.count('"')  # quotes are escaped in the header
    for name, shape in left.parameter_shapes().items():
        if len(shape) != 2:
            total += _header_bytes(name) + 2 * math.prod(shape)
        elif name.startswith("layers."):
            total += _header_bytes(name, ["values", "scales", *_more_tensors(recipe)])
        else:
            rows = left.vocab_size if name in PADDED else shape[0]
            total += _outer_bytes(rows, shape[1], recipe.embedding_bits) + _header_bytes(name, ["values", "scales"])
    return total


def target_problems(
    config: ModelConfig, recipe: Recipe, shapes: Mapping[str, tuple[int, int]]
) -> Iterator[RecipeError]:
    """Whether ``quantize.target_bytes`` cannot be met at any width.

    ``shapes``: the linear layers that are left of the model, name → (out, in).
    """
    quantize = recipe.quantize
    if quantize is None or quantize.target_bytes is None:
        return
    fixed, least = fixed_bytes(config, recipe), min(WIDTHS)
    smallest = fixed + sum(matrix_bytes(shape, least, quantize, _kept(recipe, shape)) for shape in shapes.values())
    if smallest > quantize.target_bytes:
        problem = (
            f"is less than {smallest}, the size at {least} bits everywhere ({fixed} of it embeddings, norms and header)"
        )
        hint = "raise it, or lower quantize.embedding_bits"
        yield RecipeError("quantize.target_bytes", quantize.target_bytes, problem, hint)


def cost_in_bytes(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]], sparsities: Mapping[str, float]
) -> dict[str, dict[Bits, int]]:
    """Linear layer → width → bytes; ``sparsities`` are those that were allocated."""
    assert recipe.quantize is not None
    quantize = recipe.quantize
    return {
        name: {bits: matrix_bytes(shape, bits, quantize, _kept(recipe, shape, sparsities.get(name))) for bits in WIDTHS}
        for name, shape in shapes.items()
    }


def statistics_bytes(config: ModelConfig) -> int:
    """What one shard's sums of one layer take (:class:`compression.calibration.Gathered`).

    H, Σ|x| and max |x| in float32 of every input that a linear layer, or several of them together, take in.
    """
    shapes = config.model_copy(update={"layers": 1}).parameter_shapes()
    prefix = "layers.0."
    widths = {
        name.removeprefix(prefix).removesuffix(".weight"): shape[1]
        for name, shape in shapes.items()
        if name.startswith(prefix) and len(shape) == 2
    }
    folds = anatomy(config).folds(config) if FAMILIES[config.family].anatomy else ()
    sharing = {reader for fold in folds for reader in fold.readers[1:]}
    distinct = [width for name, width in widths.items() if name not in sharing]
    return HEADER_FACTS + sum(4 * (width * width + 2 * width) + 3 * HEADER_MATRIX for width in distinct)


def _kept(recipe: Recipe, shape: tuple[int, int], sparsity: float | None = None) -> int | None:
    if recipe.prune is None:
        return None
    return kept_weights(shape, recipe.prune, sparsity)


def _outer_bytes(rows: int, columns: int, bits: int) -> int:
    return 2 * rows * columns if bits == 16 else packed(rows * columns, bits) + 2 * rows


def _more_tensors(recipe: Recipe) -> list[str]:
    """What may be stored of a linear layer besides codes and scales."""
    zeros = recipe.quantize is not None and not recipe.quantize.symmetric
    return ["zeros"] * zeros + ["mask"] * (recipe.prune is not None)


def _header_bytes(name: str, parts: Sequence[str] = ()) -> int:
    """A vector, or a matrix that is stored in ``parts``."""
    if not parts:
        return len(name) + HEADER_TENSOR
    return sum(len(f"{name}:{part}") + HEADER_TENSOR for part in parts) + len(name) + HEADER_MATRIX
