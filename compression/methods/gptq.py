"""GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers").

What is its own in the column loop (:mod:`compression.columns`): the levels of every row as the loop comes to a column.

The scales of a group of columns are found when the loop reaches the group's first column, from the weights as they
then are. With ``act_order`` the columns are solved in the order of falling H_jj, and a group's columns are not
neighbours any more: its scales are found beforehand, from the weights as they were, so that groups stay runs of
neighbouring columns as they are stored (what other tools call static groups).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compression.config import Number
from compression.levels import SCALE_DTYPE, Levels, bounds, fit, round_
from compression.recipe import Quantization


@dataclass(eq=False)
class GroupScales:
    """Scales and zero codes, group by group, of neighbouring rows of the loop that form the same groups.

    Their bits may differ; whether they are symmetric does not, nor their kind of number.
    """

    rows: slice
    group: int
    """Columns that share a scale."""
    symmetric: bool
    number: Number
    steps: Tensor
    """[rows] 2^bits - 1."""
    scales: Tensor
    """[groups, rows] as stored."""
    zeros: Tensor
    """[groups, rows]."""

    @classmethod
    def empty(cls, rows: slice, recipes: Sequence[Quantization], counts: Sequence[int], like: Tensor) -> "GroupScales":
        """Room for ``rows``, of which ``counts[i]`` follow ``recipes[i]``; ``like`` [in, out] has type and columns."""
        group = recipes[0].group_size or len(like)
        steps = torch.cat(
            [like.new_full((count,), Levels.of(one).steps) for one, count in zip(recipes, counts, strict=True)]
        )
        zeros = like.new_zeros(len(like) // group, len(steps))
        return cls(rows, group, recipes[0].symmetric, recipes[0].number, steps, zeros.to(SCALE_DTYPE), zeros)

    def fit(self, place: int | slice, low: Tensor, high: Tensor) -> None:
        """Levels of one group (or several), for weights between ``low`` and ``high`` [(groups,) rows]."""
        self.scales[place], self.zeros[place] = fit(low, high, self.steps, self.symmetric, self.number)

    def bounds(self, place: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Lowest and highest level [groups, rows] of some groups."""
        return bounds(self.zeros[place], self.steps, self.number)


@dataclass(eq=False)
class Rounder:
    """Rounds column after column for all rows that are quantised, of whatever bits and groups; one kind of number.

    ``runs`` are the rows' scales. With ``order`` [in], the order of solving, all scales are there before the first
    column; without, :meth:`begin` is told of every group.
    """

    runs: Sequence[GroupScales]
    order: Tensor | None
    block: int
    like: Tensor
    """Says type and device of the weights."""
    columns: list[tuple[Tensor, Tensor, Tensor]] = field(init=False)
    """Scale, lowest and highest level [rows] for every column of the current block."""

    def __post_init__(self) -> None:
        # Without order one row of numbers serves all columns until a group begins and changes its part of it.
        height = 1 if self.order is None else self.block
        width = self.runs[-1].rows.stop if self.runs else 0
        self._current = self.like.new_ones(3, height, width)
        scales, lows, highs = (part.expand(self.block, width).unbind(0) for part in self._current)
        self.columns = list(zip(scales, lows, highs, strict=True))

    def open(self, start: int, stop: int) -> None:
        """A block of columns begins: those at ``start`` to ``stop`` in the order of solving."""
        if self.order is not None:
            for run in self.runs:
                self._set(run, self.order[start:stop] // run.group, slice(0, stop - start))

    def begin(self, run: GroupScales, place: int) -> None:
        """The columns of the run's group ``place`` begin; its scales are known."""
        self._set(run, slice(place, place + 1), slice(0, 1))

    def _set(self, run: GroupScales, groups: Tensor | slice, columns: slice) -> None:
        self._current[0, columns, run.rows] = run.scales[groups].to(self._current.dtype)
        self._current[1, columns, run.rows], self._current[2, columns, run.rows] = run.bounds(groups)

    def round(self, column: int, weights: Tensor, out: Tensor) -> None:
        """Levels [rows] of a column's ``weights`` [rows] into ``out``: the nearest, of two as near the even one."""
        scale, low, high = self.columns[column]
        torch.div(weights, scale, out=out)
        torch.clamp(out, low, high, out=out)
        round_(out, self.runs[0].number)

    def values(self, column: int, levels: Tensor, out: Tensor) -> None:
        """The weights [rows] that a column's levels [rows] stand for, into ``out``."""
        torch.mul(levels, self.columns[column][0], out=out)
