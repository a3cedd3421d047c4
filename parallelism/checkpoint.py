"""Writing and reading checkpoints: one form for all engines and layouts, in a place that all ranks share.

The form is that of :mod:`parallelism.checkpoint_files`, which has ``CheckpointError`` too. An asynchronous save forks a
process per rank, and the training goes on beside it.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallelism import device
from parallelism.budget import Progress
from parallelism.checkpoint_files import agree, ranks_of
from parallelism.checkpoint_reading import Reader, is_weight
from parallelism.checkpoint_writing import Pending, Savable, Written
from parallelism.engines.state import restore_random_state, seed_everything
from parallelism.forked_writer import ForkedWriter


def save(engine: Savable, progress: Progress, directory: str | Path) -> Written:
    """Write a checkpoint into ``directory``, which must be new or incomplete; returns when it is complete. Collective.

    Raises :class:`CheckpointError` on all ranks when any of them cannot write.
    """
    pending = Pending(engine, progress, Path(directory))
    return pending.finish(pending.share(pending.write()))


def load(engine: Savable, directory: str | Path) -> Progress:
    """Fill the engine from a complete checkpoint of any layout, precision and engine. Collective.

    At the layout of the checkpoint random states are restored, and training goes on bit for bit; at another they are
    seeded from (seed, step). Raises ``ValueError`` when the model has other shapes or the checkpoint no optimizer,
    :class:`CheckpointError` when the files cannot be read, on all ranks alike.
    """
    reader = Reader(Path(directory))
    reader.check_model(engine.config)
    reader.check_optimizer()
    progress = Progress(**reader.common["progress"])
    pieces = engine.sharded_state()
    same_layout = ranks_of(engine.layout) == reader.common["ranks"]
    agree(reader.fill(pieces))
    engine.restored(progress.step)
    if same_layout:
        restore_random_state(reader.random_state(dist.get_rank(), dist.get_world_size()))
    else:
        seed_everything(engine.seed, progress.step)
    reader.close()
    return progress


def load_weights(engine: Savable, directory: str | Path) -> None:
    """Fill the weights, float32 masters included, from a complete checkpoint; the rest stays as new. Collective.

    The checkpoint may lack an optimizer, and have any layout, precision and engine. Moments stay at zero and the step
    at 0, random states are those of (seed, 0). Raises as :func:`load` does.
    """
    reader = Reader(Path(directory))
    reader.check_model(engine.config)
    agree(reader.fill([piece for piece in engine.sharded_state() if is_weight(piece)]))
    reader.close()
    engine.restored(0)
    seed_everything(engine.seed, 0)


def fill_weights(pieces: Sequence[ShardedTensor], directory: str | Path) -> None:
    """Fill the pieces of a model that has no engine, which must be of the stored one's shapes. Collective.

    Raises :class:`CheckpointError` when the files cannot be read.
    """
    reader = Reader(Path(directory))
    agree(reader.fill(pieces))
    reader.close()


class AsyncSaver:
    """Writes checkpoints beside the training, one at a time. All methods are collective."""

    def __init__(self) -> None:
        self._pending: Pending | None = None
        self._writer: ForkedWriter | None = None

    def start(self, engine: Savable, progress: Progress, directory: str | Path) -> float:
        """Take a snapshot and start writing it; returns the seconds that training stood still.

        The earlier save must have ended. Raises :class:`CheckpointError` when the snapshot cannot be taken, and
        ``OSError``, on this rank alone, when no process can be forked to write it.
        """
        assert self._pending is None, "one save at a time: call wait() before the next start()"
        started = time.perf_counter()
        pending = Pending(engine, progress, Path(directory))
        self._writer = ForkedWriter(pending.write, pending.share)
        self._pending = pending
        return time.perf_counter() - started

    def poll(self) -> Written | None:
        """The checkpoint, once, when it has become complete; raises :class:`CheckpointError` when it has failed."""
        if self._pending is None or not _all_true(self._writer is None or self._writer.ended()):
            return None
        return self.wait()

    def wait(self) -> Written | None:
        """Wait for the save in flight, if there is one; returns and raises as :meth:`poll` does."""
        pending, writer, self._pending, self._writer = self._pending, self._writer, None, None
        if pending is None:
            return None
        assert writer is not None
        return pending.finish(writer.outcome())

    def close(self) -> None:
        """End the writing process of this rank at once, complete or not. Not collective; for clean-up."""
        writer, self._pending, self._writer = self._writer, None, None
        if writer is not None:
            writer.kill()


def _all_true(value: bool) -> bool:
    """Whether ``value`` is true on every rank. Collective."""
    flag = torch.tensor([int(value)], device=device.device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())
