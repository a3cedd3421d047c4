"""Removing whole parts of a layer: key/value heads with their queries, feed-forward neurons. What is left is smaller.

Which layers go whole is decided over all layers (:func:`compression.reduced.removed_layers`).
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compression.methods.base import InputStatistics, LayerStatistics
from compression.recipe import Structure
from compression.reduced import anatomy, kept_units, reduced_config, removed_layers
from parallelism.models.base import ModelConfig, Units

__all__ = ["reduced_config", "reduced_layer", "removed_layers"]


def reduced_layer(
    config: ModelConfig, weights: Mapping[str, Tensor], statistics: LayerStatistics, structure: Structure
) -> tuple[dict[str, Tensor], LayerStatistics]:
    """One layer (canonical name → float32 tensor) without the heads and neurons that ``structure`` removes.

    The units of least contribution go, and the columns that read the others are fitted anew to the dense output.
    Raises ``ValueError`` naming the linear layer where its statistics do not allow that.
    """
    weights, inputs = dict(weights), dict(statistics.inputs)
    for units in anatomy(config).units(config):
        count = kept_units(units, structure)
        if count == units.count or units.reader not in inputs:
            continue
        reader = f"{units.reader}.weight"
        known = inputs[units.reader]
        kept = strongest(contributions(weights[reader], known.hessian, units.width), count)
        columns = expand(kept, units.width)
        try:
            weights[reader] = refit(weights[reader], known.hessian, columns, known.damping)
        except torch.linalg.LinAlgError:
            raise ValueError(
                f"{units.reader}: its inputs' H is singular, so that structure.{units.kind} cannot be carried out:"
                " calibrate with more sequences or a larger damping"
            ) from None
        weights |= _kept_rows(weights, units, kept)
        inputs[units.reader] = sliced(known, columns)
    return weights, replace(statistics, inputs=inputs)


def contributions(weight: Tensor, hessian: Tensor, width: int) -> Tensor:
    """What each unit adds to the output, E_u = ‖W_u X_u‖² = tr(W_u H_uu W_uᵀ) [units] float32.

    ``weight`` [out, units · width] reads the units, ``hessian`` H = XᵀX [in, in] is of its inputs. With a width of one
    this is ‖W_j‖² H_jj: the energy of a neuron's activations times that of its outgoing weights.
    """
    out, columns = weight.shape
    units = columns // width
    by_unit = weight.view(out, units, width).transpose(0, 1)
    blocks = hessian.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return ((by_unit @ blocks) * by_unit).sum((1, 2))


def strongest(scores: Tensor, count: int) -> Tensor:
    """Indices [count] of the largest ``scores``, ascending; of equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def expand(units: Tensor, width: int) -> Tensor:
    """Unit indices [n] → the indices [n · width] of their columns or rows."""
    offsets = torch.arange(width, device=units.device)
    return (units[:, None] * width + offsets).flatten()


def refit(weight: Tensor, hessian: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The least-squares columns [out, kept] that make the kept inputs S alone give the output of all inputs.

    With H damped on the whole diagonal, H ← H + λI with λ = damping · mean(diag H), the minimum over W' of
    tr((W - W'P) H (W - W'P)ᵀ), P picking the rows S, is W' = W H[:, S] (H[S, S])⁻¹. Written as a correction of what is
    kept, with R the removed inputs: W' = W_S + W_R H[R, S] (H[S, S] + λI)⁻¹, which is the update of Optimal Brain
    Compression (Frantar & Alistarh 2022) for a removed group, -W_R (H⁻¹[R, R])⁻¹ H⁻¹[R, :]. Raises
    ``torch.linalg.LinAlgError`` where H[S, S] + λI is not positive definite.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    damped = hessian[kept][:, kept]
    damped.diagonal().add_(damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(damped)
    missing = weight[:, gone] @ hessian[gone][:, kept]
    return weight[:, kept] + torch.cholesky_solve(missing.t(), factor).t()


def sliced(statistics: InputStatistics, columns: Tensor) -> InputStatistics:
    """The statistics of ``columns`` alone; nothing that was computed from all of H goes along."""
    return InputStatistics(
        hessian=statistics.hessian[columns][:, columns],
        rows=statistics.rows,
        absmax=statistics.absmax[columns],
        mean_abs=statistics.mean_abs[columns],
        damping=statistics.damping,
    )


def _kept_rows(weights: Mapping[str, Tensor], units: Units, kept: Tensor) -> dict[str, Tensor]:
    """What makes the kept units: rows of weights and biases."""
    result: dict[str, Tensor] = {}
    for name, width in units.makers.items():
        rows = expand(kept, width)
        result |= {full: weights[full][rows] for full in (f"{name}.weight", f"{name}.bias") if full in weights}
    return result
