"""Everything that is solved column by column with the inverse of H: one loop for all jobs that share their inputs.

A column of weights is rounded, or part of it set to zero, and the columns that are still to come make up for the error
(Frantar et al. 2023, GPTQ, eq. 2 and algorithm 1; Frantar & Alistarh 2023, SparseGPT, algorithm 1)::

    error = w_i - solved(w_i)                w_j ← w_j - error · U_ij / U_ii   for all j > i, with H⁻¹ = UᵀU

The weights stay as they are, and their *drift* is summed up beside them, w_j = weight_j - drift_j: it is small, and
what rounding it to float32 loses is smaller still, so that a code hardly ever differs from one found in float64.

The rows of a matrix do not depend on each other, so the rows of all jobs stand side by side and go through the same few
operations, whatever their recipes. Columns lie in memory one after another ([in, out], the transpose of a weight).

A column's error reaches those of its *run* of :data:`RUN` columns at once, the others of its block when their run comes
(or when their scales or masks are to be found), and the later blocks when the block is done. The last two are matrix
products, of one job each; all else works on each element by itself, with operations that IEEE 754 defines to the last
bit. So a job's result does not depend, by a single bit, on the jobs beside it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from compression.factor import Factor, factor_of
from compression.levels import Levels
from compression.matrix import Quantized
from compression.methods.base import InputStatistics
from compression.methods.gptq import GroupScales, Rounder
from compression.methods.selection import pattern_of, pattern_remedy
from compression.methods.sparsegpt import keep_in_block, keep_in_pattern
from compression.recipe import Pruning, Quantization

BLOCK = 128
"""Columns among which SparseGPT chooses (the paper's B_s), and after which the later ones are brought up to date."""
RUN = 16
"""Columns that see each other's errors at once."""
ROWS = 16384
"""Rows side by side at most, unless a single job has more: bounds the memory, and keeps a few columns in the cache."""


@dataclass(frozen=True, eq=False)
class ColumnJob:
    """One matrix under one recipe: at least one of ``prune`` and ``quantize`` is given.

    ``weight`` [out, in] float32 (or float64, which is then solved in float64). ``mask`` [out, in] bool is what another
    method has pruned already, and is kept; ``prune`` is None then.
    """

    name: str
    weight: Tensor
    mask: Tensor | None
    prune: Pruning | None
    quantize: Quantization | None


@dataclass(frozen=True, eq=False)
class ColumnResult:
    """What came out: codes where it was quantised, else weights; zero where ``mask`` [out, in] bool is False."""

    pruned: Tensor | None
    """[out, in] like the job's weight; None where it was quantised."""
    mask: Tensor | None
    quantized: Quantized | None

    @property
    def weight(self) -> Tensor:
        """The weights [out, in]."""
        if self.quantized is not None:
            return self.quantized.dense()
        assert self.pruned is not None
        return self.pruned


def solve_columns(jobs: Sequence[ColumnJob], statistics: InputStatistics, block: int = BLOCK) -> list[ColumnResult]:
    """One result per job, each the same to the bit as if the job were alone.

    Raises ``ValueError`` naming the linear layer for a recipe that does not fit the matrix, and for statistics that are
    not finite or singular.
    """
    for job in jobs:
        _check(job)
    names = ", ".join(dict.fromkeys(job.name for job in jobs))
    results: dict[int, ColumnResult] = {}
    for places in _batches(jobs):
        chosen = [jobs[place] for place in places]
        factor = factor_of(statistics, _by_size(chosen[0]), chosen[0].weight.dtype, names)
        results |= zip(places, _Loop(chosen, factor, block).solve(), strict=True)
    return [results[place] for place in range(len(jobs))]


def _check(job: ColumnJob) -> None:
    assert job.prune or job.quantize, f"{job.name}: nothing to do"
    assert job.prune is None or job.mask is None, f"{job.name}: pruned already"
    columns = job.weight.shape[1]
    group = job.quantize.group_size if job.quantize else None
    if group and columns % group:
        raise ValueError(
            f"{job.name}: quantize.group_size {group} does not divide its {columns} columns: use a divisor of"
            f" {columns}, or leave group_size out for one scale per output channel"
        )
    pattern = job.prune.pattern if job.prune else None
    if pattern and columns % pattern_of(pattern)[1]:
        raise ValueError(f"{job.name}: pattern {pattern} does not divide its {columns} columns: {pattern_remedy()}")
    if pattern and _by_size(job):
        raise ValueError(
            f"{job.name}: pattern {pattern} is chosen among neighbouring columns, but quantize.act_order solves them"
            " apart: set act_order to false, or prune by another method"
        )


def _by_size(job: ColumnJob) -> bool:
    return job.quantize is not None and job.quantize.act_order


def _batches(jobs: Sequence[ColumnJob]) -> Iterator[list[int]]:
    """Places of jobs that can stand side by side: of the same order and kind of number, at most :data:`ROWS` rows."""
    kinds: dict[tuple[bool, str], list[int]] = {}
    for place, job in enumerate(jobs):
        kinds.setdefault((_by_size(job), job.quantize.number if job.quantize else "int"), []).append(place)
    for places in kinds.values():
        batch: list[int] = []
        rows = 0
        for place in sorted(places, key=lambda place: _likeness(jobs[place])):
            rows += len(jobs[place].weight)
            if batch and rows > ROWS:
                yield batch
                batch, rows = [], len(jobs[place].weight)
            batch.append(place)
        yield batch


def _likeness(job: ColumnJob) -> tuple[int, bool, str, tuple[int, bool], int]:
    """Sorts the rows: quantised only, quantised and pruned, pruned only; within these, like beside like."""
    kind, pattern = _kind(job), _pattern(job)
    return kind, (pattern == "") == (kind == 2), pattern, _groups(job), len(job.weight)


def _kind(job: ColumnJob) -> int:
    return 2 if job.quantize is None else 1 if job.prune or job.mask is not None else 0


def _groups(job: ColumnJob) -> tuple[int, bool]:
    return (job.quantize.group_size or 0, job.quantize.symmetric) if job.quantize else (0, True)


def _pattern(job: ColumnJob) -> str:
    return job.prune.pattern or "" if job.prune else ""


@dataclass(eq=False)
class _Segment:
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
class _Stack:
    """Neighbouring segments with equally many rows, and what goes into and comes out of their matrix products.

    A product's operands lie in memory as if its job were alone: its last bits may depend on that.
    """

    segments: Sequence[_Segment]
    errors: Tensor
    """[segments, block, out] of the current block's columns."""
    reach: Tensor
    """[segments, RUN, out] drift of the columns of a run by the errors before it."""

    @classmethod
    def of(cls, segments: Sequence[_Segment], block: int) -> "_Stack":
        """With room for a block, rounded up so that all segments are aligned as the first is."""
        like = segments[0].weights
        sizes = (-(-block // RUN) * RUN, RUN)
        return cls(segments, *(like.new_empty(len(segments), size, like.shape[1]) for size in sizes))

    def spread(self, rows: Tensor) -> Tensor:
        """[columns, all rows] → a view of this stack's [segments, columns, out]."""
        return rows[:, _rows(self.segments)].unflatten(1, (len(self.segments), -1)).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class _Patterned:
    """Neighbouring segments that are pruned by the same n:m pattern."""

    segments: Sequence[_Segment]
    kept: int
    width: int


@dataclass(frozen=True, eq=False)
class _Grouped:
    """Neighbouring segments that are quantised in the same groups."""

    segments: Sequence[_Segment]
    scales: GroupScales


class _Loop:
    """The loop over the columns for one batch of jobs, sorted by :func:`_likeness`.

    A block of columns of all rows is held at a time: its ``weights``, their ``drift``, ``errors``, ``levels`` of the
    rows that are quantised (they come first), and what to ``keep`` of those that are pruned (they come last): 1 or 0.
    """

    def __init__(self, jobs: Sequence[ColumnJob], factor: Factor, block: int) -> None:
        like = jobs[0].weight
        self.factor, self.columns = factor, like.shape[1]
        self.block = min(block, self.columns)
        self.start = self.stop = self.width = self.noted = 0
        self.segments = list(_segments(jobs, factor))
        self.rows = self.segments[-1].rows.stop
        self.quantized = sum(len(job.weight) for job in jobs if job.quantize)
        self.unmasked = sum(len(job.weight) for job in jobs if _kind(job) == 0)
        self.patterned = list(_patterned(self.segments))
        self.grouped = list(_grouped(self.segments))
        same_size = groupby(self.segments, key=lambda one: len(one.job.weight))
        self.stacks = [_Stack.of(list(same), self.block) for _, same in same_size]
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

    def _choose(self, run: _Patterned, column: int, last: int) -> None:
        """Choose what an n:m pattern prunes of the m columns from ``column`` on."""
        first, end = self.start + column, self.start + column + run.width
        self._update(run.segments, column, last, column + run.width)
        weights = self._ahead(run.segments, column, column + run.width)
        self._mark(run.segments, column, keep_in_pattern(weights, self.factor.spread[first:end], run.kept))

    def _mark(self, segments: Sequence[_Segment], column: int, mask: Tensor) -> None:
        """Note the ``mask`` [m, rows] of the columns from ``column`` on, which may be of the next blocks."""
        inside = min(len(mask), self.width - column)
        self._keep(segments)[column : column + inside] = mask[:inside]
        if inside < len(mask):
            sizes = [len(segment.job.weight) for segment in segments]
            for segment, part in zip(segments, mask[inside:].split(sizes, 1), strict=True):
                assert segment.mask is not None
                segment.mask[self.stop : self.stop + len(part)] = part

    def _fit(self, run: _Grouped, column: int, last: int) -> None:
        """Find the scales of the group that begins at ``column``, from what is not known to be pruned."""
        self._update(run.segments, column, last, column + run.scales.group)
        weights = self._ahead(run.segments, column, column + run.scales.group)
        if run.segments[0].mask is not None:
            weights = weights * self._known(run.segments, column, column + run.scales.group)
        place = (self.start + column) // run.scales.group
        run.scales.fit(place, weights.amin(0), weights.amax(0))
        self.rounder.begin(run.scales, place)

    def _update(self, segments: Sequence[_Segment], column: int, last: int, end: int) -> None:
        """Let the errors so far reach the columns from ``column`` to ``end``, wherever these are."""
        for segment in segments:
            if min(end, self.width) > last:
                self._settle(segment, last, min(end, self.width), column)
            if end > self.width:
                self._carry(segment, column)

    def _ahead(self, segments: Sequence[_Segment], column: int, end: int) -> Tensor:
        """Weights [columns, rows] from ``column`` to ``end`` of the block, or beyond it."""
        columns, rows = slice(column, min(end, self.width)), _rows(segments)
        inside = self.weights[columns, rows] - self.drift[columns, rows]
        if end <= self.width:
            return inside
        later = slice(self.stop, self.start + end)
        beyond = [segment.weights[later] - segment.drift[later] for segment in segments]
        return torch.cat([inside, torch.cat(beyond, 1)])

    def _known(self, segments: Sequence[_Segment], column: int, end: int) -> Tensor:
        """The same of the masks: 0 where known to be pruned."""
        inside = self._keep(segments)[column : min(end, self.width)]
        if end <= self.width:
            return inside
        beyond = [segment.mask[self.stop : self.start + end] for segment in segments if segment.mask is not None]
        return torch.cat([inside, torch.cat(beyond, 1).to(inside.dtype)])

    def _keep(self, segments: Sequence[_Segment]) -> Tensor:
        """Their part of what to keep."""
        rows = _rows(segments)
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

    def _settle(self, segment: _Segment, first: int, last: int, upto: int) -> None:
        """Let the errors of the block's columns before ``upto`` reach those from ``first`` to ``last``."""
        self._note(upto)
        reach = segment.drift.new_empty(last - first, segment.drift.shape[1])
        self._reach(segment, first, last, upto, reach)
        self.drift[first:last, segment.rows].add_(reach)

    def _reach(self, segment: _Segment, first: int, last: int, upto: int, out: Tensor) -> None:
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

    def _carry(self, segment: _Segment, upto: int) -> None:
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

    def _quantized(self, run: _Grouped, segment: _Segment) -> ColumnResult:
        rows = slice(segment.rows.start - run.scales.rows.start, segment.rows.stop - run.scales.rows.start)
        recipe, scales, zeros = segment.job.quantize, run.scales.scales[:, rows], run.scales.zeros[:, rows]
        assert recipe is not None
        levels = Levels.of(recipe)
        grouped = self._restored(segment.drift).view(len(scales), run.scales.group, -1)
        codes = levels.codes(grouped, zeros[:, None]).view(segment.weights.shape).t().contiguous()
        stored_zeros = None if levels.symmetric else zeros.t().contiguous().byte()
        quantized = Quantized(codes, scales.t().contiguous(), stored_zeros, levels.bits, levels.number)
        return ColumnResult(None, self._mask(segment), quantized)

    def _pruned(self, segment: _Segment) -> ColumnResult:
        return ColumnResult(self._restored(segment.drift).t().contiguous(), self._mask(segment), None)

    def _mask(self, segment: _Segment) -> Tensor | None:
        if segment.job.mask is not None or segment.mask is None:
            return segment.job.mask
        return self._restored(segment.mask).t().contiguous()

    def _restored(self, solved: Tensor) -> Tensor:
        """Columns [in, out] in the matrix's own order."""
        order = self.factor.order
        return solved if order is None else solved[order.argsort()]


def _segments(jobs: Sequence[ColumnJob], factor: Factor) -> Iterator[_Segment]:
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
        yield _Segment(job, rows, weights, torch.zeros_like(weights), mask)
        start = rows.stop


def _turned(matrix: Tensor, factor: Factor) -> Tensor:
    """[out, in] → [in, out] in the order of solving."""
    turned = matrix.t().contiguous()
    return turned if factor.order is None else turned[factor.order]


def _patterned(segments: Sequence[_Segment]) -> Iterator[_Patterned]:
    for pattern, same in groupby(segments, key=lambda one: _pattern(one.job)):
        if pattern:
            yield _Patterned(list(same), *pattern_of(pattern))


def _grouped(segments: Sequence[_Segment]) -> Iterator[_Grouped]:
    quantized = [segment for segment in segments if segment.job.quantize]
    for _, same in groupby(quantized, key=lambda one: (_kind(one.job), _groups(one.job))):
        run = list(same)
        recipes = [segment.job.quantize for segment in run if segment.job.quantize]
        counts = [len(segment.job.weight) for segment in run]
        yield _Grouped(run, GroupScales.empty(_rows(run), recipes, counts, run[0].weights))


def _rows(segments: Sequence[_Segment]) -> slice:
    return slice(segments[0].rows.start, segments[-1].rows.stop)


def _extremes(job: ColumnJob, dead: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight [groups, out] of every group of columns."""
    weights = job.weight.masked_fill(dead, 0.0)
    if job.mask is not None:
        weights = weights.masked_fill(~job.mask, 0.0)
    grouped = weights.view(len(weights), -1, group)
    return grouped.amin(2).t(), grouped.amax(2).t()
