"""One layer out of a sharded checkpoint, in a plain process: no process group, no megatron-core.

The checkpoint holds one key per layer (contract 3), possibly in several shards. Only the byte ranges of the wanted
tensors are read, whatever layout wrote them; the optimizer's are never touched.
"""

import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from parallelism import places
from parallelism.checkpoint_store import CheckpointInfo, read_info
from parallelism.models.base import ModelConfig, PlainFamily
from parallelism.registry import FAMILIES, load

LAYER_PREFIX = "decoder.layers."
NOT_THE_MODEL = ("optimizer.", "engine.")
"""What else a checkpoint holds tensors of."""


class LayerReader:
    """Reads the model weights of one complete checkpoint, part by part.

    Raises ``ValueError`` where ``directory`` is not a complete, undamaged checkpoint; so do the methods, naming the
    layer.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.info: CheckpointInfo = read_info(self.directory)
        self._metadata = _read_metadata(self.directory)
        self._tensors = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(NOT_THE_MODEL)
        }

    @property
    def config(self) -> ModelConfig:
        """The model, from the checkpoint's manifest."""
        return self.info.model

    def layer(self, index: int) -> dict[str, Tensor]:
        """The weights of layer ``index`` in float32, named as stored, without ``decoder.layers.{index}.``."""
        assert 0 <= index < self.config.layers, f"layer {index} of {self.config.layers}"
        prefix = f"{LAYER_PREFIX}{index}."
        return self._read([key for key in self._tensors if key.startswith(prefix)], prefix, f"layer {index}")

    def outer(self) -> dict[str, Tensor]:
        """What stands outside the layers (embeddings, final norm, output layer) in float32, named as stored."""
        return self._read([key for key in self._tensors if not key.startswith(LAYER_PREFIX)], "", "the outer weights")

    def _read(self, keys: list[str], prefix: str, what: str) -> dict[str, Tensor]:
        remedy = "use another checkpoint of the same run"
        if not keys:
            raise ValueError(f"{self.directory} holds nothing of {what}: {remedy}")
        incomplete = [key for key in keys if not _covered(self._tensors[key])]
        if incomplete:
            raise ValueError(f"{self.directory}: {what}: shards of {', '.join(incomplete)} are missing: {remedy}")
        try:
            return {key.removeprefix(prefix): _whole(self.directory, self._metadata, key).float() for key in keys}
        except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.directory}: {what} cannot be read ({error}): {remedy}") from error


class CheckpointWeights:
    """A checkpoint's weights by canonical name, one layer at a time, as a plain family's functions take them."""

    def __init__(self, directory: str | Path, device: torch.device | str = "cpu") -> None:
        self.reader = LayerReader(directory)
        self.device = torch.device(device)

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return self.reader.config

    def layer(self, index: int) -> dict[str, Tensor]:
        """Canonical name → float32 tensor of layer ``index``, prefix ``layers.{index}.`` left off."""
        return self._moved(plain_family(self.config).split_layer(self.config, self.reader.layer(index)))

    def outer(self) -> dict[str, Tensor]:
        """Canonical name → float32 tensor of everything outside the layers, vocabulary unpadded."""
        return self._moved(plain_family(self.config).split_outer(self.config, self.reader.outer()))

    def _moved(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in weights.items()}


def plain_family(config: ModelConfig) -> PlainFamily:
    """The plain form of the model's family."""
    family: PlainFamily = load(FAMILIES[config.family].plain)
    return family


def _read_metadata(directory: Path) -> Metadata:
    try:
        places.need(directory / ".metadata")
        return FileSystemReader(directory).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{directory}: its .metadata cannot be read ({error}): use another checkpoint") from error


def _covered(entry: TensorStorageMetadata) -> bool:
    """Whether the shards make up the whole tensor (shards never overlap)."""
    return sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.size)


def _whole(directory: Path, metadata: Metadata, key: str) -> Tensor:
    """One tensor, put together from its shards; each shard's bytes are read once, as they lie in its file."""
    entry = metadata.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    for chunk in entry.chunks:
        place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        data = _stored_range(directory / place.relative_path, place.offset, place.length)
        shard = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        window = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        tensor[window].copy_(shard)
    return tensor


def _stored_range(path: Path, start: int, count: int) -> bytes | bytearray:
    """As :func:`read_range`, of a file that may be in an object store; it is not fetched."""
    return places.read_range(path, start, count) if places.is_mirrored(path) else read_range(path, start, count)


def read_range(path: Path, start: int, count: int) -> bytearray:
    """``count`` bytes of a file from ``start`` on, and no byte more. Raises ``EOFError`` where the file ends before."""
    data = bytearray(count)
    view, filled = memoryview(data), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while filled < count:
            got = file.readinto(view[filled:])
            if not got:
                raise EOFError(f"{path} ends {count - filled} bytes early")
            filled += got
    return data
