"""Training samples by position. Torch-free.

A split is one row of tokens, documents in file order with an end-of-document token behind each. It is cut into
samples of ``sequence_length`` tokens and the one that follows. A run reads positions 0, 1, 2, … of an endless order:
every epoch is another permutation of all samples. What stands at a position follows from (seed, position) alone, so
the order is exact after a restart and the same however many ranks share it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parallelism.data.indexed import open_tokens
from parallelism.data.order import permute
from parallelism.data.prepared import PreparedData, Split


class TokenBatches:
    """The samples of one split of prepared data, in shuffled order; the tokens stay on disk (mapped).

    Raises ``ValueError`` where the split is shorter than one sample or the data is not there.
    """

    def __init__(self, directory: Path | str, split: Split, sequence_length: int, seed: int) -> None:
        self.prepared = PreparedData.load(directory)
        self.sequence_length = sequence_length
        self.seed = seed
        self._tokens = open_tokens(self.prepared.prefix(split))
        self.samples_per_epoch = (len(self._tokens) - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"data.sequence_length: {sequence_length}: the {split} split has only {len(self._tokens)} tokens, one"
                " more than the sequence length are needed; give more text or lower it"
            )

    def rows(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens [n, sequence_length + 1] int64 at positions ≥ 0 of the endless order.

        The inputs are ``rows[:, :-1]``, the targets ``rows[:, 1:]``.
        """
        starts = self.samples(positions) * self.sequence_length
        window = np.arange(self.sequence_length + 1, dtype=np.int64)
        return self._tokens[starts[:, None] + window].astype(np.int64)

    def samples(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which sample [n] of the split, counted from its start, stands at each position."""
        wanted = np.asarray(positions, np.int64)
        assert wanted.ndim == 1, "positions is a row"
        assert (wanted >= 0).all(), "positions begin at 0"
        epochs, indices = np.divmod(wanted, self.samples_per_epoch)
        found = np.empty_like(wanted)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            found[inside] = permute(indices[inside], self.samples_per_epoch, self.seed, int(epoch))
        return found
