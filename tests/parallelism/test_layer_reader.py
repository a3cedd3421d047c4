"""One layer of a sharded checkpoint, in a plain process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallelism.layer_reader import CheckpointWeights, LayerReader
from tests.compression import made


@pytest.mark.parametrize("name", made.CONFIGS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_weight_comes_back_whatever_ranks_wrote_it(tmp_path: Path, name: str, ranks: int) -> None:
    config = made.CONFIGS[name]
    expected = made.weights(config)
    source = CheckpointWeights(made.write_checkpoint(tmp_path, config, expected, tensor=ranks))
    found = {
        f"layers.{index}.{key}": value for index in range(config.layers) for key, value in source.layer(index).items()
    }
    found |= source.outer()
    assert set(found) == set(expected)
    for key, value in found.items():
        whole = expected[key][: config.vocab_size] if key in ("embedding.tokens", "output.weight") else expected[key]
        assert torch.equal(value, whole), key


def test_weights_in_bfloat16_come_as_float32(tmp_path: Path) -> None:
    expected = made.weights(made.LLAMA)
    reader = LayerReader(made.write_checkpoint(tmp_path, made.LLAMA, expected, dtype=torch.bfloat16))
    found = reader.layer(1)["self_attention.linear_proj.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected["layers.1.attention.o.weight"].bfloat16().float())


def _read_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's count of read bytes")
@pytest.mark.parametrize("ranks", [1, 2])
def test_only_the_bytes_of_one_layer_are_read(tmp_path: Path, ranks: int) -> None:
    config = made.LLAMA.model_copy(update={"hidden": 240, "ffn_hidden": 320, "layers": 6})
    path = made.write_checkpoint(tmp_path, config, made.weights(config), tensor=ranks)
    reader = LayerReader(path)
    reader.layer(0)  # what torch imports lazily is read here
    before = _read_bytes()
    layer = reader.layer(3)
    read = _read_bytes() - before
    size = sum(value.numel() * 4 for value in layer.values())
    assert size <= read < 1.03 * size + 16384, (read, size)
    assert read < reader.info.bytes / 15  # six layers, each with two moments


def test_no_megatron_is_imported() -> None:
    code = "import sys, parallelism.layer_reader, parallelism.models.gpt.plain; print('megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = made.write_checkpoint(tmp_path, made.LLAMA, made.weights(made.LLAMA))
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"damaged.*distcp"):
        LayerReader(path)


def test_a_checkpoint_without_manifest_is_refused(tmp_path: Path) -> None:
    path = made.write_checkpoint(tmp_path, made.LLAMA, made.weights(made.LLAMA))
    (path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        LayerReader(path)


def test_bytes_that_were_overwritten_are_reported_with_the_layer(tmp_path: Path) -> None:
    path = made.write_checkpoint(tmp_path, made.LLAMA, made.weights(made.LLAMA))
    reader = LayerReader(path)
    shard = next(path.glob("*.distcp"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="layer 2 cannot be read"):
        reader.layer(2)


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    path = made.write_checkpoint(tmp_path, made.LLAMA, made.weights(made.LLAMA), tensor=2)
    reader = LayerReader(path)
    chunks = reader._tensors["decoder.layers.1.mlp.linear_fc2.weight"].chunks
    del chunks[1]
    with pytest.raises(ValueError, match=r"layer 1: shards of decoder\.layers\.1\.mlp\.linear_fc2\.weight are missing"):
        reader.layer(1)


def test_a_model_of_another_shape_than_the_manifest_says(tmp_path: Path) -> None:
    path = made.write_checkpoint(tmp_path, made.LLAMA, made.weights(made.LLAMA))
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"ffn_hidden": 64', '"ffn_hidden": 128'))
    with pytest.raises(ValueError, match=r"mlp\.\w+\.weight has shape"):
        CheckpointWeights(path).layer(0)
