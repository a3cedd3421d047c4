"""Reading a checkpoint, at any layout, into the memory of a model or an engine."""

import dataclasses
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallelism import places
from parallelism.checkpoint_files import COMPLETE, agree, read_common
from parallelism.engines.state import ENGINE_PREFIX, OPTIMIZER_PREFIX, random_state_key
from parallelism.models.base import ModelConfig
from parallelism.registry import FAMILIES
from parallelism.registry import load as load_dotted

MAIN_WEIGHTS = f"{OPTIMIZER_PREFIX}fp32_param."


class Reader:
    """A complete checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.common: dict[str, Any] = {}
        agree(self._open())

    def close(self) -> None:
        """Delete this machine's copy, where it is one; once all ranks have read. Collective."""
        if places.is_mirrored(self.directory):
            agree(None)
            places.forget(self.directory)

    def _open(self) -> str | None:
        try:
            places.need(self.directory)
        except OSError as error:
            return f"{self.directory} cannot be fetched: {error}"
        if not (self.directory / COMPLETE).is_file():
            return f"{self.directory} is not a complete checkpoint: {COMPLETE} is missing"
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
        wanted, found = dict(config), dict(saved)
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"the model does not fit the checkpoint {self.directory}: "
            + ", ".join(f"{name} is {wanted.get(name)}, the checkpoint has {found.get(name)}" for name in differing)
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
        key = random_state_key(rank, world_size)
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


def is_weight(piece: ShardedTensor) -> bool:
    """Whether it is of the weights or of their float32 masters."""
    return piece.key.startswith(MAIN_WEIGHTS) or not piece.key.startswith((OPTIMIZER_PREFIX, ENGINE_PREFIX))
