"""A checkpoint from a plain process: no process group, no megatron-core, one layer of weights in memory at a time.

What is written has the form of :mod:`parallelism.checkpoint_files` without an optimizer: training can start from it at
any layout and with any engine (:func:`parallelism.checkpoint.load_weights`), and layers can be read from it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from parallelism import places
from parallelism.budget import Progress
from parallelism.checkpoint_files import COMMON, COMPLETE, FORMAT, common_state, read_common
from parallelism.checkpoint_store import CheckpointInfo, declare_complete, read_info
from parallelism.layer_reader import LAYER_PREFIX, plain_family
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.training import TrainingConfig


class Weights(Protocol):
    """A model's weights by canonical name, one layer at a time."""

    @property
    def config(self) -> ModelConfig:
        """The model."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """Canonical name → tensor of one layer, its prefix left off."""

    def outer(self) -> dict[str, Tensor]:
        """Canonical name → tensor of everything outside the layers, vocabulary unpadded."""


def write_checkpoint(weights: Weights, directory: str | Path, fingerprint: str) -> CheckpointInfo:
    """Make ``directory`` a complete checkpoint of ``weights`` in float32, at step 0, without an optimizer.

    ``fingerprint`` says what the weights came from: a checkpoint of the same ones is left as it is, another is
    replaced. The directory appears whole, so that a killed process leaves nothing under its name. Raises ``ValueError``
    for weights of other shapes than the config's, ``OSError`` where it cannot be written.
    """
    directory = Path(directory)
    if _holds(directory, fingerprint):
        return read_info(directory)
    draft = _draft(directory)
    draft.mkdir(parents=True)
    try:
        _write_tensors(weights, draft)
        common = common_state(weights.config, Layout(), Progress(), ranks=(), seed=0) | {"source": fingerprint}
        _write_synced(draft / COMMON, lambda path: torch.save(common, path))
        _write_synced(draft / COMPLETE, lambda path: path.write_text(json.dumps(FORMAT), encoding="utf-8"))
        places.share(draft, keep=False)
        declare_complete(
            draft,
            progress=Progress(),
            epoch=0,
            model=weights.config,
            layout=Layout(),
            training=TrainingConfig(),
            seed=0,
            sequence_length=weights.config.context,
        )
        if draft != directory:
            _take_place(draft, directory, fingerprint)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return read_info(directory)


def _holds(directory: Path, fingerprint: str) -> bool:
    """Whether the directory is a complete checkpoint of what ``fingerprint`` names."""
    try:
        read_info(directory)
    except ValueError:
        return False
    places.need(directory / COMMON)
    return read_common(directory).get("source") == fingerprint


def _draft(directory: Path) -> Path:
    """Where to write: in an object store nothing is renamed, and nothing counts before the manifest."""
    if places.is_mirrored(directory):
        places.remove(directory)
        return directory
    return directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")


def _take_place(draft: Path, directory: Path, fingerprint: str) -> None:
    """Rename the draft; a process that was faster with the same weights keeps its place."""
    try:
        draft.rename(directory)
    except OSError:
        if _holds(directory, fingerprint):
            return
        shutil.rmtree(directory)
        draft.rename(directory)


def _write_tensors(weights: Weights, directory: Path) -> None:
    """One file per layer and one for the rest, then the index of all."""
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    metadata, results = Metadata({}), list[list[WriteResult]]()
    for number, tensors in enumerate(_stored(weights)):
        planner = _Planner(tensors)
        plan = SavePlan([_item(name, tensor) for name, tensor in tensors.items()])
        metadata.state_dict_metadata |= {name: _entry(tensor) for name, tensor in tensors.items()}
        # The place in the list becomes the file's number.
        plan = writer.prepare_global_plan([SavePlan([])] * number + [plan])[-1]
        results.append(writer.write_data(plan, planner).wait())
    writer.finish(metadata, results)


def _stored(weights: Weights) -> Iterator[dict[str, Tensor]]:
    """What stands outside the layers, then layer by layer: stored name → float32 tensor."""
    config, family = weights.config, plain_family(weights.config)
    yield _float32(family.join_outer(config, weights.outer()), "")
    for index in range(config.layers):
        yield _float32(family.join_layer(config, weights.layer(index)), f"{LAYER_PREFIX}{index}.")


def _float32(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}


class _Planner(DefaultSavePlanner):
    """Hands tensors to torch's writer."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._tensors[write_item.index.fqn]


def _item(name: str, tensor: Tensor) -> WriteItem:
    data = TensorWriteData(_chunk(tensor), TensorProperties.create_from_tensor(tensor), tensor.size())
    return WriteItem(MetadataIndex(name, _chunk(tensor).offsets), WriteItemType.SHARD, tensor_data=data)


def _entry(tensor: Tensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.size(), [_chunk(tensor)])


def _chunk(tensor: Tensor) -> ChunkStorageMetadata:
    """The whole tensor as its only shard."""
    return ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.size())


def _write_synced(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
