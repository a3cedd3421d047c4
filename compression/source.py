"""What is compressed: a model's weights, layer by layer, wherever they lie."""

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from compression.evaluation import Weights
from parallelism.checkpoint_store import MANIFEST, read_info
from parallelism.layer_reader import CheckpointWeights
from parallelism.models.base import ModelConfig


@dataclass(frozen=True)
class Source:
    """A model that can be compressed."""

    config: ModelConfig
    fingerprint: str
    """Hash of what identifies its weights, without reading them."""
    trained: dict[str, Any]
    """Progress of its training, as far as it is known; JSON-able."""


def read_source(path: str | Path) -> Source:
    """What lies at ``path``. Raises ``ValueError`` where it is no model that can be read, with what is wrong."""
    try:
        manifest = (Path(path) / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} is no complete checkpoint (no {MANIFEST}): name another") from None
    info = read_info(path)
    return Source(info.model, sha256(manifest).hexdigest(), asdict(info.progress))


def open_weights(path: str | Path, device: torch.device | str = "cpu") -> Weights:
    """The weights at ``path``, one layer at a time. Raises ``ValueError`` as :func:`read_source` does."""
    return CheckpointWeights(path, device)
