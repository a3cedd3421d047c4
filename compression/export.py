"""A variant as a directory that Hugging Face Transformers (and what reads its format) loads.

Weights are streamed: one layer is held at a time. The directory appears by a rename, whole or not at all. Quantised
variants of Llama style are written in the formats of compressed-tensors, everything else dense. Dense weights of
recipes without quantisation are bfloat16, as in the compact file; what is quantised there and dense here (embeddings
always) is written dequantised in float32, so that it is exactly what was measured.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compression.card import model_card
from compression.checks import CONV1D, check_exportable
from compression.compact import CompactFile
from compression.container import TensorSpec, sha256, write
from compression.huggingface import layer_tensors, linear_module, outer_tensors
from compression.huggingface_config import config_json
from compression.matrix import STORED_DTYPE, Encoding
from compression.quantized_format import quantization_config, stored_format, stored_specs, stored_tensors
from compression.results import ExportFormat, ExportResult, Quality
from parallelism import places
from parallelism.data.prepared import TOKENIZER, PreparedData
from parallelism.models.gpt.config import GPTConfig

DENSE = "safetensors"
SHARD_BYTES = 5_000_000_000
UNQUANTIZED_BITS = 16
COMPACT = "espalier/compact.safetensors"
"""A sparse variant's compact file, in a folder of its own: engines load all safetensors files beside the config."""


def export(
    variant: str,
    directory: str,
    data_dir: str,
    *,
    format: ExportFormat = "auto",
    quality: Quality | None = None,
    lineage: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> ExportResult:
    """Write the variant (path of its compact file) into ``directory``, replacing what is there.

    ``format``: ``safetensors`` is dense, ``auto`` writes what is quantised in compressed-tensors where that loads (the
    result says why, where it does not), ``compressed-tensors`` insists on it. ``data_dir`` gives the tokenizer.
    ``quality`` and ``lineage`` (facts such as job and candidate) go into the model card. Raises ``ValueError`` where
    Transformers has no such model or the compact file is damaged.
    """
    file, data = CompactFile(variant), PreparedData.load(data_dir)
    plan = _plan(file, format)
    document = config_json(gpt_config(file), plan.dtype, data.end_of_document_id) | plan.config
    facts = _facts(file, quality, lineage or {}) | {"format": plan.format, "note": plan.note}
    target = Path(directory)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        if file.recipe.prune:
            facts["mask"] = _mask_facts(file)
            facts["compact_file"] = _copy_compact(file, draft)
        _write_weights(file, plan, draft, shard_bytes, facts)
        weight_files = sorted(draft.glob("*.safetensors"))
        result = ExportResult(
            name=file.recipe.name,
            variant=variant,
            directory=str(target),
            format=plan.format,
            note=plan.note,
            dtype=plan.dtype,
            parameters=file.parameters,
            export_bytes=sum(path.stat().st_size for path in weight_files),
            checksums={path.name: sha256(path) for path in weight_files},
        )
        _write_json(draft / "config.json", document | {"espalier": facts})
        _write_tokenizer(draft, data, file.config.context)
        (draft / "README.md").write_text(model_card(result, facts), encoding="utf-8")
        if places.is_mirrored(target):
            places.remove(target)  # what an export of other inputs has left
        _replace(draft, target)
        places.share(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return result


def gpt_config(file: CompactFile) -> GPTConfig:
    """The variant's model, which must be of the one family that can be exported."""
    config = file.config
    if not isinstance(config, GPTConfig):
        raise ValueError(f"{file.file.path}: models of family {config.family} cannot be exported")
    return config


@dataclass(frozen=True)
class _Quantized:
    """A matrix that is written with its codes."""

    module: str
    encoding: Encoding
    layout: str


@dataclass(frozen=True)
class _Plan:
    """How a variant is written."""

    format: str
    dtype: str
    """What engines compute in unless told otherwise; it holds every value exactly."""
    note: str | None
    """Why a quantised variant is written dense."""
    matrices: Mapping[str, _Quantized]
    """By canonical name; empty for a dense file."""
    config: dict[str, Any]
    """What is added to ``config.json``."""


def _plan(file: CompactFile, wanted: ExportFormat) -> _Plan:
    quantize = file.recipe.quantize
    if quantize is None or wanted == "safetensors":
        return _dense(file, None)
    check_exportable(file.config, wanted)
    if gpt_config(file).style != "llama":
        return _dense(file, f"{CONV1D}: written dense, dequantised")
    matrices = _matrices(file, quantize.activation_bits)
    encodings = {one.module: one.encoding for one in matrices.values()}
    layouts = {one.module: one.layout for one in matrices.values()}
    document = quantization_config(encodings, layouts, _ignored(file, matrices), quantize)
    return _Plan(document["format"], "float32", None, matrices, {"quantization_config": document})


def _dense(file: CompactFile, note: str | None) -> _Plan:
    quantized = any(encoding.bits != UNQUANTIZED_BITS for encoding in file.encodings.values())
    dtype = torch.float32 if quantized else STORED_DTYPE
    return _Plan(DENSE, str(dtype).removeprefix("torch."), note, {}, {})


def _matrices(file: CompactFile, activation_bits: int) -> dict[str, _Quantized]:
    """Every quantised linear layer of the layers; embeddings and output layer are left to be dequantised."""
    modules = {
        name: module for name, module in _linear_modules(file).items() if file.encodings[name].bits != UNQUANTIZED_BITS
    }
    mixed = len({file.encodings[name].bits for name in modules}) > 1
    return {
        name: _Quantized(module, file.encodings[name], stored_format(file.encodings[name], activation_bits, mixed))
        for name, module in modules.items()
    }


def _ignored(file: CompactFile, matrices: Mapping[str, _Quantized]) -> list[str]:
    return [module for name, module in _linear_modules(file).items() if name not in matrices]


def _linear_modules(file: CompactFile) -> dict[str, str]:
    """Canonical name of a layer's matrix → module."""
    config = gpt_config(file)
    modules = {}
    for index in range(config.layers):
        for linear in config.linear_shapes():
            module = linear_module(config, index, linear)
            assert module is not None, f"{linear} is no module of its own"
            modules[f"layers.{index}.{linear}.weight"] = module
    return modules


def _write_weights(file: CompactFile, plan: _Plan, directory: Path, shard_bytes: int, facts: Mapping[str, Any]) -> None:
    parts = _Parts(file, plan)
    shards = _shards(parts.specs, shard_bytes)
    metadata = {"format": "pt"}
    if "mask" in facts:
        metadata["espalier"] = json.dumps({"variant": facts["variant"], "mask": facts["mask"]})
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write(directory / name, {key: parts.specs[key] for key in names}, parts.read, metadata)
        weight_map |= dict.fromkeys(names, name)
    if len(shards) > 1:
        total = sum(spec.bytes for spec in parts.specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


class _Parts:
    """The exported tensors by name, made a layer at a time; the last layer is kept."""

    def __init__(self, file: CompactFile, plan: _Plan) -> None:
        self._file, self._config, self._plan = file, gpt_config(file), plan
        self._owner: dict[str, int | None] = {}
        self.specs: dict[str, TensorSpec] = {}
        for index in (None, *range(self._config.layers)):
            specs = self._specs(index)
            self._owner |= dict.fromkeys(specs, index)
            self.specs |= specs
        self._current: int | None = -1
        self._tensors: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One tensor as it is exported."""
        index = self._owner[name]
        if index != self._current:
            self._tensors = {}
            self._tensors = self._made(index)
            self._current = index
        return self._tensors[name].to(self.specs[name].dtype)

    def _specs(self, index: int | None) -> dict[str, TensorSpec]:
        # Names and shapes come from the same mapping as the weights, on tensors without data.
        empty = {
            name: torch.empty(self._file.shapes[name], device="meta", dtype=self._dense_dtype(name))
            for name in self._names(index)
            if name not in self._plan.matrices
        }
        specs = {name: TensorSpec.of(tensor) for name, tensor in self._arranged(index, empty).items()}
        for one in self._quantized(index).values():
            stored = stored_specs(one.encoding, one.layout)
            specs |= {f"{one.module}.{suffix}": spec for suffix, spec in stored.items()}
        return specs

    def _made(self, index: int | None) -> dict[str, Tensor]:
        dense = {name: self._file.tensor(name) for name in self._names(index) if name not in self._plan.matrices}
        tensors = self._arranged(index, dense)
        for name, one in self._quantized(index).items():
            matrix = self._file.matrix(name).quantized
            assert matrix is not None, f"{name} is not quantised"
            stored = stored_tensors(matrix, one.layout)
            tensors |= {f"{one.module}.{suffix}": tensor for suffix, tensor in stored.items()}
        return tensors

    def _names(self, index: int | None) -> list[str]:
        """Canonical names of what belongs to one layer, or (None) to no layer."""
        if index is None:
            return [name for name in self._file.shapes if not name.startswith("layers.")]
        return [name for name in self._file.shapes if name.startswith(f"layers.{index}.")]

    def _quantized(self, index: int | None) -> dict[str, _Quantized]:
        return {name: self._plan.matrices[name] for name in self._names(index) if name in self._plan.matrices}

    def _arranged(self, index: int | None, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if index is None:
            return outer_tensors(self._config, weights)
        prefix = f"layers.{index}."
        return layer_tensors(self._config, index, {name.removeprefix(prefix): w for name, w in weights.items()})

    def _dense_dtype(self, name: str) -> torch.dtype:
        """A dense file is of one type; beside codes, each tensor is of the smallest type that holds it exactly."""
        if not self._plan.matrices:
            return getattr(torch, self._plan.dtype)
        encoding = self._file.encodings.get(name)
        return torch.float32 if encoding and encoding.bits != UNQUANTIZED_BITS else STORED_DTYPE


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


def _mask_facts(file: CompactFile) -> dict[str, Any]:
    """What is known of a sparse variant's zeros; ``zeros_by_layer`` is their share of each layer's linear weights."""
    prune = file.recipe.prune
    assert prune is not None
    return {
        "sparsity": file.facts["sparsity"],
        "pattern": prune.pattern or "unstructured",
        "zeros_by_layer": [_zeros(file, index) for index in range(file.config.layers)],
    }


def _zeros(file: CompactFile, index: int) -> float:
    matrices = [weight for weight in file.layer(index).values() if weight.ndim == 2]
    zeros = sum(int((weight == 0).sum()) for weight in matrices)
    return zeros / sum(weight.numel() for weight in matrices)


def _copy_compact(file: CompactFile, directory: Path) -> dict[str, Any]:
    """Put the compact file beside a sparse export, whose own files do not get smaller by zeros."""
    copy = directory / COMPACT
    copy.parent.mkdir()
    shutil.copyfile(file.file.path, copy)
    return {"path": COMPACT, "bytes": file.file.bytes, "sha256": sha256(copy)}


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
