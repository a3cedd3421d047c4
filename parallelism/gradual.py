"""Gradual pruning during training: how sparse the linear weights are at which part of the budget. Torch-free."""

import math
from typing import Annotated

from pydantic import Field, model_validator

from parallelism.options import Options


class GradualPruning(Options):
    """The smallest weights of every linear layer become zero and stay so, more of them as the budget is spent."""

    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="of every linear weight, from end on")
    begin: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(default=0.1, description="fraction of the budget")
    end: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=0.7, description="fraction of the budget")
    every: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.02, description="fraction of the budget between two prunings"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "GradualPruning":
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} is not before end {self.end}: lower begin or raise end")
        if self.every > self.end - self.begin:
            raise ValueError(
                f"every {self.every} is longer than the ramp from begin {self.begin} to end {self.end}: set every to"
                f" {self.end - self.begin:g} at most"
            )
        return self


def sparsity_at(pruning: GradualPruning | None, fraction: float) -> float:
    """The sparsity wanted where ``fraction`` of the budget is spent; it never falls.

    The cubic ramp of Zhu & Gupta 2017, eq. 1, from 0 to S between ``begin`` and ``end``, s = S·(1 - (1 - t)³) with t in
    [0, 1], in stairs: t moves on every ``every`` of the budget.
    """
    if pruning is None or fraction < pruning.begin:
        return 0.0
    if fraction >= pruning.end:
        return pruning.sparsity
    stairs = math.floor((fraction - pruning.begin) / pruning.every)
    place = min(1.0, stairs * pruning.every / (pruning.end - pruning.begin))
    return pruning.sparsity * (1.0 - (1.0 - place) ** 3)
