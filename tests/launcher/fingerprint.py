"""What a run brought, as hashes: what a checkpoint holds (weights, optimizer, random states), and variants."""

from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from compression.container import TensorFile


def fingerprint(checkpoint: str | Path) -> dict[str, str]:
    """Key → SHA-256 of every tensor's bytes, whatever layout wrote it, and of every rank's random state."""
    reader = dcp.FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    content = {key: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items()}
    return {key: sha256(part).hexdigest() for key, part in (content | _objects(Path(checkpoint), metadata)).items()}


def _objects(checkpoint: Path, metadata: Metadata) -> dict[str, bytes]:
    """The bytes of everything that is not a tensor, as they lie in the files."""
    found = {}
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            with (checkpoint / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                found[index.fqn] = file.read(place.length)
    return found


def tensors_checksum(variant: str | Path) -> str:
    """SHA-256 of a compact file's tensors; its header also tells which grid it is of, and is left out."""
    file, digest = TensorFile(variant), sha256()
    for name in sorted(file.specs):
        digest.update(f"{name} {file.specs[name]}".encode())
        digest.update(file.read(name).view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
