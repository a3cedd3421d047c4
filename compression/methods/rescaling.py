"""Moving a scale per channel out of what makes the channels and into the columns that read them: what rescalers share.

In exact arithmetic the layer computes the same: readers' columns are multiplied by s, the source is divided by s.
"""

from collections.abc import Mapping

from torch import Tensor

from compression.methods.base import InputStatistics, LayerStatistics
from parallelism.models.base import Fold


def move_scales(
    weights: Mapping[str, Tensor], statistics: LayerStatistics, fold: Fold, scales: Tensor
) -> tuple[dict[str, Tensor], LayerStatistics]:
    """A layer (canonical name → float32 tensor) and its statistics with ``scales`` [channels] > 0 moved by ``fold``."""
    result = dict(weights)
    for name in (f"{fold.source}.weight", f"{fold.source}.bias"):
        if name in result:
            result[name] = (result[name].t() / scales).t()
    for reader in fold.readers:
        result[f"{reader}.weight"] = result[f"{reader}.weight"] * scales
    divided = _divided(statistics.inputs[fold.readers[0]], scales)
    inputs = {name: divided if name in fold.readers else known for name, known in statistics.inputs.items()}
    return result, LayerStatistics(inputs, statistics.influence)


def _divided(statistics: InputStatistics, scales: Tensor) -> InputStatistics:
    """Of inputs X·diag(1/s): H' = diag(1/s) H diag(1/s)."""
    return InputStatistics(
        hessian=statistics.hessian / scales / scales[:, None],
        rows=statistics.rows,
        absmax=statistics.absmax / scales,
        mean_abs=statistics.mean_abs / scales,
        damping=statistics.damping,
    )
