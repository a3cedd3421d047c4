"""A variant as a directory that Hugging Face Transformers (and what reads its format) loads.

Weights are streamed: one layer is held at a time. The directory appears by a rename, whole or not at all. Weights of
recipes without quantisation are bfloat16, as in the compact file; quantised weights are written dequantised in float32,
so that they are exactly what was measured.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.card import model_card
from compression.compact import CompactFile
from compression.container import TensorSpec, sha256, write
from compression.huggingface import layer_tensors, outer_tensors
from compression.huggingface_config import config_json
from compression.matrix import STORED_DTYPE
from compression.recipe import Recipe
from compression.results import ExportResult, Quality
from parallelism.data.prepared import TOKENIZER, PreparedData
from parallelism.models.gpt.config import GPTConfig

FORMAT = "safetensors"
SHARD_BYTES = 5_000_000_000


def export(
    variant: str,
    directory: str,
    data_dir: str,
    *,
    quality: Quality | None = None,
    lineage: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportResult:
    """Write the variant (path of its compact file) into ``directory``, replacing what is there.

    ``data_dir`` gives the tokenizer. ``quality`` and ``lineage`` (facts such as job and candidate) go into the model
    card. Raises ``ValueError`` where Transformers has no such model or the compact file is damaged.
    """
    file, data = CompactFile(variant), PreparedData.load(data_dir)
    config = file.config
    dtype = export_dtype(file.recipe)
    document = config_json(gpt_config(file), str(dtype).removeprefix("torch."), data.end_of_document_id)
    target = Path(directory)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        _write_weights(file, draft, dtype, shard_bytes)
        weight_files = sorted(draft.glob("*.safetensors"))
        result = ExportResult(
            name=file.recipe.name,
            directory=str(target),
            format=FORMAT,
            dtype=document["dtype"],
            parameters=file.parameters,
            export_bytes=sum(path.stat().st_size for path in weight_files),
            checksums={path.name: sha256(path) for path in weight_files},
        )
        facts = _facts(file, quality, lineage or {})
        _write_json(draft / "config.json", document | {"espalier": facts})
        _write_tokenizer(draft, data, config.context)
        (draft / "README.md").write_text(model_card(result, facts), encoding="utf-8")
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def export_dtype(recipe: Recipe) -> torch.dtype:
    """The type that holds the variant's weights exactly."""
    return torch.float32 if recipe.quantize or recipe.embedding_bits != 16 else STORED_DTYPE


def gpt_config(file: CompactFile) -> GPTConfig:
    """The variant's model, which must be of the one family that can be exported."""
    config = file.config
    if not isinstance(config, GPTConfig):
        raise ValueError(f"{file.file.path}: models of family {config.family} cannot be exported")
    return config


def _write_weights(file: CompactFile, directory: Path, dtype: torch.dtype, shard_bytes: int) -> None:
    parts = _Parts(file, dtype)
    shards = _shards(parts.specs, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(directory / name, {key: parts.specs[key] for key in names}, parts.read, {"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        total = sum(spec.bytes for spec in parts.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


class _Parts:
    """The exported tensors by name, made a layer at a time; the last layer is kept."""

    def __init__(self, file: CompactFile, dtype: torch.dtype) -> None:
        self._file, self._config, self._dtype = file, gpt_config(file), dtype
        self._owner: dict[str, int | None] = {}
        self.specs: dict[str, TensorSpec] = {}
        # Names and shapes come from the same mapping as the weights, on tensors without data.
        empty = {name: torch.empty(shape, device="meta") for name, shape in file.shapes.items()}
        for index in (None, *range(self._config.layers)):
            exported = self._exported(index, _part(empty, index))
            self._owner |= dict.fromkeys(exported, index)
            self.specs |= {name: TensorSpec(dtype, tuple(tensor.shape)) for name, tensor in exported.items()}
        self._current: int | None = -1
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One tensor as it is exported."""
        index = self._owner[name]
        if index != self._current:
            self._tensors = {}
            self._tensors = self._exported(index, self._file.outer() if index is None else self._file.layer(index))
            self._current = index
        return self._tensors[name].to(self._dtype)

    def _exported(self, index: int | None, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if index is None:
            return outer_tensors(self._config, weights)
        return layer_tensors(self._config, index, weights)


def _part(tensors: Mapping[str, Tensor], index: int | None) -> dict[str, Tensor]:
    """What belongs to one layer, its prefix left off, or (None) to no layer."""
    if index is None:
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.")}
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would pass ``shard_bytes``."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(specs):
        if shards[-1] and filled + specs[name].bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += specs[name].bytes
    return shards


def _write_tokenizer(directory: Path, data: PreparedData, context: int) -> None:
    """The tokenizer as it was trained, in a class that takes ``tokenizer.json`` as it is."""
    shutil.copyfile(data.tokenizer_path, directory / TOKENIZER)
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": data.end_of_document,
        "eos_token": data.end_of_document,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", facts)


def _facts(file: CompactFile, quality: Quality | None, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What the config and the model card say of the variant; JSON-able."""
    return {
        "variant": file.recipe.name,
        "recipe": file.recipe.model_dump(mode="json", exclude_none=True),
        "lineage": dict(lineage),
        "trained": file.facts["trained"],
        "parameters": file.parameters,
        "sparsity": file.facts["sparsity"],
        "compact_bytes": file.file.bytes,
        "bits_per_parameter": 8 * file.file.bytes / file.parameters,
        "quality": quality.model_dump() if quality else None,
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _replace(draft: Path, target: Path) -> None:
    """Rename the finished directory into place; an older one is moved out of the way first, then deleted."""
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    if target.exists():
        target.rename(old)
    draft.rename(target)
    shutil.rmtree(old, ignore_errors=True)
