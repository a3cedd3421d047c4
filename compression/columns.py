"""Everything that is solved column by column with the inverse of H: one loop for all jobs that share their inputs.

A column of weights is rounded, or part of it set to zero, and the columns that are still to come make up for the error
(Frantar et al. 2023, GPTQ, eq. 2 and algorithm 1; Frantar & Alistarh 2023, SparseGPT, algorithm 1)::

    error = w_i - solved(w_i)                w_j ← w_j - error · U_ij / U_ii   for all j > i, with H⁻¹ = UᵀU

The weights stay as they are, and their *drift* is summed up beside them, w_j = weight_j - drift_j: it is small, and
what rounding it to float32 loses is smaller still, so that a code hardly ever differs from one found in float64.

The rows of a matrix do not depend on each other, so the rows of all jobs stand side by side and go through the same few
operations, whatever their recipes. Columns lie in memory one after another ([in, out], the transpose of a weight).

A column's error reaches those of its *run* (of :data:`~compression.column_rows.RUN` columns) at once, the others of its
block when their run comes (or when their scales or masks are to be found), and the later blocks when the block is done.
The last two are matrix products, of one job each; all else works on each element by itself, with operations that
IEEE 754 defines to the last bit. So a job's result does not depend, by a single bit, on the jobs beside it.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from compression.column_jobs import ColumnJob, ColumnResult, batches, check
from compression.column_rows import (
    RUN,
    Grouped,
    Patterned,
    Segment,
    grouped_of,
    patterned_of,
    rows_of,
    segments_of,
    stacks_of,
)
from compression.factor import Factor, factor_of
from compression.levels import Levels
from compression.matrix import Quantized
from compression.methods.base import InputStatistics
from compression.methods.gptq import Rounder
from compression.methods.sparsegpt import keep_in_block, keep_in_pattern

BLOCK = 128
"""Columns among which SparseGPT chooses (the paper's B_s), and after which the later ones are brought up to date."""
ROWS = 16384
"""Rows side by side at most, unless a single job has more: bounds the memory, and keeps a few columns in the cache."""


def solve_columns(jobs: Sequence[ColumnJob], statistics: InputStatistics, block: int = BLOCK) -> list[ColumnResult]:
    """One result per job, each the same to the bit as if the job were alone.

    Raises ``ValueError`` naming the linear layer for a recipe that does not fit the matrix, and for statistics that are
    not finite or singular.
    """
    for job in jobs:
        check(job)
    names = ", ".join(dict.fromkeys(job.name for job in jobs))
    results: dict[int, ColumnResult] = {}
    for places in batches(jobs, ROWS):
        chosen = [jobs[place] for place in places]
        factor = factor_of(statistics, chosen[0].by_size, chosen[0].weight.dtype, names)
        results |= zip(places, _Loop(chosen, factor, block).solve(), strict=True)
    return [results[place] for place in range(len(jobs))]


class _Loop:
    """The loop over the columns for one batch of jobs, sorted as :func:`batches` does.

    A block of columns of all rows is held at a time: its ``weights``, their ``drift``, ``errors``, ``levels`` of the
    rows that are quantised (they come first), and what to ``keep`` of those that are pruned (they come last): 1 or 0.
    """

    def __init__(self, jobs: Sequence[ColumnJob], factor: Factor, block: int) -> None:
        like = jobs[0].weight
        self.factor, self.columns = factor, like.shape[1]
        self.block = min(block, self.columns)
        self.start = self.stop = self.width = self.noted = 0
        self.segments = list(segments_of(jobs, factor))
        self.rows = self.segments[-1].rows.stop
        self.quantized = sum(len(job.weight) for job in jobs if job.quantize)
        self.unmasked = sum(len(job.weight) for job in jobs if job.kind == 0)
        self.patterned = list(patterned_of(self.segments))
        self.grouped = list(grouped_of(self.segments))
        self.stacks = list(stacks_of(self.segments, self.block))
        self.errors_of = {
            segment: errors
            for stack in self.stacks
            for segment, errors in zip(stack.segments, stack.errors, strict=True)
        }
        self.rounder = Rounder([run.scales for run in self.grouped], factor.order, self.block, like)
        self.weights = like.new_empty(self.block, self.rows)
        self.drift = like.new_empty(self.block, self.rows)
        self.errors = like.new_empty(self.block, self.rows)
        self.levels = like.new_empty(self.block, self.quantized)
        self.keep = like.new_empty(self.block, self.rows - self.unmasked)
        self.current, self.solved = like.new_empty(2, self.rows)
        self.product = like.new_empty(RUN, self.rows)

    def solve(self) -> list[ColumnResult]:
        """One result per job."""
        if self.factor.order is not None:
            self._fit_beforehand()
        for start in range(0, self.columns, self.block):
            self._open(start, min(start + self.block, self.columns))
            for first in range(0, self.width, RUN):
                self._solve_run(first, min(first + RUN, self.width))
            self._close()
        return [
            *(self._quantized(run, segment) for run in self.grouped for segment in run.segments),
            *(self._pruned(segment) for segment in self.segments if segment.job.quantize is None),
        ]

    def _fit_beforehand(self) -> None:
        """Find all scales from the weights as they are, in the matrix's own order of columns."""
        for run in self.grouped:
            extremes = [_extremes(segment.job, self.factor.dead, run.scales.group) for segment in run.segments]
            low, high = (torch.cat(parts, 1) for parts in zip(*extremes, strict=True))
            run.scales.fit(slice(None), low, high)

    def _open(self, start: int, stop: int) -> None:
        """Take up the block of columns from ``start`` to ``stop``, and choose what SparseGPT prunes anywhere in it."""
        self.start, self.stop, self.width, self.noted = start, stop, stop - start, 0
        for segment in self.segments:
            segment.seen, segment.carried = [0] * self.width, 0
            weights, drift, prune = segment.weights[start:stop], segment.drift[start:stop], segment.job.prune
            self.weights[: self.width, segment.rows], self.drift[: self.width, segment.rows] = weights, drift
            if segment.mask is not None:
                if prune is not None and prune.pattern is None:
                    spread = self.factor.spread[start:stop]
                    segment.mask[start:stop] = keep_in_block(weights - drift, spread, prune.sparsity)
                self._keep([segment])[: self.width] = segment.mask[start:stop]
        self.rounder.open(start, stop)

    def _close(self) -> None:
        """Put away what came out of the block, and bring the later ones up to date."""
        for segment in self.segments:
            self._carry(segment, self.width)
            columns, solved = slice(self.start, self.stop), segment.drift[self.start : self.stop]
            if segment.mask is not None:
                segment.mask[columns] = self._keep([segment])[: self.width]
            if segment.job.quantize is not None:
                solved.copy_(self.levels[: self.width, segment.rows])
            else:
                torch.sub(segment.weights[columns], self.drift[: self.width, segment.rows], out=solved)
                solved.mul_(self._keep([segment])[: self.width])

    def _solve_run(self, first: int, last: int) -> None:
        """Solve the columns from ``first`` to ``last`` of the block."""
        self._settle_run(first, last)
        steps = self.factor.steps[self.start + first : self.start + last, self.start + first : self.start + last, None]
        for column in range(first, last):
            self._begin(column, last)
            self._solve_column(column)
            ahead = last - column - 1
            if ahead:
                product = self.product[:ahead]
                torch.mul(steps[-ahead - 1, -ahead:], self.errors[column], out=product)
                self.drift[column + 1 : last].add_(product)

    def _solve_column(self, column: int) -> None:
        """Round and prune one column of the block, and note the errors."""
        weights, quantized, unmasked = self.current, self.quantized, self.unmasked
        torch.sub(self.weights[column], self.drift[column], out=weights)
        if quantized:
            levels = self.levels[column]
            self.rounder.round(column, weights[:quantized], levels)
            if unmasked < quantized:
                levels[unmasked:].mul_(self.keep[column, : quantized - unmasked])
            self.rounder.values(column, levels, self.solved[:quantized])
        if quantized < self.rows:
            torch.mul(weights[quantized:], self.keep[column, quantized - unmasked :], out=self.solved[quantized:])
        torch.sub(weights, self.solved, out=self.errors[column])

    def _begin(self, column: int, last: int) -> None:
        """See to the patterns and groups that begin at a column."""
        for pattern in self.patterned:
            if (self.start + column) % pattern.width == 0:
                self._choose(pattern, column, last)
        for group in self.grouped:
            if (self.start + column) % group.scales.group == 0 and self.factor.order is None:
                self._fit(group, column, last)

    def _choose(self, run: Patterned, column: int, last: int) -> None:
        """Choose what an n:m pattern prunes of the m columns from ``column`` on."""
        first, end = self.start + column, self.start + column + run.width
        self._update(run.segments, column, last, column + run.width)
        weights = self._ahead(run.segments, column, column + run.width)
        self._mark(run.segments, column, keep_in_pattern(weights, self.factor.spread[first:end], run.kept))

    def _mark(self, segments: Sequence[Segment], column: int, mask: Tensor) -> None:
        """Note the ``mask`` [m, rows] of the columns from ``column`` on, which may be of the next blocks."""
        inside = min(len(mask), self.width - column)
        self._keep(segments)[column : column + inside] = mask[:inside]
        if inside < len(mask):
            sizes = [len(segment.job.weight) for segment in segments]
            for segment, part in zip(segments, mask[inside:].split(sizes, 1), strict=True):
                assert segment.mask is not None
                segment.mask[self.stop : self.stop + len(part)] = part

    def _fit(self, run: Grouped, column: int, last: int) -> None:
        """Find the scales of the group that begins at ``column``, from what is not known to be pruned."""
        self._update(run.segments, column, last, column + run.scales.group)
        weights = self._ahead(run.segments, column, column + run.scales.group)
        if run.segments[0].mask is not None:
            weights = weights * self._known(run.segments, column, column + run.scales.group)
        place = (self.start + column) // run.scales.group
        run.scales.fit(place, weights.amin(0), weights.amax(0))
        self.rounder.begin(run.scales, place)

    def _update(self, segments: Sequence[Segment], column: int, last: int, end: int) -> None:
        """Let the errors so far reach the columns from ``column`` to ``end``, wherever these are."""
        for segment in segments:
            if min(end, self.width) > last:
                self._settle(segment, last, min(end, self.width), column)
            if end > self.width:
                self._carry(segment, column)

    def _ahead(self, segments: Sequence[Segment], column: int, end: int) -> Tensor:
        """Weights [columns, rows] from ``column`` to ``end`` of the block, or beyond it."""
        columns, rows = slice(column, min(end, self.width)), rows_of(segments)
        inside = self.weights[columns, rows] - self.drift[columns, rows]
        if end <= self.width:
            return inside
        later = slice(self.stop, self.start + end)
        beyond = [segment.weights[later] - segment.drift[later] for segment in segments]
        return torch.cat([inside, torch.cat(beyond, 1)])

    def _known(self, segments: Sequence[Segment], column: int, end: int) -> Tensor:
        """The same of the masks: 0 where known to be pruned."""
        inside = self._keep(segments)[column : min(end, self.width)]
        if end <= self.width:
            return inside
        beyond = [segment.mask[self.stop : self.start + end] for segment in segments if segment.mask is not None]
        return torch.cat([inside, torch.cat(beyond, 1).to(inside.dtype)])

    def _keep(self, segments: Sequence[Segment]) -> Tensor:
        """Their part of what to keep."""
        rows = rows_of(segments)
        return self.keep[:, rows.start - self.unmasked : rows.stop - self.unmasked]

    def _settle_run(self, first: int, last: int) -> None:
        """Let the errors of the block's columns before a run reach the run, which lasts from ``first`` to ``last``."""
        if first == 0:
            return
        self._note(first)
        for stack in self.stacks:
            reach = stack.reach[:, : last - first]
            for segment, part in zip(stack.segments, reach, strict=True):
                self._reach(segment, first, last, first, part)
            stack.spread(self.drift[first:last]).add_(reach)

    def _settle(self, segment: Segment, first: int, last: int, upto: int) -> None:
        """Let the errors of the block's columns before ``upto`` reach those from ``first`` to ``last``."""
        self._note(upto)
        reach = segment.drift.new_empty(last - first, segment.drift.shape[1])
        self._reach(segment, first, last, upto, reach)
        self.drift[first:last, segment.rows].add_(reach)

    def _reach(self, segment: Segment, first: int, last: int, upto: int, out: Tensor) -> None:
        """Drift of the columns from ``first`` to ``last`` by the errors before ``upto`` that they have not seen."""
        for seen, same in groupby(range(first, last), key=segment.seen.__getitem__):
            columns = list(same)
            begin, end = columns[0], columns[-1] + 1
            part = out[begin - first : end - first]
            if seen < upto:
                steps = self.factor.steps[self.start + seen : self.start + upto, self.start + begin : self.start + end]
                torch.mm(steps.t(), self.errors_of[segment][seen:upto], out=part)
            else:
                part.zero_()
        segment.seen[first:last] = [upto] * (last - first)

    def _carry(self, segment: Segment, upto: int) -> None:
        """Let the errors of the block's columns before ``upto`` reach the later blocks."""
        done, segment.carried = segment.carried, upto
        if done < upto and self.stop < self.columns:
            self._note(upto)
            steps = self.factor.steps[self.start + done : self.start + upto, self.stop :]
            segment.drift[self.stop :].addmm_(steps.t(), self.errors_of[segment][done:upto])

    def _note(self, upto: int) -> None:
        """Lay the errors of the block's columns before ``upto`` out for the matrix products."""
        if self.noted < upto:
            for stack in self.stacks:
                stack.errors[:, self.noted : upto] = stack.spread(self.errors[self.noted : upto])
            self.noted = upto

    def _quantized(self, run: Grouped, segment: Segment) -> ColumnResult:
        rows = slice(segment.rows.start - run.scales.rows.start, segment.rows.stop - run.scales.rows.start)
        recipe, scales, zeros = segment.job.quantize, run.scales.scales[:, rows], run.scales.zeros[:, rows]
        assert recipe is not None
        levels = Levels.of(recipe)
        grouped = self._restored(segment.drift).view(len(scales), run.scales.group, -1)
        codes = levels.codes(grouped, zeros[:, None]).view(segment.weights.shape).t().contiguous()
        stored_zeros = None if levels.symmetric else zeros.t().contiguous().byte()
        quantized = Quantized(codes, scales.t().contiguous(), stored_zeros, levels.bits, levels.number)
        return ColumnResult(None, self._mask(segment), quantized)

    def _pruned(self, segment: Segment) -> ColumnResult:
        return ColumnResult(self._restored(segment.drift).t().contiguous(), self._mask(segment), None)

    def _mask(self, segment: Segment) -> Tensor | None:
        if segment.job.mask is not None or segment.mask is None:
            return segment.job.mask
        return self._restored(segment.mask).t().contiguous()

    def _restored(self, solved: Tensor) -> Tensor:
        """Columns [in, out] in the matrix's own order."""
        order = self.factor.order
        return solved if order is None else solved[order.argsort()]


def _extremes(job: ColumnJob, dead: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight [groups, out] of every group of columns."""
    weights = job.weight.masked_fill(dead, 0.0)
    if job.mask is not None:
        weights = weights.masked_fill(~job.mask, 0.0)
    grouped = weights.view(len(weights), -1, group)
    return grouped.amin(2).t(), grouped.amax(2).t()
