"""Everything that a checkpoint holds, as hashes by key: weights, optimizer state, random states."""

from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def fingerprint(checkpoint: str | Path) -> dict[str, str]:
    """Key → SHA-256 of the bytes of every tensor in the checkpoint, whatever layout wrote it."""
    reader = dcp.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {
        key: sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, tensor in tensors.items()
    }
