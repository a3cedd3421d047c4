"""Training that begins with given weights: a finetune, or the recovery of a compressed model. Torch-free."""

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from parallelism.layout import Layout
from parallelism.models.base import Anatomy, ModelConfig
from parallelism.options import Options
from parallelism.registry import FAMILIES, load


class Rounding(Options):
    """Quantisation-aware training: the linear weights of layers compute as rounded, the latent ones are trained.

    ``function`` is called as ``function(weight, group_size=…, **arguments)`` for every matrix [out, in] float32 and
    returns, as a new tensor, what it is rounded to.
    """

    function: str = Field(description="dotted path, such as compression.rounding:round_weight")
    group_size: PositiveInt | None = Field(
        default=None, description="columns of a row that are rounded together; none: the whole row"
    )
    arguments: dict[str, Any] = Field(default={}, description="of every matrix; JSON-able")
    by_matrix: dict[str, dict[str, Any]] = Field(
        default={}, description="matrix (layers.3.attention.q) → arguments of its own, over the common ones"
    )


class StartPoint(Options):
    """Where a training begins, and what it has to keep and to follow."""

    weights: str = Field(description="a complete checkpoint's directory; its optimizer, if any, is not used")
    hold_zeros: bool = Field(default=False, description="linear weights of layers that are zero stay exactly zero")
    rounding: Rounding | None = None
    teacher: str | None = Field(default=None, description="the checkpoint of a model to learn from")
    distill_weight: float = Field(default=0.5, ge=0.0, le=1.0, description="of the teacher's part in the loss")
    temperature: PositiveFloat = Field(default=1.0, description="both models' logits are divided by it")


def check_start(start: StartPoint | None, model: ModelConfig, layout: Layout) -> None:
    """Raise ``ValueError`` for a start point that this model cannot have at this layout; opens no files."""
    if start is None:
        return
    if layout.engine == "deepspeed":
        raise ValueError(
            "start: engine deepspeed neither holds zeros nor rounds, distils or begins with weights alone; set"
            " layout.engine: megatron, or lean"
        )
    if start.rounding is not None:
        _check_rounding(start.rounding, model, layout)


def _check_rounding(rounding: Rounding, model: ModelConfig, layout: Layout) -> None:
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in model.parameter_shapes().items()
        if name.startswith("layers.") and len(shape) == 2
    }
    unknown = sorted(rounding.by_matrix.keys() - shapes.keys())
    if unknown:
        raise ValueError(f"start.rounding.by_matrix names {unknown[0]}, which the model does not have")
    readers = _readers(model) if layout.tensor > 1 else frozenset[str]()
    for name, (_, columns) in shapes.items():
        divided = name.split(".", 2)[2] in readers
        local, group = columns // layout.tensor if divided else columns, rounding.group_size or columns
        if local % group == 0:
            continue
        where = f"the {local} of its {columns} columns that each of {layout.tensor} tensor-parallel ranks holds"
        raise ValueError(
            f"start.rounding.group_size {rounding.group_size}: {name} is rounded by {group} columns, which do not "
            f"divide {where if divided else f'its {columns} columns'}: "
            + (f"set layout.tensor: 1, or a group_size that divides {local}" if divided else "use a divisor")
        )


def _readers(model: ModelConfig) -> frozenset[str]:
    """Linear layers whose columns are divided over tensor-parallel ranks: they read what divided ones make."""
    dotted = FAMILIES[model.family].anatomy
    if dotted is None:
        raise ValueError(
            f"start.rounding: models of family {model.family} do not say which weights tensor-parallel ranks divide; "
            "set layout.tensor: 1"
        )
    anatomy: Anatomy = load(dotted)
    return frozenset(units.reader for units in anatomy.units(model))
