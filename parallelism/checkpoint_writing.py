"""Writing a checkpoint: every rank writes what it holds, in its own process or in one forked from it.

A forked process's memory is a snapshot (copy on write), so that training goes on beside it. Tensors are never gathered.
Where checkpoints lie in an object store, every rank writes to its machine's copy, uploads that and deletes it.
"""

import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallelism import places
from parallelism.budget import Progress
from parallelism.checkpoint_files import COMMON, COMPLETE, FORMAT, agree, common_state, ranks_of
from parallelism.engines.state import random_state, random_state_key
from parallelism.forked_writer import Outcome
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig


class Savable(Protocol):
    """What a checkpoint needs of an engine; see :class:`parallelism.engines.base.Engine`."""

    layout: Layout
    config: ModelConfig
    seed: int

    def sharded_state(self) -> list[ShardedTensor]:
        """Pieces that alias weights and optimizer."""

    def restored(self, step: int) -> None:
        """The pieces have been filled."""


@dataclass(frozen=True)
class Written:
    """A complete checkpoint and the seconds from the beginning of its save to its end."""

    directory: Path
    seconds: float


class Pending:
    """One save: what this rank writes and, on rank 0, the metadata of the whole."""

    def __init__(self, engine: Savable, progress: Progress, directory: Path) -> None:
        self._started = time.perf_counter()
        self._directory = directory
        self._common = common_state(engine.config, engine.layout, progress, ranks_of(engine.layout), engine.seed)
        # Each machine has a copy of its own where the directory is one of an object store.
        agree(_make_directory(directory) if dist.get_rank() == 0 or places.is_mirrored(directory) else None)
        self._planner = Snapshot(engine.sharded_state())
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

    def share(self, outcome: Outcome) -> Outcome:
        """Let the others see what this rank wrote; returns what it was given, or why that could not be."""
        if isinstance(outcome, str):
            return outcome
        try:
            for name in sorted({result.storage_data.relative_path for result in outcome}):
                places.share(self._directory / name, keep=False)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return outcome

    def finish(self, outcome: Outcome) -> Written:
        """Complete the checkpoint when all ranks have written. Collective."""
        outcomes: list[Outcome] | None = [""] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(outcome, outcomes)
        agree(self._complete(outcomes) if outcomes is not None else None)
        return Written(self._directory, time.perf_counter() - self._started)

    def _complete(self, outcomes: list[Outcome]) -> str | None:
        failures = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if isinstance(outcome, str)]
        if failures:
            return "; ".join(failures)
        try:
            self._writer.finish(self._metadata, [outcome for outcome in outcomes if not isinstance(outcome, str)])
            with (self._directory / COMMON).open("wb") as file:
                torch.save(self._common, file)
                os.fsync(file.fileno())
            _write_config(self._directory / COMPLETE)
            places.share(self._directory, keep=False)
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


class Snapshot(DefaultSavePlanner):
    """Hands this rank's tensors and random state to torch's writer."""

    def __init__(self, pieces: Sequence[ShardedTensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = {
            (piece.key, tuple(piece.global_offset)): _on_host(piece.data)
            for piece in pieces
            if is_main_replica(piece.replica_id)
        }
        self._shapes = {piece.key: torch.Size(piece.global_shape) for piece in pieces}
        self._random_state_key = random_state_key(dist.get_rank(), dist.get_world_size())
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


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def _make_directory(directory: Path) -> str | None:
    """Make the directory and clear what a failed save has left in it; returns what went wrong."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / COMPLETE).exists():
            return f"{directory} already holds a complete checkpoint"
        for pattern in ("*.distcp", ".metadata*", COMMON):
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
        json.dump(FORMAT, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
