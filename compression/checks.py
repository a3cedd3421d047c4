"""Whether a grid of recipes fits a model. Torch-free: specs are checked with it before anything starts."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from compression.config import CompressionConfig, pattern_of
from compression.errors import RecipeError
from compression.recipe import Pruning, Quantization, Recipe, grid
from compression.reduced import anatomy, reduced_config
from compression.registry import PRUNING, QUANTIZATION
from compression.results import ExportFormat
from compression.sizes import target_problems
from parallelism.models.base import ModelConfig
from parallelism.models.gpt.config import GPTConfig
from parallelism.suggest import remedy

GROUP_SIZES = (256, 128, 64, 32, 16, 8)
"""Those that are recommended where another one does not fit."""
CONV1D = "compressed-tensors holds nn.Linear only, and GPT-2's layers in Transformers are Conv1D"
"""Why GPT-2 cannot be exported with its codes."""


def check_recipes(config: ModelConfig, recipes: Iterable[Recipe]) -> None:
    """Raise :class:`RecipeError` for the first of :func:`recipe_problems`."""
    _raise_first(recipe_problems(config, list(recipes)))


def check_names(recipes: Iterable[Recipe]) -> None:
    """Raise :class:`RecipeError` where two recipes of a grid would write the same files."""
    _raise_first(_name_problems(recipes))


def check_matrix(prune: Pruning | None, quantize: Quantization | None, name: str, columns: int) -> None:
    """Raise :class:`RecipeError` where one matrix, called ``name``, cannot be pruned and quantised so."""
    _raise_first(_misfits(prune, quantize, {name: columns}, "", [columns]))


def _raise_first(problems: Iterator[RecipeError]) -> None:
    for problem in problems:
        raise problem


def grid_problems(config: CompressionConfig) -> Iterator[RecipeError]:
    """What is wrong with a grid, whatever the model: recipes of one name, names to recover that no recipe has."""
    recipes = grid(config)
    yield from _name_problems(recipes)
    names = [recipe.name for recipe in recipes if not recipe.recovered]
    wanted = config.recover.recipes if config.recover else []
    for place, name in enumerate([] if wanted == "all" else wanted):
        if name not in names:
            yield RecipeError(f"recover.recipes.{place}", name, "is no recipe of the grid", remedy(name, names))


def recipe_problems(config: ModelConfig, recipes: Sequence[Recipe]) -> Iterator[RecipeError]:
    """Why recipes cannot be applied to the model's linear layers, as far as these are left; a value is named once.

    Raises ``ValueError`` for a family whose parts cannot be removed or rescaled.
    """
    left = {recipe: linear_shapes(reduced_config(config, recipe.structure)) for recipe in recipes}
    widths = {columns for recipe, shapes in left.items() if recipe.quantize for _, columns in shapes.values()}
    told: set[tuple[str, object]] = set()
    for recipe, shapes in left.items():
        if recipe.quantize and QUANTIZATION[recipe.quantize.method].rescaler:
            anatomy(config)
        columns = {name: shape[1] for name, shape in shapes.items()}
        after = f" after {recipe.structure.name}" if recipe.structure else ""
        misfits = _misfits(recipe.prune, recipe.quantize, columns, after, widths)
        for problem in [*misfits, *target_problems(config, recipe, shapes)]:
            if (problem.field, problem.value) not in told:
                told.add((problem.field, problem.value))
                yield problem


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Linear layers' weights of the whole model (``layers.3.attention.q.weight``) → (out, in)."""
    return {
        name: (shape[0], shape[1])
        for name, shape in config.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2
    }


def _misfits(
    prune: Pruning | None,
    quantize: Quantization | None,
    columns: Mapping[str, int],
    after: str,
    widths: Collection[int],
) -> Iterator[RecipeError]:
    """Why matrices (name → columns), ``after`` something was removed, cannot be pruned and quantised so.

    Groups are recommended that divide all ``widths``.
    """
    group = quantize.group_size if quantize else None
    wrong = _undivided(columns, group)
    if wrong:
        problem = f"does not divide the {columns[wrong]} columns of {wrong}{after}"
        yield RecipeError("quantize.group_size", group, problem, _group_remedy(widths))
    pattern = prune.pattern if prune else None
    wrong = _undivided(columns, pattern_of(pattern)[1] if pattern else None)
    if wrong:
        problem = f"does not divide the {columns[wrong]} columns of {wrong}{after}"
        yield RecipeError("prune.patterns", pattern, problem, "use an n:m whose m divides the columns, or a sparsity")
    if pattern and prune and PRUNING[prune.method].by_columns and quantize and quantize.act_order:
        problem = f"solves columns apart from the neighbours among which {prune.method} chooses by pattern {pattern}"
        yield RecipeError("quantize.act_order", True, problem, "set act_order to false, or prune by another method")


def _undivided(columns: Mapping[str, int], step: int | None) -> str | None:
    """The first matrix (name → columns) whose columns ``step`` does not divide."""
    return next((name for name, count in columns.items() if step and count % step), None)


def _group_remedy(widths: Collection[int]) -> str:
    legal = [str(size) for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    use = f"use {', '.join(legal)}, or " if legal else ""
    return f"{use}leave it out for one scale per output channel"


def _name_problems(recipes: Iterable[Recipe]) -> Iterator[RecipeError]:
    """Two recipes of one name differ by less than a name tells."""
    first: dict[str, Recipe] = {}
    for recipe in recipes:
        known = first.setdefault(recipe.name, recipe)
        if known is not recipe:
            field, value = _difference(known, recipe)
            hint = "name every method and strength once"
            yield RecipeError(field, value, f"makes a second recipe called {recipe.name}", hint)


def _difference(one: Recipe, other: Recipe) -> tuple[str, object]:
    """The first field of a job file in which ``other`` is not as ``one``, and its value; empty where they are equal."""
    for part in ("structure", "prune", "quantize"):
        mine, its = getattr(one, part), getattr(other, part)
        if mine != its and mine is not None and its is not None:
            name = next(name for name in type(its).model_fields if getattr(mine, name) != getattr(its, name))
            return f"{part}.{'patterns' if name == 'pattern' else name}", getattr(its, name)
    return "", ""


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
