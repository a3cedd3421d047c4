"""Whether a grid of recipes fits a model. Torch-free: specs are checked with it before anything starts."""

from collections.abc import Iterable, Mapping

from compression.recipe import Recipe
from compression.reduced import anatomy, reduced_config
from compression.registry import QUANTIZATION
from compression.results import ExportFormat
from compression.sizes import check_target
from parallelism.models.base import ModelConfig
from parallelism.models.gpt.config import GPTConfig

CONV1D = "compressed-tensors holds nn.Linear only, and GPT-2's layers in Transformers are Conv1D"
"""Why GPT-2 cannot be exported with its codes."""


def check_recipes(config: ModelConfig, recipes: Iterable[Recipe]) -> None:
    """Raise ``ValueError`` where a recipe cannot be applied to the model's linear layers, as far as they are left."""
    for recipe in recipes:
        if recipe.quantize and QUANTIZATION[recipe.quantize.method].rescaler:
            anatomy(config)
        left = linear_shapes(reduced_config(config, recipe.structure))
        check_shapes(recipe, left)
        check_target(config, recipe, left)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Linear layers' weights of the whole model (``layers.3.attention.q.weight``) → (out, in)."""
    return {
        name: (shape[0], shape[1])
        for name, shape in config.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2
    }


def check_shapes(recipe: Recipe, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise ``ValueError`` where the recipe's groups do not divide the columns of a matrix (name → (out, in))."""
    group = recipe.quantize.group_size if recipe.quantize else None
    after = f" after {recipe.structure.name}" if recipe.structure else ""
    for name, (_, columns) in shapes.items():
        if group and columns % group:
            raise ValueError(
                f"quantize.group_size {group} does not divide the {columns} columns of {name}{after}: use a divisor of"
                f" {columns}, or leave group_size out for one scale per output channel"
            )


def check_names(recipes: Iterable[Recipe]) -> None:
    """Raise ``ValueError`` where two recipes of a grid would write the same files."""
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the grid holds {', '.join(twice)} twice: name every method and strength once")


def check_exportable(config: ModelConfig, export_format: ExportFormat = "auto") -> None:
    """Raise ``ValueError`` for a model that Hugging Face Transformers has no class for, or not in this format."""
    if not isinstance(config, GPTConfig):
        raise ValueError(f"export: models of family {config.family} cannot be exported: set export.variants to none")
    if config.style == "gpt2" and (
        config.query_groups != config.heads or config.heads * config.channels != config.hidden
    ):
        raise ValueError(
            f"export: GPT-2 in Transformers has as many kv_heads as heads ({config.heads}) and heads of hidden / heads"
            f" channels, not kv_heads {config.query_groups} and head_dim {config.channels}: leave kv_heads and head_dim"
            " out, use style llama, or set export.variants to none"
        )
    if config.style == "gpt2" and export_format == "compressed-tensors":
        raise ValueError(f"export: {CONV1D}: set export.format to auto or safetensors")


def check_exports(config: ModelConfig, recipes: Iterable[Recipe], export_format: ExportFormat) -> None:
    """The same for every model that the recipes leave."""
    check_exportable(config, export_format)
    for recipe in recipes:
        if recipe.structure is not None:
            try:
                check_exportable(reduced_config(config, recipe.structure), export_format)
            except ValueError as error:
                raise ValueError(f"recipe {recipe.name}: {error}, or leave structure.heads out") from None
