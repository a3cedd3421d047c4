"""What is compressed: a model's weights, layer by layer, wherever they lie.

A source is one of our checkpoints, a Hugging Face directory of a Llama or GPT-2 model, or one of our compact files.
"""

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from compression.compact import CompactFile
from compression.container import TensorFile
from compression.evaluation import Weights
from compression.pretrained import CONFIG, PretrainedWeights
from parallelism import places
from parallelism.checkpoint_store import MANIFEST, read_info
from parallelism.data.prepared import TOKENIZER
from parallelism.layer_reader import CheckpointWeights, read_range
from parallelism.models.base import ModelConfig

SAMPLES, SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class Source:
    """A model that can be compressed."""

    config: ModelConfig
    fingerprint: str
    """Hash of what identifies its weights, without reading all of them.

    Of a checkpoint: its manifest. Of safetensors files: ``config.json``, and of every file name, size, header and
    :data:`SAMPLES` pieces of :data:`SAMPLE_BYTES` bytes, evenly spread from its first byte to its last. Weights that
    are changed in place, and only between these pieces, are not noticed.
    """
    trained: dict[str, Any]
    """Progress of its training, as far as it is known, else empty; JSON-able."""


def read_source(path: str | Path) -> Source:
    """What lies at ``path``. Raises ``ValueError`` where it is no model that can be read, with what is wrong."""
    path = Path(path)
    if _is_checkpoint(path):
        info = read_info(path)
        return Source(info.model, sha256(places.read_bytes(path / MANIFEST)).hexdigest(), asdict(info.progress))
    if path.is_dir():
        weights = PretrainedWeights(path)
        config = (path / CONFIG).read_bytes()
        return Source(weights.config, _fingerprint(config, weights.files), {})
    compact = CompactFile(path)
    return Source(compact.config, _fingerprint(b"", [compact.file]), compact.facts["trained"])


def open_weights(path: str | Path, device: torch.device | str = "cpu") -> Weights:
    """The weights at ``path``, one layer at a time. Raises ``ValueError`` as :func:`read_source` does."""
    path = Path(path)
    if _is_checkpoint(path):
        return CheckpointWeights(path, device)
    return PretrainedWeights(path, device) if path.is_dir() else CompactFile(path, device)


def find_tokenizer(path: str | Path) -> Path:
    """The ``tokenizer.json`` of a Hugging Face directory, as ``data.tokenizer`` of kind ``file`` takes it.

    Raises ``ValueError`` where there is none.
    """
    tokenizer = Path(path) / TOKENIZER
    if not tokenizer.is_file():
        raise ValueError(
            f"{path} holds no {TOKENIZER}: write one with Transformers (AutoTokenizer.from_pretrained and"
            " save_pretrained), or name another in data.tokenizer"
        )
    return tokenizer


def _is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint's directory. Raises ``ValueError`` where nothing can be read."""
    if places.exists(path / MANIFEST):
        return True
    places.need(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist: name a checkpoint or a Hugging Face directory")
    if path.is_dir() and not (path / CONFIG).is_file():
        raise ValueError(f"{path} is no complete checkpoint (no {MANIFEST}) and holds no {CONFIG}: name another")
    return False


def _fingerprint(config: bytes, files: list[TensorFile]) -> str:
    digest = sha256(config)
    for file in files:
        digest.update(f"{file.path.name} {file.bytes} {file.header_digest}".encode())
        last = max(0, file.bytes - SAMPLE_BYTES)
        for piece in range(SAMPLES):
            start = last * piece // (SAMPLES - 1)
            digest.update(read_range(file.path, start, min(SAMPLE_BYTES, file.bytes)))
    return digest.hexdigest()
