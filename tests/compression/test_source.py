"""Models that others made: Hugging Face directories as sources, and everything about them that is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from compression import container, tasks
from compression.evaluation import logits, tally
from compression.export import export
from compression.huggingface_config import config_json
from compression.pretrained import PretrainedWeights
from compression.recipe import Quantization, Recipe
from compression.source import find_tokenizer, open_weights, read_source
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.plain_checkpoint import write_checkpoint
from parallelism.training import StartPoint, TrainTask
from tests.compression import made
from tests.parallelism.recovering import started
from tests.parallelism.small_gpt import global_rows, micro_batches, small_task, train
from tests.ranks import run_ranks

LLAMA: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 250,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "activation_function": "gelu",
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def _llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(LLAMA | changes)))


def _gpt2(**changes: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**(GPT2 | changes)))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "llama-grouped": lambda: _llama(num_key_value_heads=2, rope_parameters=ROPE),
    "llama-wide-heads": lambda: _llama(head_dim=16, rms_norm_eps=1e-3),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(
            **(LLAMA | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}), sliding_window=None
        )
    ),
    "gpt2": _gpt2,
    "gpt2-untied": lambda: _gpt2(tie_word_embeddings=False, n_inner=80),
}


def _saved(folder: Path, make: Callable[[], Any] = _llama, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # biases are zero and norms one as they are made
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def _their_loss(folder: Path, rows: np.ndarray) -> float:
    tokens = torch.from_numpy(rows)
    found = _their_logits(folder, tokens[:, :-1]).double().flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(found, tokens[:, 1:].flatten()))


def _their_logits(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=rows).logits
    return found


def _our_logits(path: Path, rows: torch.Tensor) -> torch.Tensor:
    return logits(open_weights(path), rows)


def _our_loss(path: Path, rows: np.ndarray) -> float:
    (total,) = tally([open_weights(path)], lambda positions: rows[list(positions)], len(rows))
    return total.loss / total.tokens


@pytest.mark.parametrize("name", MODELS)
def test_the_streamed_loss_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    folder = _saved(tmp_path / "model", MODELS[name])
    config = read_source(folder).config
    assert isinstance(config, GPTConfig)
    rows = made.rows(config, 4)
    assert _our_loss(folder, rows) == pytest.approx(_their_loss(folder, rows), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-grouped", "gpt2"])
def test_half_precision_in_several_shards(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = _saved(tmp_path / "model", MODELS[name], dtype, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    rows = made.rows(PretrainedWeights(folder).config, 4)
    assert _our_loss(folder, rows) == pytest.approx(_their_loss(folder, rows), abs=1e-5)


def test_what_older_versions_wrote_is_read(tmp_path: Path) -> None:
    """Files of the model without its head, constants among the weights, rotary positions where version 4 put them."""
    gpt2 = _saved(tmp_path / "gpt2", _gpt2)
    rows = made.rows(PretrainedWeights(gpt2).config, 2)
    loss = _our_loss(gpt2, rows)
    tensors = load_file(gpt2 / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(old | {"h.0.attn.bias": torch.ones(1, 1, 32, 32)}, gpt2 / "model.safetensors", {"format": "pt"})
    assert _our_loss(gpt2, rows) == loss
    llama = _saved(tmp_path / "llama", MODELS["llama-grouped"])
    _change(llama, rope_parameters=None, rope_theta=500.0, rope_scaling=None)
    config = read_source(llama).config
    assert isinstance(config, GPTConfig)
    assert config.rope_base == 500.0


def test_one_layer_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _saved(tmp_path / "model", _gpt2, max_shard_size="60KB")
    weights = open_weights(folder)
    read: list[int] = []

    def counted(path: Path, start: int, count: int) -> bytearray:
        read.append(count)
        return read_range(path, start, count)

    read_range = container.read_range
    monkeypatch.setattr(container, "read_range", counted)
    layer = weights.layer(1)
    assert sum(read) == sum(4 * tensor.numel() for tensor in layer.values())


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (_llama, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, r"model_type 'qwen3'.*supported are"),
        (
            _llama,
            {"architectures": ["LlamaForSequenceClassification"]},
            r"LlamaForSequenceClassification.* not supported",
        ),
        (_llama, {"attention_bias": True}, r"attention_bias True is not supported, only False"),
        (_llama, {"mlp_bias": True}, r"mlp_bias True is not supported"),
        (_llama, {"hidden_act": "gelu"}, r"hidden_act 'gelu' is not supported, only 'silu'"),
        (_llama, {"sliding_window": 16}, r"field sliding_window \(16\) is not supported"),
        (_llama, {"quantization_config": {"quant_method": "gptq"}}, r"field quantization_config .*gptq"),
        (_llama, {"auto_map": {"AutoModel": "evil.Model"}}, r"field auto_map"),
        (
            _llama,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rotary positions .*llama3.* not supported",
        ),
        (
            _llama,
            {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
            r"rotary positions .*partial_rotary_factor",
        ),
        (_llama, {"vocab_size": None}, r"config\.json lacks vocab_size"),
        (
            _llama,
            {"num_attention_heads": 7},
            r"config\.json describes no model .*heads 7 is not divisible by kv_heads 6",
        ),
        (MODELS["mistral"], {"sliding_window": 8}, r"sliding_window 8 is not supported, only None"),
        (_gpt2, {"activation_function": "relu"}, r"activation_function 'relu' is not supported, only gelu, gelu_new,"),
        (_gpt2, {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx True is not supported"),
        (_gpt2, {"attn_pdrop": 0.3}, r"attn_pdrop 0\.3 differs"),
    ],
)
def test_models_that_are_computed_otherwise_are_refused(
    tmp_path: Path, make: Callable[[], Any], changes: dict[str, Any], message: str
) -> None:
    folder = _saved(tmp_path / "model", make)
    _change(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_source(folder)


def test_an_activation_left_out_is_the_one_transformers_takes(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", _gpt2)
    document = json.loads((folder / "config.json").read_text())
    del document["activation_function"]
    (folder / "config.json").write_text(json.dumps(document))
    rows = made.rows(PretrainedWeights(folder).config, 4)
    assert _our_loss(folder, rows) == pytest.approx(_their_loss(folder, rows), abs=1e-5)
    assert config_json(PretrainedWeights(folder).config, "float32", 0)["activation_function"] == "gelu_new"


@pytest.mark.parametrize("name", ["gelu_pytorch_tanh", "gelu_fast"])
def test_other_names_of_the_approximation_are_known(tmp_path: Path, name: str) -> None:
    folder = _saved(tmp_path / "model", lambda: _gpt2(activation_function=name))
    rows = torch.from_numpy(made.rows(PretrainedWeights(folder).config, 4))
    torch.testing.assert_close(_our_logits(folder, rows), _their_logits(folder, rows), rtol=0, atol=1e-5)


def test_a_gpt2_of_the_hub_keeps_its_function_as_source_in_training_and_as_export(tmp_path: Path) -> None:
    """OpenAI's GPT-2 has ``gelu_new``; weights in bfloat16, so that a dense export holds the very same ones."""
    hub = {"activation_function": "gelu_new", "vocab_size": 257}
    folder = _saved(tmp_path / "hub", lambda: _gpt2(**hub), torch.bfloat16)
    config = read_source(folder).config
    rows = torch.from_numpy(made.rows(config, 3))
    theirs = _their_logits(folder, rows)
    torch.testing.assert_close(_our_logits(folder, rows), theirs, rtol=0, atol=1e-5)
    exact = _saved(tmp_path / "exact", lambda: _gpt2(**(hub | {"activation_function": "gelu"})), torch.bfloat16)
    assert (_their_logits(exact, rows) - theirs).abs().max() > 1e-3

    variant = _compressed(folder, Recipe(), tmp_path / "out")
    export(variant, str(tmp_path / "export"), str(made.prepared_text(tmp_path)))
    torch.testing.assert_close(_their_logits(tmp_path / "export", rows), theirs, rtol=0, atol=1e-5)

    weights = str(write_checkpoint(open_weights(folder), tmp_path / "checkpoint", "hub").path)
    task = small_task(model=config.model_dump() | {"dropout": 0.0})
    task = task.model_copy(update={"start": StartPoint(weights=weights)})
    ((began, losses),) = run_ranks(_train_from, 1, task)
    assert began == pytest.approx(_their_loss(folder, global_rows(task, 99)), abs=1e-5)
    two = run_ranks(_train_from, 2, task.model_copy(update={"layout": Layout(tensor=2)}))
    assert two[0] == two[1]
    assert [two[0][0], *two[0][1]] == pytest.approx([began, *losses], abs=5e-5)
    assert losses[-1] < losses[0] - 0.1


def _train_from(task: TrainTask) -> tuple[float, list[float]]:
    """Held-out loss of the weights that the task begins with, and the losses of some steps."""
    engine = started(task)
    return engine.evaluate(micro_batches(task, engine.data_rank, 99)), train(engine, task, 0, 6)[0]


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(Q), rf"{Q} is missing from its files"),
        (lambda tensors: tensors.update({Q: torch.ones(48, 40)}), rf"{Q} has shape \(48, 40\), \(48, 48\) by config"),
        (lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}), rf"{Q} is of torch\.int8"),
        (lambda tensors: tensors.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}), "hold .*q_norm"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    folder = _saved(tmp_path / "model")
    _edit(folder, change)
    with pytest.raises(ValueError, match=message):
        read_source(folder)


def test_a_tied_model_with_an_output_layer_is_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    _change(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight, which .* does not have: set tie_word_embeddings to false"):
        read_source(folder)


def test_truncated_and_missing_shards(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
        read_source(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"the weight files {shard.name} are missing"):
        read_source(folder)


def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other/model.safetensors"}}))
    with pytest.raises(ValueError, match="names no files of its own directory"):
        read_source(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle, .*: convert it to safetensors"):
        read_source(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing does not exist"):
        read_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no complete checkpoint .* and holds no config\.json"):
        read_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        read_source(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    _edit(folder, lambda tensors: tensors[Q].__setitem__((3, 4), float("nan")))
    with pytest.raises(ValueError, match=r"layer 1, attention\.q\.weight: 1 of 2304 weights are not finite"):
        tasks.compress_layer(str(folder), 1, [Recipe()], str(tmp_path / "out"))
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_the_fingerprint_covers_config_names_and_samples_of_the_weights(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model")
    first = read_source(folder)
    assert first.trained == {}
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert read_source(copy).fingerprint == first.fingerprint
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert read_source(copy).fingerprint != first.fingerprint
    _change(folder, rms_norm_eps=1e-4)
    assert read_source(folder).fingerprint != first.fingerprint


def test_a_compact_file_is_a_source(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "model", MODELS["llama-grouped"])
    recipe = Recipe(quantize=Quantization(method="rtn", bits=8, group_size=16), embedding_bits=8)
    variant = _compressed(folder, recipe, tmp_path / "out")
    source = read_source(variant)
    assert source.config == read_source(folder).config
    assert source.fingerprint != read_source(folder).fingerprint
    rows = made.rows(PretrainedWeights(folder).config, 2)
    assert _our_loss(Path(variant), rows) == pytest.approx(_our_loss(folder, rows), rel=0.02)
    again = _compressed(Path(variant), Recipe(), tmp_path / "again")
    assert read_source(again).config == source.config


def _compressed(source: Path, recipe: Recipe, out: Path) -> str:
    for layer in range(read_source(source).config.layers):
        tasks.compress_layer(str(source), layer, [recipe], str(out))
    tasks.compress_outer(str(source), [recipe], str(out))
    return tasks.assemble(str(source), recipe, str(out)).path


def test_the_tokenizer_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json: write one"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
