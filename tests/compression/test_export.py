"""Exports: what Transformers makes of them, and that a false claim is noticed."""

import json
import os
from pathlib import Path

import pytest
import torch

from compression import tasks
from compression.checks import check_exportable
from compression.compact import CompactFile
from compression.evaluation import tally
from compression.export import export
from compression.results import ExportResult, Quality
from compression.verification import VerificationError, verify
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
    from parallelism.layer_reader import plain_family

    file = CompactFile(path)
    family, config = plain_family(file.config), file.config
    hidden = family.embed(config, file.outer(), rows)
    for index in range(config.layers):
        hidden = family.layer(config, file.layer(index), hidden)
    return family.logits(config, file.outer(), hidden)


@pytest.mark.parametrize("name", made.CONFIGS)
def test_transformers_computes_the_same_logits(tmp_path: Path, data: Path, name: str) -> None:
    rows = torch.from_numpy(made.rows(_config(name), 3))
    for recipe, path in _variants(tmp_path, name).items():
        result = export(path, str(tmp_path / recipe), str(data))
        theirs, ours = _logits(tmp_path / recipe, rows), _our_logits(path, rows)
        assert theirs.shape == (3, 25, 257)  # the padding of the vocabulary is gone
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
        assert result.dtype == ("float32" if "rtn" in recipe else "bfloat16")
        sizes = {file.name: file.stat().st_size for file in (tmp_path / recipe).glob("*.safetensors")}
        assert result.export_bytes == sum(sizes.values())
        assert set(result.checksums) == set(sizes)


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


def test_exports_are_verified_in_a_fresh_process(tmp_path: Path, data: Path) -> None:
    claims: list[tuple[ExportResult, Quality]] = []
    for name in ("llama", "gpt2-untied"):
        for recipe, path in _variants(tmp_path / name, name).items():
            if recipe in (DENSE.name, BOTH.name):
                quality = _measured(path, data)
                claims.append((export(path, str(tmp_path / name / recipe), str(data), quality=quality), quality))
    exports, qualities = [one for one, _ in claims], [two for _, two in claims]
    found = verify(exports, qualities, str(data), SEQUENCE, TOKENS, SEED)
    assert [one.name for one in found] == [one.name for one in exports]
    for one, quality in zip(found, qualities, strict=True):
        assert one.measured_loss == pytest.approx(quality.validation_loss, abs=1e-5)
        assert one.tokens == quality.tokens == TOKENS
        assert one.reader == "transformers"


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
    config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
    with pytest.raises(VerificationError, match="transformers cannot load"):
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


def test_the_streamed_figures_are_those_of_whole_logits(tmp_path: Path) -> None:
    path = _variants(tmp_path, "gpt2")[QUANTIZED.name]
    rows = made.rows(_config("gpt2"), 5)
    (total,) = tally([CompactFile(path)], lambda positions: rows[list(positions)], 5)
    tokens = torch.from_numpy(rows)
    logits = _our_logits(path, tokens[:, :-1]).double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    assert total.loss == pytest.approx(float(expected), rel=1e-6)
    assert total.correct == int((logits.argmax(-1) == tokens[:, 1:].flatten()).sum())
