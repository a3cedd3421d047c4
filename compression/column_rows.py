"""The rows of the column loop (:mod:`compression.columns`): one segment per job, and the segments that go together.

Columns lie in memory one after another ([in, out], the transpose of a weight), so that the rows of all segments stand
side by side in every column.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from compression.column_jobs import ColumnJob
from compression.config import pattern_of
from compression.factor import Factor
from compression.methods.gptq import GroupScales

RUN = 16
"""Columns that see each other's errors at once."""


@dataclass(eq=False)
class Segment:
    """The rows of one job."""

    job: ColumnJob
    rows: slice
    weights: Tensor
    """[in, out] in the order of solving; of all jobs of a matrix the same."""
    drift: Tensor
    """[in, out] in the order of solving. Columns that are solved hold what came out: levels, or weights."""
    mask: Tensor | None
    """[in, out] bool in the order of solving; True where a weight stays, or nothing is chosen yet."""
    seen: list[int] = field(default_factory=list)
    """For every column of the block: how many of the block's columns have their errors in it."""
    carried: int = 0
    """Columns of the block whose errors have reached the later blocks."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Neighbouring segments with equally many rows, and what goes into and comes out of their matrix products.

    A product's operands lie in memory as if its job were alone: its last bits may depend on that.
    """

    segments: Sequence[Segment]
    errors: Tensor
    """[segments, block, out] of the current block's columns."""
    reach: Tensor
    """[segments, RUN, out] drift of the columns of a run by the errors before it."""

    @classmethod
    def of(cls, segments: Sequence[Segment], block: int) -> "Stack":
        """With room for a block, rounded up so that all segments are aligned as the first is."""
        like = segments[0].weights
        sizes = (-(-block // RUN) * RUN, RUN)
        return cls(segments, *(like.new_empty(len(segments), size, like.shape[1]) for size in sizes))

    def spread(self, rows: Tensor) -> Tensor:
        """[columns, all rows] → a view of this stack's [segments, columns, out]."""
        return rows[:, rows_of(self.segments)].unflatten(1, (len(self.segments), -1)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Patterned:
    """Neighbouring segments that are pruned by the same n:m pattern."""

    segments: Sequence[Segment]
    kept: int
    width: int


@dataclass(frozen=True, eq=False)
class Grouped:
    """Neighbouring segments that are quantised in the same groups."""

    segments: Sequence[Segment]
    scales: GroupScales


def segments_of(jobs: Sequence[ColumnJob], factor: Factor) -> Iterator[Segment]:
    """The jobs' segments, one below the other, as nothing is solved yet."""
    start = 0
    turned: dict[int, Tensor] = {}
    for job in jobs:
        if id(job.weight) not in turned:
            turned[id(job.weight)] = _turned(job.weight.masked_fill(factor.dead, 0.0), factor)
        weights, mask = turned[id(job.weight)], None
        if job.mask is not None:
            mask = _turned(job.mask, factor)
        elif job.prune is not None:
            mask = torch.ones_like(weights, dtype=torch.bool)
        rows = slice(start, start + len(job.weight))
        yield Segment(job, rows, weights, torch.zeros_like(weights), mask)
        start = rows.stop


def stacks_of(segments: Sequence[Segment], block: int) -> Iterator[Stack]:
    """Stacks of all segments."""
    for _, same in groupby(segments, key=lambda one: len(one.job.weight)):
        yield Stack.of(list(same), block)


def patterned_of(segments: Sequence[Segment]) -> Iterator[Patterned]:
    """Those of the segments that are pruned by patterns."""
    for pattern, same in groupby(segments, key=lambda one: one.job.pattern):
        if pattern:
            yield Patterned(list(same), *pattern_of(pattern))


def grouped_of(segments: Sequence[Segment]) -> Iterator[Grouped]:
    """Those of the segments that are quantised, with room for their scales."""
    quantized = [segment for segment in segments if segment.job.quantize]
    for _, same in groupby(quantized, key=lambda one: (one.job.kind, one.job.groups)):
        run = list(same)
        recipes = [segment.job.quantize for segment in run if segment.job.quantize]
        counts = [len(segment.job.weight) for segment in run]
        yield Grouped(run, GroupScales.empty(rows_of(run), recipes, counts, run[0].weights))


def rows_of(segments: Sequence[Segment]) -> slice:
    """The rows of neighbouring segments."""
    return slice(segments[0].rows.start, segments[-1].rows.stop)


def _turned(matrix: Tensor, factor: Factor) -> Tensor:
    """[out, in] → [in, out] in the order of solving."""
    turned = matrix.t().contiguous()
    return turned if factor.order is None else turned[factor.order]
