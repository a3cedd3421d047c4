"""Writing and reading checkpoints: one form for all engines and layouts, on a file system that all ranks share.

The directory is what megatron-core's ``dist_checkpointing`` reads: ``common.pt`` (progress, model, layout),
``.metadata`` and ``*.distcp`` (torch's distributed checkpoint, see :mod:`parallelism.engines.state` for the names) and,
written last, ``metadata.json``. Every rank writes what it holds; tensors are never gathered. An asynchronous save forks
a process per rank, whose memory is a snapshot (copy on write), and the training goes on.
"""

import dataclasses
import gc
import io
import json
import os
import pickle
import signal
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from parallelism import device
from parallelism.budget import Progress
from parallelism.engines.state import (
    ENGINE_PREFIX,
    OPTIMIZER_PREFIX,
    random_state,
    restore_random_state,
    seed_everything,
)
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.registry import FAMILIES
from parallelism.registry import load as load_dotted

RANDOM_STATE = "random_state"
MAIN_WEIGHTS = f"{OPTIMIZER_PREFIX}fp32_param."


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; raised on all ranks alike, and training can go on."""


class Savable(Protocol):
    """What a checkpoint needs of an engine; see :class:`parallelism.engines.base.Engine`."""

    layout: Layout
    config: ModelConfig
    seed: int

    def sharded_state(self) -> list[ShardedTensor]:
        """Pieces that alias weights and optimizer."""

    def restored(self, step: int) -> None:
        """The pieces have been filled."""


@dataclasses.dataclass(frozen=True)
class Written:
    """A complete checkpoint and the seconds from the beginning of its save to its end."""

    directory: Path
    seconds: float


def save(engine: Savable, progress: Progress, directory: str | Path) -> Written:
    """Write a checkpoint into ``directory``, which must be new or incomplete; returns when it is complete. Collective.

    Raises :class:`CheckpointError` on all ranks when any of them cannot write.
    """
    pending = _Pending(engine, progress, Path(directory))
    return pending.finish(pending.write())


def load(engine: Savable, directory: str | Path) -> Progress:
    """Fill the engine from a complete checkpoint of any layout, precision and engine. Collective.

    At the layout of the checkpoint random states are restored, and training goes on bit for bit; at another they are
    seeded from (seed, step). Raises ``ValueError`` when the model has other shapes or the checkpoint no optimizer,
    :class:`CheckpointError` when the files cannot be read, on all ranks alike.
    """
    reader = _Reader(Path(directory))
    reader.check_model(engine.config)
    reader.check_optimizer()
    progress = Progress(**reader.common["progress"])
    pieces = engine.sharded_state()
    same_layout = _ranks_of(engine.layout) == reader.common["ranks"]
    _agree(reader.fill(pieces))
    engine.restored(progress.step)
    if same_layout:
        restore_random_state(reader.random_state(dist.get_rank(), dist.get_world_size()))
    else:
        seed_everything(engine.seed, progress.step)
    return progress


def load_weights(engine: Savable, directory: str | Path) -> None:
    """Fill the weights, float32 masters included, from a complete checkpoint; the rest stays as new. Collective.

    The checkpoint may lack an optimizer, and have any layout, precision and engine. Moments stay at zero and the step
    at 0, random states are those of (seed, 0). Raises as :func:`load` does.
    """
    reader = _Reader(Path(directory))
    reader.check_model(engine.config)
    _agree(reader.fill([piece for piece in engine.sharded_state() if _is_weight(piece)]))
    engine.restored(0)
    seed_everything(engine.seed, 0)


def fill_weights(pieces: Sequence[ShardedTensor], directory: str | Path) -> None:
    """Fill the pieces of a model that has no engine, which must be of the stored one's shapes. Collective.

    Raises :class:`CheckpointError` when the files cannot be read.
    """
    _agree(_Reader(Path(directory)).fill(pieces))


class AsyncSaver:
    """Writes checkpoints beside the training, one at a time. All methods are collective."""

    def __init__(self, timeout_seconds: float = 3600.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._pending: _Pending | None = None
        self._writer: _Writer | None = None

    def start(self, engine: Savable, progress: Progress, directory: str | Path) -> float:
        """Take a snapshot and start writing it; returns the seconds that training stood still.

        The earlier save must have ended. Raises :class:`CheckpointError` when the snapshot cannot be taken.
        """
        assert self._pending is None, "one save at a time: call wait() before the next start()"
        started = time.perf_counter()
        pending = _Pending(engine, progress, Path(directory))
        self._writer = _Writer(pending, self._timeout_seconds)
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


Outcome = list[WriteResult] | str
"""What a rank wrote, or why it could not."""


class _Pending:
    """One save: what this rank writes and, on rank 0, the metadata of the whole."""

    def __init__(self, engine: Savable, progress: Progress, directory: Path) -> None:
        self._started = time.perf_counter()
        self._directory = directory
        self._common = _common_state(engine, progress)
        _agree(_make_directory(directory) if dist.get_rank() == 0 else None)
        self._planner = _Snapshot(engine.sharded_state())
        self._plan, self._metadata = _global_plan(self._planner.create_local_plan())
        # Copying ahead would ask for a CUDA stream, which a forked process must not; the snapshot is on the host.
        self._writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
        self._plan = self._writer.prepare_global_plan([SavePlan([])] * dist.get_rank() + [self._plan])[-1]

    def write(self) -> Outcome:
        """Write this rank's file."""
        try:
            return self._writer.write_data(self._plan, self._planner).wait()
        except (OSError, RuntimeError) as error:  # torch's serialisation turns a full disk into a RuntimeError
            return f"{type(error).__name__}: {error}"

    def finish(self, outcome: Outcome) -> Written:
        """Complete the checkpoint when all ranks have written. Collective."""
        outcomes: list[Outcome] | None = [""] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(outcome, outcomes)
        _agree(self._complete(outcomes) if outcomes is not None else None)
        return Written(self._directory, time.perf_counter() - self._started)

    def _complete(self, outcomes: list[Outcome]) -> str | None:
        failures = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if failures:
            return "; ".join(failures)
        try:
            self._writer.finish(self._metadata, [outcome for outcome in outcomes if not isinstance(outcome, str)])
            with (self._directory / COMMON_STATE_FNAME).open("wb") as file:
                torch.save(self._common, file)
                os.fsync(file.fileno())
            _write_config(self._directory / CONFIG_FNAME)
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


class _Snapshot(DefaultSavePlanner):
    """Hands this rank's tensors and random state to torch's writer."""

    def __init__(self, pieces: Sequence[ShardedTensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = {
            (piece.key, tuple(piece.global_offset)): _on_host(piece.data)
            for piece in pieces
            if is_main_replica(piece.replica_id)
        }
        self._shapes = {piece.key: torch.Size(piece.global_shape) for piece in pieces}
        self._random_state_key = _random_state_key(dist.get_rank(), dist.get_world_size())
        self._random_state = io.BytesIO()
        torch.save([random_state()], self._random_state)  # a list: megatron-core stores objects so

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(self._random_state_key), WriteItemType.BYTE_IO)]
        for (key, offset), tensor in self._tensors.items():
            chunk = ChunkStorageMetadata(torch.Size(offset), tensor.size())
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), self._shapes[key])
            items.append(WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return self._random_state
        assert write_item.index.offset is not None
        return self._tensors[write_item.index.fqn, tuple(write_item.index.offset)]


class _Writer:
    """A forked process that writes one rank's part; it never outlives its parent."""

    def __init__(self, pending: _Pending, timeout_seconds: float) -> None:
        self._deadline = time.monotonic() + timeout_seconds
        self._timeout_seconds = timeout_seconds
        self._result: IO[bytes] = os.fdopen(os.memfd_create("checkpoint"), "w+b")
        self._status: int | None = None
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _write_in_child(pending, self._result, parent)

    def ended(self) -> bool:
        """Whether the process is gone; one that is past its time is killed."""
        if self._status is None:
            self._reap(os.WNOHANG)
        if self._status is None and time.monotonic() > self._deadline:
            self.kill()
        return self._status is not None

    def outcome(self) -> Outcome:
        """Wait for the process and return what it wrote."""
        while not self.ended():
            time.sleep(0.005)
        self._result.seek(0)
        content = self._result.read()
        self._result.close()
        if self._status == 0 and content:
            outcome: Outcome = pickle.loads(content)
            return outcome
        if time.monotonic() > self._deadline:
            return f"the writing process was ended after {self._timeout_seconds:g} s"
        return f"the writing process ended with status {self._status} (negative: by that signal)"

    def kill(self) -> None:
        """End the process at once."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            self._reap(0)

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self._pid, options)
        except ChildProcessError:  # something else in this process reaps children: the result says how it went
            self._status = 0
            return
        if pid:
            self._status = os.waitstatus_to_exitcode(status)


def _write_in_child(pending: _Pending, result: IO[bytes], parent: int) -> None:
    """The life of the forked process; it leaves without the clean-up that belongs to its parent."""
    code = 1
    try:
        device.die_with_parent(parent)
        # Stopping the training must not tear the checkpoint: the parent waits for it, or dies and takes it along.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        gc.disable()  # what it would collect belongs to the parent
        torch.set_num_threads(1)  # OpenMP's threads do not exist in a forked process
        pickle.dump(pending.write(), result)
        result.flush()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


class _Reader:
    """A complete checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.common: dict[str, Any] = {}
        _agree(self._open())

    def _open(self) -> str | None:
        if not (self.directory / CONFIG_FNAME).is_file():
            return f"{self.directory} is not a complete checkpoint: {CONFIG_FNAME} is missing"
        try:
            self.common = read_common(self.directory)
            self._files = FileSystemReader(self.directory)
            self._metadata: Metadata = self._files.read_metadata()
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            return f"{self.directory} cannot be read: {type(error).__name__}: {error}"
        self._files.set_up_storage_reader(self._metadata, is_coordinator=dist.get_rank() == 0)
        return None

    def check_model(self, config: ModelConfig) -> None:
        """Raise ``ValueError`` unless the checkpoint holds a model of the same shapes."""
        fields: dict[str, Any] = self.common["model"]
        saved: ModelConfig = load_dotted(FAMILIES[fields["family"]].options)(**fields)
        if saved.parameter_shapes() == config.parameter_shapes():
            return
        wanted = config.model_dump(mode="json")
        differing = {name for name in fields.keys() | wanted.keys() if fields.get(name) != wanted.get(name)}
        raise ValueError(
            f"the model does not fit the checkpoint {self.directory}: "
            + ", ".join(
                f"{name} is {wanted.get(name)}, the checkpoint has {fields.get(name)}" for name in sorted(differing)
            )
            + "; use the checkpoint's values, or start without it"
        )

    def check_optimizer(self) -> None:
        """Raise ``ValueError`` where weights alone were stored."""
        if not any(key.startswith(OPTIMIZER_PREFIX) for key in self._metadata.state_dict_metadata):
            raise ValueError(
                f"{self.directory} holds weights without an optimizer, so that no training can go on from it: begin "
                "there (start.weights instead of resume_from)"
            )

    def fill(self, pieces: Sequence[ShardedTensor]) -> str | None:
        """Read the pieces into the memory that they alias; returns what went wrong."""
        planner, items = _Destination(), []
        for index, piece in enumerate(pieces):
            planner.tensors.append(piece.data)
            if piece.key.startswith(ENGINE_PREFIX) and piece.key not in self._metadata.state_dict_metadata:
                continue  # another engine wrote the checkpoint
            stored = self._metadata.state_dict_metadata[self._source(piece)]
            assert isinstance(stored, TensorStorageMetadata)
            assert tuple(stored.size) == tuple(piece.global_shape), f"{piece.key}: {stored.size}"
            chunk = ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(piece.local_shape))
            for item in create_read_items_for_chunk_list(self._source(piece), stored, [chunk]):
                items.append(dataclasses.replace(item, dest_index=MetadataIndex(piece.key, index=index)))
        try:
            self._files.read_data(LoadPlan(items), planner).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            return f"{self.directory} cannot be read: {type(error).__name__}: {error}"
        return None

    def _source(self, piece: ShardedTensor) -> str:
        """The stored tensor to read a piece from: the most precise one, where the precisions differ."""
        stored = self._metadata.state_dict_metadata
        key: str = piece.key
        if key.startswith(MAIN_WEIGHTS) and key not in stored:
            return key.removeprefix(MAIN_WEIGHTS)
        if piece.dtype == torch.float32 and MAIN_WEIGHTS + key in stored:
            return MAIN_WEIGHTS + key
        return key

    def random_state(self, rank: int, world_size: int) -> dict[str, Any]:
        """The random states that this rank of the same layout had."""
        key = _random_state_key(rank, world_size)
        index = next(index for index in self._metadata.storage_data if index.fqn == key)
        info = self._metadata.storage_data[index]
        with (self.directory / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            (state,) = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        result: dict[str, Any] = state
        return result


class _Destination(DefaultLoadPlanner):
    """Tells torch's reader where each piece lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        assert read_item.dest_index.index is not None
        tensor = self.tensors[read_item.dest_index.index]
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            tensor = tensor.narrow(axis, offset, length)
        return tensor

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the tensor is the engine's own memory."""


def read_common(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself: ``progress``, ``model``, ``layout``, ``ranks``, ``seed``."""
    common: dict[str, Any] = torch.load(Path(directory) / COMMON_STATE_FNAME, weights_only=True)
    return common


def _common_state(engine: Savable, progress: Progress) -> dict[str, Any]:
    return {
        "progress": dataclasses.asdict(progress),
        "model": engine.config.model_dump(mode="json"),
        "layout": engine.layout.model_dump(mode="json"),
        "ranks": _ranks_of(engine.layout),
        "seed": engine.seed,
    }


def _is_weight(piece: ShardedTensor) -> bool:
    """Whether it is of the weights or of their float32 masters."""
    return piece.key.startswith(MAIN_WEIGHTS) or not piece.key.startswith((OPTIMIZER_PREFIX, ENGINE_PREFIX))


def _ranks_of(layout: Layout) -> list[int]:
    """What must be equal for a rank's random states to have the same meaning."""
    return [layout.tensor, layout.pipeline, layout.data, layout.virtual_pipeline, int(layout.sequence_parallel)]


def _random_state_key(rank: int, world_size: int) -> str:
    key: str = ShardedObject(RANDOM_STATE, None, (world_size,), (rank,)).unique_key
    return key


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def _make_directory(directory: Path) -> str | None:
    """Make the directory and clear what a failed save has left in it; returns what went wrong."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / CONFIG_FNAME).exists():
            return f"{directory} already holds a complete checkpoint"
        for pattern in ("*.distcp", ".metadata*", COMMON_STATE_FNAME):
            for file in directory.glob(pattern):
                file.unlink()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _global_plan(local: SavePlan) -> tuple[SavePlan, Metadata]:
    """This rank's plan with its place in the whole and, on rank 0, the metadata of the whole. Collective."""
    plans: list[SavePlan] | None = [local] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(local, plans)
    if plans is None:
        return local, Metadata({})
    _, metadata = create_default_global_save_plan(plans)
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            written = sum(chunk.sizes.numel() for chunk in stored.chunks)
            assert written == stored.size.numel(), f"{key}: {written} elements are written of {stored.size.numel()}"
    return local, metadata


def _write_config(path: Path) -> None:
    """Mark the checkpoint complete, in megatron-core's words."""
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(CheckpointingConfig("torch_dist")), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _agree(error: str | None) -> None:
    """Raise :class:`CheckpointError` on every rank when any of them passes an error. Collective."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    found = sorted({error for error in errors if error})
    if found:
        raise CheckpointError("; ".join(found))


def _all_true(value: bool) -> bool:
    """Whether ``value`` is true on every rank. Collective."""
    flag = torch.tensor([int(value)], device=device.device())
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())
