"""Jobs of the column loop (:mod:`compression.columns`) and their results: what can be asked for, what goes together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from compression.checks import check_matrix
from compression.matrix import Quantized
from compression.recipe import Pruning, Quantization


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

    @property
    def by_size(self) -> bool:
        """Whether columns are solved in the order of falling H_jj."""
        return self.quantize is not None and self.quantize.act_order

    @property
    def kind(self) -> int:
        """0: quantised only, 1: quantised and pruned, 2: pruned only."""
        return 2 if self.quantize is None else 1 if self.prune or self.mask is not None else 0

    @property
    def groups(self) -> tuple[int, bool]:
        """Columns that share a scale (0: all), and whether scales are symmetric."""
        return (self.quantize.group_size or 0, self.quantize.symmetric) if self.quantize else (0, True)

    @property
    def pattern(self) -> str:
        """The n:m pattern to be chosen; empty without one."""
        return self.prune.pattern or "" if self.prune else ""


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


def check(job: ColumnJob) -> None:
    """Raise :class:`compression.errors.RecipeError` where a recipe does not fit the matrix."""
    assert job.prune or job.quantize, f"{job.name}: nothing to do"
    assert job.prune is None or job.mask is None, f"{job.name}: pruned already"
    check_matrix(job.prune, job.quantize, job.name, job.weight.shape[1])


def batches(jobs: Sequence[ColumnJob], most_rows: int) -> Iterator[list[int]]:
    """Places of jobs that can stand side by side: of the same order and kind of number, at most ``most_rows`` rows.

    More rows only where a single job has more. Quantised only come first, pruned only last; within these, like jobs
    stand beside each other.
    """
    kinds: dict[tuple[bool, str], list[int]] = {}
    for place, job in enumerate(jobs):
        kinds.setdefault((job.by_size, job.quantize.number if job.quantize else "int"), []).append(place)
    for places in kinds.values():
        batch: list[int] = []
        rows = 0
        for place in sorted(places, key=lambda place: _likeness(jobs[place])):
            rows += len(jobs[place].weight)
            if batch and rows > most_rows:
                yield batch
                batch, rows = [], len(jobs[place].weight)
            batch.append(place)
        yield batch


def _likeness(job: ColumnJob) -> tuple[int, bool, str, tuple[int, bool], int]:
    """Sorts the rows: by kind; within a kind, like beside like."""
    return job.kind, (job.pattern == "") == (job.kind == 2), job.pattern, job.groups, len(job.weight)
