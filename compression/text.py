"""The text that statistics are taken from, and how it is cut into shards. Torch-free."""

from parallelism.data.batches import TokenBatches
from parallelism.options import Options

SHARD_SEQUENCES = 32


class CalibrationText(Options):
    """Held-in text: the first ``sequences`` of the training split's order for ``seed``."""

    data_dir: str
    sequence_length: int
    sequences: int
    seed: int
    damping: float

    def batches(self) -> TokenBatches:
        """The text, by position."""
        return TokenBatches(self.data_dir, "train", self.sequence_length, self.seed)


def shards(sequences: int) -> list[range]:
    """Positions of every shard."""
    return [range(first, min(first + SHARD_SEQUENCES, sequences)) for first in range(0, sequences, SHARD_SEQUENCES)]
