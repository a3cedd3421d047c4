"""Made checkpoints: canonical weights in the stored form (contract 3), in one shard or several, no process group."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from parallelism.budget import Budget, Progress
from parallelism.checkpoint_store import CheckpointStore, Metrics
from parallelism.data.config import DataConfig, TokenizerConfig
from parallelism.data.prepare import prepare
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.training import TrainingConfig, TrainTask

LLAMA = GPTConfig(
    style="llama", layers=3, hidden=48, heads=6, kv_heads=2, ffn_hidden=64, vocab_size=250, context=32, rope_base=5000.0
)
LLAMA_UNTIED = LLAMA.model_copy(update={"tied_embeddings": False, "head_dim": 16, "kv_heads": None})
GPT2 = GPTConfig(style="gpt2", layers=3, hidden=48, heads=4, vocab_size=250, context=32)
GPT2_UNTIED = GPT2.model_copy(update={"tied_embeddings": False, "activation": "gelu_tanh"})
CONFIGS = {"llama": LLAMA, "llama-untied": LLAMA_UNTIED, "gpt2": GPT2, "gpt2-untied": GPT2_UNTIED}


def weights(config: GPTConfig, seed: int = 0, std: float = 0.15) -> dict[str, Tensor]:
    """Canonical name → random float32 weights; large enough for attention and activations to matter."""

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 7919 + zlib.crc32(name.encode()))
        center = 1.0 if name.endswith("norm.weight") else 0.0
        return torch.randn(shape, generator=generator) * std + center

    return {name: draw(name, shape) for name, shape in config.parameter_shapes().items()}


def stored(config: GPTConfig, canonical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names and in the arrangement of the checkpoint."""
    result = {
        "embedding.word_embeddings.weight": canonical["embedding.tokens"],
        "decoder.final_layernorm.weight": canonical["final_norm.weight"],
    }
    if config.style == "gpt2":
        result["embedding.position_embeddings.weight"] = canonical["embedding.positions"]
        result["decoder.final_layernorm.bias"] = canonical["final_norm.bias"]
    if not config.tied_embeddings:
        result["output_layer.weight"] = canonical["output.weight"]
    for index in range(config.layers):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): value for name, value in canonical.items() if name.startswith(prefix)}
        result |= {f"decoder.{prefix}{name}": value for name, value in _stored_layer(config, layer).items()}
    return result


def _stored_layer(config: GPTConfig, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for part in ("weight", "bias") if config.bias else ("weight",):
        rows = []  # group by group: its queries, its key, its value
        per_group, channels = config.heads // config.query_groups, config.channels
        for group in range(config.query_groups):
            rows.append(layer[f"attention.q.{part}"][group * per_group * channels : (group + 1) * per_group * channels])
            rows += [layer[f"attention.{name}.{part}"][group * channels : (group + 1) * channels] for name in "kv"]
        first = [layer[f"mlp.gate.{part}"]] if config.gated else []
        result[f"self_attention.linear_qkv.{part}"] = torch.cat(rows)
        result[f"self_attention.linear_qkv.layer_norm_{part}"] = layer[f"attention.norm.{part}"]
        result[f"self_attention.linear_proj.{part}"] = layer[f"attention.o.{part}"]
        result[f"mlp.linear_fc1.{part}"] = torch.cat([*first, layer[f"mlp.up.{part}"]])
        result[f"mlp.linear_fc1.layer_norm_{part}"] = layer[f"mlp.norm.{part}"]
        result[f"mlp.linear_fc2.{part}"] = layer[f"mlp.down.{part}"]
    return result


def write_checkpoint(
    root: Path,
    config: GPTConfig,
    canonical: Mapping[str, Tensor],
    *,
    tensor: int = 1,
    dtype: torch.dtype = torch.float32,
    step: int = 5,
) -> Path:
    """A complete checkpoint as ``tensor`` ranks would write it, with optimizer tensors that nobody may read."""
    store = CheckpointStore(root)
    directory = store.directory(1, step)
    store.prepare(directory)
    model = {name: value.to(dtype) for name, value in stored(config, canonical).items()}
    moments = {
        f"optimizer.state.{kind}.{name}": value.float()
        for kind in ("exp_avg", "exp_avg_sq")
        for name, value in model.items()
    }
    _write_shards(directory, model | moments | {"engine.extra": torch.ones(3)}, tensor)
    task = TrainTask(
        name="made",
        seed=1,
        model=config,
        layout=Layout(tensor=tensor),
        training=TrainingConfig(),
        budget=Budget(tokens=1000),
        data_dir="none",
        sequence_length=16,
        checkpoint_dir=str(root),
        epoch=1,
    )
    progress = Progress(step=step, samples=step * 8, tokens=step * 128, flops=1e6)
    return store.commit(directory, task, progress, Metrics()).path


def _write_shards(directory: Path, tensors: Mapping[str, Tensor], ranks: int) -> None:
    """torch DCP files, one per rank, every matrix split by rows where they divide, else by columns, else whole."""
    shards = {name: _split(name, value, ranks) for name, value in tensors.items()}
    plans, planners = [], []
    for rank in range(ranks):
        mine = {name: pieces[rank] for name, pieces in shards.items() if rank < len(pieces)}
        planner = _Shards(mine, tensors)
        planners.append(planner)
        plans.append(planner.create_local_plan())
    global_plans, metadata = create_default_global_save_plan(plans)
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(True)
    global_plans = writer.prepare_global_plan(global_plans)
    results = [writer.write_data(plan, planner).wait() for plan, planner in zip(global_plans, planners, strict=True)]
    writer.finish(metadata, results)


def _split(name: str, value: Tensor, ranks: int) -> list[tuple[tuple[int, ...], Tensor]]:
    """(offset, piece) of every rank; a tensor with one piece is written by the first rank."""
    if value.ndim == 2 and ranks > 1:
        dim = 1 if "linear_proj" in name or "linear_fc2" in name else 0
        pieces = value.tensor_split(ranks, dim)
        starts = [sum(piece.shape[dim] for piece in pieces[:rank]) for rank in range(ranks)]
        return [((start, 0) if dim == 0 else (0, start), piece) for start, piece in zip(starts, pieces, strict=True)]
    return [((0,) * value.ndim, value)]


class _Shards(DefaultSavePlanner):
    """Plans the pieces of one rank."""

    def __init__(self, pieces: Mapping[str, tuple[tuple[int, ...], Tensor]], full: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.pieces, self.full = pieces, full

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, (offset, piece) in self.pieces.items():
            chunk = ChunkStorageMetadata(torch.Size(offset), piece.shape)
            data = TensorWriteData(chunk, TensorProperties.create_from_tensor(piece), self.full[name].shape)
            items.append(WriteItem(MetadataIndex(name, torch.Size(offset)), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.pieces[write_item.index.fqn][1].contiguous()


def rows(config: GPTConfig, count: int, length: int = 24, seed: int = 3) -> np.ndarray:
    """Token ids [count, length + 1]."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, (count, length + 1))


def prepared_text(folder: Path, vocab_size: int | None = None) -> Path:
    """Made prose, prepared: byte tokens (257), or a byte-pair encoding of ``vocab_size`` entries."""
    generator = np.random.default_rng(0)
    words = np.array(["the", "tree", "grows", "on", "a", "frame", "and", "is", "cut", "hard", "again", "in", "spring"])
    documents = [" ".join(words[generator.integers(0, len(words), 60)]) + "." for _ in range(60)]
    source = folder / "text.txt"
    source.write_text("\n".join(documents), encoding="utf-8")
    tokenizer = TokenizerConfig(kind="bpe", vocab_size=vocab_size) if vocab_size else TokenizerConfig(kind="bytes")
    config = DataConfig(train=[str(source)], validation=0.2, documents="line", tokenizer=tokenizer, sequence_length=24)
    prepare(config, folder / "data", 1)
    return folder / "data"


def word_task(folder: Path, questions: Sequence[tuple[str, list[str], int]]) -> str:
    """A folder with one task of lm-evaluation-harness, ``words``: which of the choices follows a text."""
    rows = [{"text": text, "choices": choices, "answer": answer} for text, choices, answer in questions]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
    return str(folder)
