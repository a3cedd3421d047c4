"""Which samples each data-parallel rank gets, step by step."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from parallelism.models.base import Batch


class Rows(Protocol):
    """Samples by position, as :class:`parallelism.data.batches.TokenBatches` holds them."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the order begins anew."""

    def rows(self, positions: Sequence[int]) -> np.ndarray:
        """Token ids [n, sequence_length + 1] int64."""


class Feed:
    """Cuts a stretch of positions into micro-batches and takes this data rank's share of them.

    Micro-batch k of a stretch holds its positions [k·micro_batch, (k+1)·micro_batch), and data rank r of D takes the
    micro-batches r, D + r, 2D + r, …: what a stretch holds, and how it is cut, does not depend on D.
    """

    def __init__(
        self, source: Rows, collate: Callable[[np.ndarray], Batch], micro_batch: int, data: int, data_rank: int
    ) -> None:
        self._source = source
        self._collate = collate
        self._micro_batch = micro_batch
        self._data = data
        self._data_rank = data_rank

    @property
    def smallest(self) -> int:
        """The fewest samples that give every data rank one micro-batch."""
        return self._micro_batch * self._data

    def micro_batches(self, first: int, count: int) -> list[Batch]:
        """This rank's micro-batches of the positions [first, first + count)."""
        assert count % self.smallest == 0
        starts = range(first + self._data_rank * self._micro_batch, first + count, self.smallest)
        return [self._collate(self._source.rows(range(start, start + self._micro_batch))) for start in starts]

    def up_to(self, samples: int, multiple: int) -> int:
        """The largest multiple not above ``samples`` nor an epoch; at least one times ``multiple``."""
        assert multiple % self.smallest == 0
        return max(1, min(samples, self._source.samples_per_epoch) // multiple) * multiple
