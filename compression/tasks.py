"""What a cluster runs: plain functions whose arguments and results are JSON-able or paths.

A task is one (candidate, layer), all recipes: it reads one layer of the sharded checkpoint and commits one compact file
per recipe, so that a killed worker loses one layer at most. Every task may be run again at any time: what is
committed is not made twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from compression import compact
from compression.checks import check_names, check_recipes
from compression.compact import CompactFile, CompactPart
from compression.evaluation import held_out_sequences, tally
from compression.export import export
from compression.recipe import Recipe
from compression.results import LayerResult, MatrixFacts, Part, Quality, VariantFile
from compression.solve import solve_layer, solve_outer
from compression.verification import verify
from compression.workspace import Workspace, inputs_hash
from parallelism.checkpoint_store import read_info
from parallelism.data.batches import TokenBatches
from parallelism.layer_reader import CheckpointWeights

__all__ = [
    "assemble",
    "compress_layer",
    "compress_outer",
    "evaluate",
    "evaluate_checkpoint",
    "export",
    "read_variant",
    "verify",
]


@dataclass(frozen=True)
class _Solved:
    """A file to write and the recipes it serves."""

    stem: str
    content: CompactPart
    facts: MatrixFacts
    recipes: Sequence[Recipe]


def compress_layer(
    checkpoint: str, layer: int, recipes: list[Recipe], out: str, *, device: str | None = None
) -> LayerResult:
    """Compress one layer by every recipe and commit it below ``out``; committed already, it is not done again.

    Raises ``ValueError`` for a damaged checkpoint, weights that are not finite, or recipes that do not fit the layer.
    """

    def solve(weights: CheckpointWeights) -> list[_Solved]:
        check_recipes(weights.config, recipes)
        tensors = weights.layer(layer)
        _check_finite(tensors, f"layer {layer}, ")
        solved = solve_layer(f"layers.{layer}.", tensors, recipes)
        return [
            _Solved(recipe.name, content, facts, [recipe])
            for recipe, (content, facts) in zip(recipes, solved, strict=True)
        ]

    return _commit(checkpoint, layer, recipes, out, device, solve)


def compress_outer(checkpoint: str, recipes: list[Recipe], out: str, *, device: str | None = None) -> LayerResult:
    """The same for embeddings, final norm and output layer. Recipes of equal ``embedding_bits`` share a file."""

    def solve(weights: CheckpointWeights) -> list[_Solved]:
        tensors = weights.outer()
        _check_finite(tensors, "")
        return [
            _Solved(
                f"embedding{bits}",
                solve_outer(tensors, bits),
                MatrixFacts(),
                [recipe for recipe in recipes if recipe.embedding_bits == bits],
            )
            for bits in sorted({recipe.embedding_bits for recipe in recipes})
        ]

    return _commit(checkpoint, None, recipes, out, device, solve)


def assemble(checkpoint: str, recipe: Recipe, out: str) -> VariantFile:
    """Put a recipe's committed layers together into the variant's compact file.

    Raises ``ValueError`` where a layer has not been committed, or not of the same inputs as the rest.
    """
    workspace, info = Workspace(out), read_info(checkpoint)
    results = [workspace.require(index) for index in (None, *range(info.model.layers))]
    if len({result.inputs for result in results}) > 1:
        raise ValueError(f"{out} holds layers of different grids or checkpoints: compress the layers again")
    parts = [result.part(recipe) for result in results]
    linear = sum((part.facts for part in parts), MatrixFacts())
    facts = {
        "model": info.model.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "trained": asdict(info.progress),
        "inputs": results[0].inputs,
        "sparsity": linear.sparsity,
        "relative_error": linear.relative_error,
    }
    files = [workspace.layer(result.layer) / part.file for result, part in zip(results, parts, strict=True)]
    path = workspace.variant(recipe)
    compact.assemble(files, facts, path)
    return read_variant(str(path))


def read_variant(path: str) -> VariantFile:
    """What a compact file says about itself. Raises ``ValueError`` where it is damaged."""
    file = CompactFile(path)
    return VariantFile(
        name=file.recipe.name,
        recipe=file.recipe,
        path=path,
        bytes=file.file.bytes,
        parameters=file.parameters,
        bits_per_parameter=8 * file.file.bytes / file.parameters,
        sparsity=file.facts["sparsity"],
        relative_error=file.facts["relative_error"],
    )


def evaluate(
    variants: list[str],
    data_dir: str,
    sequence_length: int,
    tokens: int,
    seed: int,
    *,
    device: str | None = None,
) -> list[Quality]:
    """Measure variants (paths of compact files) on ``tokens`` held-out tokens, all in one pass over the layers.

    The sequences are those at positions 0, 1, … of the validation split's order for ``seed``; whole sequences only, at
    least one, and no sequence twice.
    """
    place = default_device(device)
    models = [CompactFile(path, place) for path in variants]
    text = TokenBatches(data_dir, "validation", sequence_length, seed)
    totals = tally(models, text.rows, held_out_sequences(text, tokens), device=place)
    bytes_per_token = text.prepared.bytes_per_token
    return [total.quality(model.recipe.name, bytes_per_token) for model, total in zip(models, totals, strict=True)]


def evaluate_checkpoint(
    checkpoint: str, data_dir: str, sequence_length: int, tokens: int, seed: int, *, device: str | None = None
) -> Quality:
    """The same for a checkpoint's own weights, before anything is stored in fewer bits."""
    place = default_device(device)
    text = TokenBatches(data_dir, "validation", sequence_length, seed)
    (total,) = tally([CheckpointWeights(checkpoint, place)], text.rows, held_out_sequences(text, tokens), device=place)
    return total.quality("checkpoint", text.prepared.bytes_per_token)


def default_device(wanted: str | None) -> torch.device:
    """The device asked for; else the GPU where there is one."""
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def _commit(
    checkpoint: str,
    layer: int | None,
    recipes: list[Recipe],
    out: str,
    device: str | None,
    solve: Callable[[CheckpointWeights], list[_Solved]],
) -> LayerResult:
    """What is committed for these inputs, or else what ``solve`` makes, written and committed."""
    check_names(recipes)
    workspace, inputs = Workspace(out), inputs_hash(checkpoint, recipes)
    done = workspace.committed(layer, inputs)
    if done is not None:
        return done
    start = time.monotonic()
    with torch.inference_mode():
        solved = solve(CheckpointWeights(checkpoint, default_device(device)))
    parts = []
    for item in solved:
        name = f"{item.stem}.{inputs[:12]}.safetensors"
        size = item.content.write(workspace.layer(layer) / name)
        parts += [Part(recipe=recipe, file=name, bytes=size, facts=item.facts) for recipe in item.recipes]
    result = LayerResult(layer=layer, inputs=inputs, parts=parts, seconds=time.monotonic() - start)
    workspace.commit(result)
    return result


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ValueError(
                f"{where}{name}: {bad} of {tensor.numel()} weights are not finite: the training diverged; compress an"
                " earlier checkpoint"
            )
