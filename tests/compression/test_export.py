"""Exports: what Transformers makes of them, and that a false claim is noticed."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from compression import tasks
from compression.checks import check_exportable, check_exports
from compression.compact import CompactFile, assemble
from compression.config import Bits
from compression.container import sha256
from compression.evaluation import logits, tally
from compression.export import export
from compression.quantized_format import pack_words
from compression.recipe import Quantization, Recipe, Structure
from compression.results import ExportResult, Quality
from compression.source import open_weights
from compression.verification import VerificationError, verify
from compression.workspace import Workspace
from parallelism.data.prepared import PreparedData
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made
from tests.compression.test_tasks import GRID, _compress

DENSE, SPARSE, QUANTIZED, BOTH = GRID[0], GRID[1], GRID[4], GRID[-1]
SEQUENCE, TOKENS, SEED = 24, 480, 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.prepared_text(tmp_path_factory.mktemp("data"))


def _config(name: str) -> GPTConfig:
    return made.CONFIGS[name].model_copy(update={"vocab_size": 257})


def _variants(folder: Path, name: str) -> dict[str, str]:
    config = _config(name)
    checkpoint = made.write_checkpoint(folder / "checkpoint", config, made.weights(config))
    return {file.name: file.path for file in _compress(checkpoint, folder / "out", [DENSE, SPARSE, QUANTIZED, BOTH])}


def _logits(directory: Path, rows: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=rows, use_cache=False).logits
    return logits


def _our_logits(path: str, rows: torch.Tensor) -> torch.Tensor:
    return logits(CompactFile(path), rows)


@pytest.mark.parametrize("name", made.CONFIGS)
def test_transformers_computes_the_same_logits(tmp_path: Path, data: Path, name: str) -> None:
    rows = torch.from_numpy(made.rows(_config(name), 3))
    for recipe, path in _variants(tmp_path, name).items():
        result = export(path, str(tmp_path / recipe), str(data))
        theirs, ours = _logits(tmp_path / recipe, rows), _our_logits(path, rows)
        assert theirs.shape == (3, 25, 257)  # the padding of the vocabulary is gone
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        quantized = "rtn" in recipe
        assert result.dtype == ("float32" if quantized else "bfloat16")
        assert result.format == ("pack-quantized" if quantized and "llama" in name else "safetensors")
        assert bool(result.note) == (quantized and "gpt2" in name)
        sizes = {file.name: file.stat().st_size for file in (tmp_path / recipe).glob("*.safetensors")}
        assert result.export_bytes == sum(sizes.values())
        assert set(result.checksums) == set(sizes)


def _quantized(folder: Path, recipes: list[Recipe], config: GPTConfig) -> dict[str, str]:
    checkpoint = made.write_checkpoint(folder / "checkpoint", config, made.weights(config))
    return {file.name: file.path for file in _compress(checkpoint, folder / "out", recipes)}


def _integers(bits: Bits, group_size: int | None, symmetric: bool, activation_bits: int = 16) -> Recipe:
    quantization = Quantization(
        method="rtn", bits=bits, group_size=group_size, symmetric=symmetric, activation_bits=activation_bits
    )
    return Recipe(quantize=quantization, embedding_bits=8)


def _fp8(group_size: int | None, activation_bits: int) -> Recipe:
    quantization = Quantization(
        method="rtn", bits=8, number="fp8", group_size=group_size, activation_bits=activation_bits
    )
    return Recipe(quantize=quantization, embedding_bits=8)


BITS: tuple[Bits, ...] = (8, 6, 4, 3, 2)
WEIGHT_ONLY = [
    _integers(bits, group, symmetric) for bits in BITS for group in (16, None) for symmetric in (True, False)
]
ROUNDED = [
    _integers(bits, group, symmetric, 8) for bits in (8, 4) for group in (16, None) for symmetric in (True, False)
]
FLOATS = [_fp8(group, activations) for group in (16, None) for activations in (16, 8)]


def test_transformers_loads_every_quantised_form(tmp_path: Path, data: Path) -> None:
    config = _config("llama-untied")
    rows = torch.from_numpy(made.rows(config, 3))
    found = {}
    for recipe, path in _quantized(tmp_path, [*WEIGHT_ONLY, *ROUNDED, *FLOATS], config).items():
        result = export(path, str(tmp_path / recipe), str(data), format="compressed-tensors")
        found[recipe] = result.format
        torch.testing.assert_close(_logits(tmp_path / recipe, rows), _our_logits(path, rows), rtol=0, atol=1e-5)
        assert result.note is None
    assert {found[recipe.name] for recipe in WEIGHT_ONLY} == {"pack-quantized"}
    assert {found[recipe.name] for recipe in FLOATS} == {"float-quantized"}
    assert found["rtn-w8a8"] == found["rtn-w8a8g16-asym"] == "int-quantized"


def test_the_codes_take_their_bits(tmp_path: Path, data: Path) -> None:
    from safetensors.torch import load_file

    config = _config("llama")
    for recipe, path in _quantized(tmp_path, [_integers(3, 16, True)], config).items():
        export(path, str(tmp_path / recipe), str(data))
        tensors = load_file(tmp_path / recipe / "model.safetensors")
        packed = tensors["model.layers.0.mlp.down_proj.weight_packed"]
        assert packed.dtype == torch.int32
        assert packed.shape == (48, 64 * 3 // 32)
        assert tensors["model.layers.0.mlp.down_proj.weight_shape"].tolist() == [48, 64]
        assert tensors["model.layers.0.mlp.down_proj.weight_scale"].dtype == torch.float16
        assert tensors["model.embed_tokens.weight"].dtype == torch.float32
        assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_words_are_packed_as_the_library_packs_them() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (5, 83), generator=generator, dtype=torch.uint8)
        signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))


def _mixed(folder: Path, symmetric: bool) -> str:
    """A variant whose three layers have 8, 4 and 3 bits, put together from uniform ones."""
    config = _config("llama")
    widths: list[Bits] = [8, 4, 3]
    recipes = [_integers(bits, 16, symmetric) for bits in widths]
    variants = _quantized(folder, recipes, config)
    workspace = Workspace(folder / "out")
    outer = workspace.layer(None) / workspace.require(None).part(recipes[0]).file
    parts = [workspace.layer(layer) / workspace.require(layer).part(recipes[layer]).file for layer in range(3)]
    mixed = Quantization(method="rtn", average_bits=5.0, group_size=16, symmetric=symmetric)
    facts = CompactFile(variants[recipes[0].name]).facts | {
        "recipe": Recipe(quantize=mixed, embedding_bits=8).model_dump(mode="json")
    }
    facts.pop("format")
    assemble([outer, *parts], facts, folder / "mixed.safetensors")
    return str(folder / "mixed.safetensors")


@pytest.mark.parametrize(("symmetric", "layout"), [(True, "pack-quantized"), (False, "int-quantized")])
def test_layers_of_different_widths(tmp_path: Path, data: Path, symmetric: bool, layout: str) -> None:
    path = _mixed(tmp_path, symmetric)
    result = export(path, str(tmp_path / "export"), str(data))
    rows = torch.from_numpy(made.rows(_config("llama"), 3))
    torch.testing.assert_close(_logits(tmp_path / "export", rows), _our_logits(path, rows), rtol=0, atol=1e-5)
    document = json.loads((tmp_path / "export" / "config.json").read_text())["quantization_config"]
    assert result.format == document["format"] == ("pack-quantized" if symmetric else layout)
    assert sorted(group["weights"]["num_bits"] for group in document["config_groups"].values()) == [3, 4, 8]


def test_what_no_engine_loads_is_dense_and_says_why(tmp_path: Path, data: Path) -> None:
    recipe = _integers(4, 16, True)
    (path,) = _quantized(tmp_path, [recipe], _config("gpt2")).values()
    result = export(path, str(tmp_path / "export"), str(data))
    assert result.format == "safetensors"
    assert "Conv1D" in (result.note or "")
    assert "Conv1D" in (tmp_path / "export" / "README.md").read_text()
    with pytest.raises(ValueError, match=r"Conv1D: set export\.format to auto"):
        export(path, str(tmp_path / "other"), str(data), format="compressed-tensors")
    assert not (tmp_path / "other").exists()


def test_the_dense_form_can_be_had(tmp_path: Path, data: Path) -> None:
    (path,) = _quantized(tmp_path, [_integers(4, 16, False)], _config("llama")).values()
    result = export(path, str(tmp_path / "export"), str(data), format="safetensors")
    assert (result.format, result.dtype, result.note) == ("safetensors", "float32", None)
    rows = torch.from_numpy(made.rows(_config("llama"), 3))
    torch.testing.assert_close(_logits(tmp_path / "export", rows), _our_logits(path, rows), rtol=0, atol=1e-5)


def test_sparse_variants_state_their_zeros_and_keep_the_compact_file(tmp_path: Path, data: Path) -> None:
    from safetensors import safe_open

    path = _variants(tmp_path, "llama")[SPARSE.name]
    result = export(path, str(tmp_path / "export"), str(data))
    facts = json.loads((tmp_path / "export" / "config.json").read_text())["espalier"]
    assert facts["mask"]["pattern"] == "unstructured"
    assert facts["mask"]["zeros_by_layer"] == pytest.approx([0.5] * 3, abs=0.01)
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["espalier"])["mask"] == facts["mask"]
    copy = tmp_path / "export" / facts["compact_file"]["path"]
    assert copy.read_bytes() == Path(path).read_bytes()
    assert facts["compact_file"]["sha256"] == sha256(copy)
    assert result.export_bytes == (tmp_path / "export" / "model.safetensors").stat().st_size


def test_what_structured_pruning_leaves_is_a_plain_smaller_model(tmp_path: Path, data: Path) -> None:
    """Five heads of eight channels in 48: Transformers has no Llama of that shape, but Mistral is the same model."""
    update = {"heads": 5, "kv_heads": 5, "head_dim": 8, "ffn_hidden": 40, "layers": 2}
    config = _config("llama").model_copy(update=update)
    for recipe, path in _quantized(tmp_path, [DENSE, _integers(4, None, True)], config).items():
        result = export(path, str(tmp_path / recipe), str(data))
        rows = torch.from_numpy(made.rows(config, 3))
        torch.testing.assert_close(_logits(tmp_path / recipe, rows), _our_logits(path, rows), rtol=0, atol=1e-5)
        document = json.loads((tmp_path / recipe / "config.json").read_text())
        assert document["architectures"] == ["MistralForCausalLM"]
        assert (document["num_hidden_layers"], document["head_dim"], document["sliding_window"]) == (2, 8, None)
        assert result.parameters == CompactFile(path).parameters


def test_an_export_is_a_source(tmp_path: Path, data: Path) -> None:
    for name in ("llama", "gpt2-untied"):
        path = _variants(tmp_path / name, name)[DENSE.name]
        export(path, str(tmp_path / name / "export"), str(data))
        found = open_weights(tmp_path / name / "export")
        assert {**found.config.model_dump(), "kv_heads": None, "head_dim": None, "ffn_hidden": None} == {
            **_config(name).model_dump(),
            "kv_heads": None,
            "head_dim": None,
            "ffn_hidden": None,
        }
        for index in range(3):
            expected = CompactFile(path).layer(index)
            layer = found.layer(index)
            assert set(layer) == set(expected)
            assert all(torch.equal(layer[key], value) for key, value in expected.items())


def test_weights_in_several_files(tmp_path: Path, data: Path) -> None:
    path = _variants(tmp_path, "llama")["dense"]
    export(path, str(tmp_path / "one"), str(data))
    result = export(path, str(tmp_path / "many"), str(data), shard_bytes=40_000)
    assert len(result.checksums) >= 3
    rows = torch.from_numpy(made.rows(_config("llama"), 2))
    assert torch.equal(_logits(tmp_path / "one", rows), _logits(tmp_path / "many", rows))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(result.checksums)


@pytest.mark.parametrize("vocab_size", [None, 300])
def test_the_tokenizer_loads_and_cuts_as_before(tmp_path: Path, vocab_size: int | None) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    data = made.prepared_text(tmp_path, vocab_size)
    prepared = PreparedData.load(data)
    config = made.GPT2.model_copy(update={"vocab_size": prepared.vocab_size})
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, made.weights(config))
    (file,) = _compress(checkpoint, tmp_path / "out", [DENSE])
    export(file.path, str(tmp_path / "export"), str(data))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export", local_files_only=True)
    text = "the tree\n\n  grows: naïve 樹\t!"
    assert tokenizer(text)["input_ids"] == Tokenizer.from_file(str(prepared.tokenizer_path)).encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == prepared.end_of_document_id
    assert len(tokenizer) == config.vocab_size


def _measured(path: str, data: Path) -> Quality:
    (quality,) = tasks.evaluate([path], str(data), SEQUENCE, TOKENS, SEED)
    return quality


VERIFIED = {
    "llama": [
        DENSE,
        BOTH,
        _integers(4, 16, False),
        _integers(8, None, True, 8),
        _integers(4, 16, True, 8),
        _fp8(None, 8),
    ],
    "gpt2-untied": [DENSE, BOTH, _integers(8, 16, True, 8), _fp8(16, 8)],
}


@pytest.mark.parametrize(("reader", "memory_bytes"), [("transformers", None), ("streaming", 0)])
def test_exports_are_verified_in_a_fresh_process(
    tmp_path: Path, data: Path, reader: str, memory_bytes: int | None
) -> None:
    claims: list[tuple[ExportResult, Quality]] = []
    for name, recipes in VERIFIED.items():
        for recipe, path in _quantized(tmp_path / name, recipes, _config(name)).items():
            quality = _measured(path, data)
            directory = str(tmp_path / name / recipe)
            claims.append((export(path, directory, str(data), quality=quality, shard_bytes=60_000), quality))
    exports, qualities = [one for one, _ in claims], [two for _, two in claims]
    found = verify(exports, qualities, str(data), SEQUENCE, TOKENS, SEED, memory_bytes=memory_bytes)
    assert [one.name for one in found] == [one.name for one in exports]
    for one, quality in zip(found, qualities, strict=True):
        rounds = "a8" in one.name  # another order of sums decides where a few activations go
        assert one.measured_loss == pytest.approx(quality.validation_loss, abs=6e-3 if rounds else 1e-5)
        assert one.tokens == quality.tokens == TOKENS
        assert one.reader == reader
        assert one.logit_difference < 1e-4


def test_logits_that_differ_fail_loudly(tmp_path: Path, data: Path) -> None:
    """The loss is as claimed, but the compact file is another variant's."""
    paths = _variants(tmp_path, "llama")
    result = export(paths[DENSE.name], str(tmp_path / "export"), str(data))
    other = result.model_copy(update={"variant": paths[SPARSE.name]})
    with pytest.raises(VerificationError, match=r"dense: logits differ by .* between streaming and our own evaluation"):
        verify([other], [_measured(paths[DENSE.name], data)], str(data), SEQUENCE, TOKENS, SEED, memory_bytes=0)


def test_a_reader_that_is_killed_for_its_memory_is_replaced(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compression import verification

    path = _variants(tmp_path, "llama")[DENSE.name]
    result = export(path, str(tmp_path / "export"), str(data))
    run = verification._run

    def killed(request: dict[str, Any], timeout: float) -> subprocess.CompletedProcess[str]:
        if any(one["reader"] == "transformers" for one in request["exports"]):
            return subprocess.CompletedProcess([], -9, "", "")
        return run(request, timeout)

    monkeypatch.setattr(verification, "_run", killed)
    (found,) = verify([result], [_measured(path, data)], str(data), SEQUENCE, TOKENS, SEED)
    assert found.reader == "streaming"


def test_a_false_claim_fails_loudly(tmp_path: Path, data: Path) -> None:
    path = _variants(tmp_path, "llama")["dense"]
    quality = _measured(path, data)
    result = export(path, str(tmp_path / "export"), str(data))
    better = quality.model_copy(update={"validation_loss": quality.validation_loss - 0.01})
    with pytest.raises(VerificationError, match=rf"dense: loss {quality.validation_loss:.4f}\d* in transformers"):
        verify([result], [better], str(data), SEQUENCE, TOKENS, SEED)


def test_an_export_of_other_weights_fails_loudly(tmp_path: Path, data: Path) -> None:
    path = _variants(tmp_path, "llama")["dense"]
    result = export(path, str(tmp_path / "export"), str(data))
    weights = tmp_path / "export" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2:] = b"\x00\x41"  # one weight becomes 8
    weights.write_bytes(content)
    with pytest.raises(VerificationError, match=r"model\.safetensors is missing or not the file that was exported"):
        verify([result], [_measured(path, data)], str(data), SEQUENCE, TOKENS, SEED)


def test_an_export_that_does_not_load_fails_loudly(tmp_path: Path, data: Path) -> None:
    path = _variants(tmp_path, "llama")["dense"]
    result = export(path, str(tmp_path / "export"), str(data))
    config = tmp_path / "export" / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 72'))
    with pytest.raises(VerificationError, match=r"export cannot be loaded: .*mismatched"):
        verify([result], [_measured(path, data)], str(data), SEQUENCE, TOKENS, SEED)


def test_an_export_replaces_an_older_one_whole_or_not_at_all(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _variants(tmp_path, "llama")
    target = tmp_path / "exports" / "chosen"
    export(paths["dense"], str(target), str(data))
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    monkeypatch.setattr("compression.export.model_card", _fail)
    with pytest.raises(OSError, match="the disk is full"):
        export(paths[SPARSE.name], str(target), str(data))
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert os.listdir(target.parent) == ["chosen"]
    monkeypatch.undo()
    export(paths[SPARSE.name], str(target), str(data))
    assert json.loads((target / "config.json").read_text())["espalier"]["variant"] == SPARSE.name
    assert os.listdir(target.parent) == ["chosen"]


def _fail(*_: object) -> str:
    raise OSError("the disk is full")


def test_config_and_card_state_lineage_quality_and_checksum(tmp_path: Path, data: Path) -> None:
    path = _variants(tmp_path, "llama")[BOTH.name]
    quality = _measured(path, data)
    lineage = {"job": "quickstart", "candidate": "small"}
    result = export(path, str(tmp_path / "export"), str(data), quality=quality, lineage=lineage)
    facts = json.loads((tmp_path / "export" / "config.json").read_text())["espalier"]
    assert facts["lineage"] == lineage
    assert facts["recipe"]["prune"].items() >= {"method": "magnitude", "sparsity": 0.8}.items()
    assert facts["compact_bytes"] == os.stat(path).st_size
    card = (tmp_path / "export" / "README.md").read_text()
    for wanted in (
        "# magnitude-s80+rtn-w3g16",
        "| candidate | small |",
        "magnitude pruning to 80% zeros; rtn to 3 bits, groups of 16, symmetric; embeddings at 8 bits",
        f"{quality.validation_loss:.5f} nats per token over 480 tokens",
        f"{os.stat(path).st_size:,} bytes",
        result.checksums["model.safetensors"],
        "library_name: transformers",
    ):
        assert wanted in card


@pytest.mark.parametrize("update", [{"kv_heads": 2}, {"head_dim": 16}])
def test_shapes_that_transformers_has_no_model_for_are_refused(update: dict[str, int]) -> None:
    check_exportable(made.GPT2)
    with pytest.raises(ValueError, match=r"GPT-2 in Transformers has as many kv_heads as heads \(4\)"):
        check_exportable(made.GPT2.model_copy(update=update))


def test_what_a_recipe_leaves_is_checked_before_it_is_made() -> None:
    heads = Recipe(structure=Structure(heads=0.5))
    check_exports(made.LLAMA, [heads], "auto")
    check_exports(made.GPT2, [Recipe(structure=Structure(neurons=0.5))], "auto")
    with pytest.raises(
        ValueError, match=r"recipe heads-s50: export: GPT-2 in Transformers .*leave structure\.heads out"
    ):
        check_exports(made.GPT2, [heads], "auto")
    with pytest.raises(ValueError, match=r"Conv1D: set export\.format to auto"):
        check_exports(made.GPT2, [], "compressed-tensors")


def test_the_streamed_figures_are_those_of_whole_logits(tmp_path: Path) -> None:
    path = _variants(tmp_path, "gpt2")[QUANTIZED.name]
    rows = made.rows(_config("gpt2"), 5)
    (total,) = tally([CompactFile(path)], lambda positions: rows[list(positions)], 5)
    tokens = torch.from_numpy(rows)
    logits = _our_logits(path, tokens[:, :-1]).double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    assert total.loss == pytest.approx(float(expected), rel=1e-6)
    assert total.correct == int((logits.argmax(-1) == tokens[:, 1:].flatten()).sum())
