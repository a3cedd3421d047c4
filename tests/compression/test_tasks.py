"""From a sharded checkpoint to variants: commits, reruns, bytes, errors."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compression import tasks
from compression.checks import check_recipes
from compression.compact import CompactFile
from compression.compact import assemble as assemble_parts
from compression.config import CompressionConfig
from compression.packing import packed_bytes
from compression.recipe import Quantization, Recipe, grid
from compression.results import LayerResult, VariantFile
from compression.solve import solve_matrix
from compression.workspace import Workspace
from parallelism.layer_reader import CheckpointWeights
from tests.compression import made

GRID = grid(
    CompressionConfig.model_validate(
        {
            "prune": {"methods": ["magnitude"], "sparsity": [0.5, 0.8]},
            "quantize": {"methods": ["rtn"], "bits": [8, 3], "group_size": 16},
            "combine": True,
        }
    )
)


def _compress(checkpoint: Path, out: Path, recipes: list[Recipe] = GRID) -> list[VariantFile]:
    layers = CheckpointWeights(checkpoint).config.layers
    for layer in range(layers):
        tasks.compress_layer(str(checkpoint), layer, recipes, str(out))
    tasks.compress_outer(str(checkpoint), recipes, str(out))
    return [tasks.assemble(str(checkpoint), recipe, str(out)) for recipe in recipes]


@pytest.mark.parametrize("name", made.CONFIGS)
def test_a_variant_reads_back_bit_for_bit_what_the_methods_made(tmp_path: Path, name: str) -> None:
    config, weights = made.CONFIGS[name], made.weights(made.CONFIGS[name])
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, weights, tensor=2)
    for variant in _compress(checkpoint, tmp_path / "out"):
        file, recipe = CompactFile(variant.path), variant.recipe
        assert file.config == config
        assert file.recipe == recipe
        for index in range(config.layers):
            layer = file.layer(index)
            assert set(layer) == set(config.layer_shapes())
            for key, value in layer.items():
                original = weights[f"layers.{index}.{key}"]
                matrix = original.ndim == 2
                expected = solve_matrix(original, [recipe])[0].dense() if matrix else original.bfloat16().float()
                assert torch.equal(value, expected), (recipe.name, key)
        outer = file.outer()
        embedding = Quantization(method="rtn", bits=8) if recipe.embedding_bits == 8 else None
        for key, value in outer.items():
            original = weights[key][: config.vocab_size] if value.shape[0] == config.vocab_size else weights[key]
            alone = solve_matrix(original, [Recipe(quantize=embedding)])[0].dense() if original.ndim == 2 else None
            assert torch.equal(value, original.bfloat16().float() if alone is None else alone), key


def test_the_files_do_not_depend_on_how_the_checkpoint_was_sharded(tmp_path: Path) -> None:
    weights = made.weights(made.LLAMA)
    files = []
    for ranks in (1, 2):
        checkpoint = made.write_checkpoint(tmp_path / f"checkpoint{ranks}", made.LLAMA, weights, tensor=ranks)
        files.append(_compress(checkpoint, tmp_path / f"out{ranks}"))
    for one, two in zip(*files, strict=True):
        first, second = CompactFile(one.path), CompactFile(two.path)
        assert first.encodings == second.encodings
        assert first.file.specs == second.file.specs
        assert all(torch.equal(first.file.read(name), second.file.read(name)) for name in first.file.specs)


def test_bytes_are_those_of_the_file_and_follow_from_the_recipe(tmp_path: Path) -> None:
    config = made.LLAMA.model_copy(update={"vocab_size": 256, "hidden": 96, "ffn_hidden": 256})
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, made.weights(config))
    variants = {variant.name: variant for variant in _compress(checkpoint, tmp_path / "out")}
    linear = config.layers * sum(rows * columns for rows, columns in config.linear_shapes().values())
    embedding, norms = 256 * 96, (2 * config.layers + 1) * 96
    assert variants["dense"].parameters == linear + embedding + norms == config.parameter_count()
    kept = {
        0.5: linear // 2,
        0.8: linear
        - sum(config.layers * round(0.8 * rows * columns) for rows, columns in config.linear_shapes().values()),
    }
    scales = linear // 16 * 2
    expected = {
        "dense": 2 * linear,
        "magnitude-s50": 2 * kept[0.5] + linear // 8,
        "magnitude-s80": 2 * kept[0.8] + linear // 8,
        "rtn-w8g16": linear + scales,
        "rtn-w3g16": packed_bytes(linear, 3) + scales,
        "magnitude-s50+rtn-w3g16": packed_bytes(kept[0.5], 3) + linear // 8 + scales,
        "magnitude-s80+rtn-w8g16": kept[0.8] + linear // 8 + scales,
    }
    for name, matrices in expected.items():
        variant = variants[name]
        outer = 2 * embedding if variant.recipe.embedding_bits == 16 else embedding + 2 * 256
        header = variant.bytes - (matrices + outer + 2 * norms)
        assert variant.bytes == os.stat(variant.path).st_size
        # Each matrix of a sparse three-bit variant may end inside a byte; the header names every tensor.
        assert 0 < header < 10_000 + 200 * config.layers * 7, (name, header)
        assert variant.bits_per_parameter == 8 * variant.bytes / variant.parameters
    assert variants["magnitude-s50+rtn-w3g16"].sparsity == 0.5
    assert variants["rtn-w3g16"].sparsity == 0.0
    assert variants["dense"].relative_error < 1e-5 < variants["rtn-w8g16"].relative_error


def _times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "layers").rglob("*") if path.is_file()}


def test_a_rerun_makes_only_what_is_not_committed(tmp_path: Path) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    before = _compress(checkpoint, tmp_path / "out")
    digest = {variant.name: Path(variant.path).read_bytes() for variant in before}
    made_at = _times(tmp_path / "out")
    damaged = next((tmp_path / "out" / "layers" / "00001").glob("magnitude-s50.*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "out" / "layers" / "00002" / "manifest.json").unlink()
    after = _compress(checkpoint, tmp_path / "out")
    assert after == before
    assert {variant.name: Path(variant.path).read_bytes() for variant in after} == digest
    untouched = {path.name for path in (tmp_path / "out" / "layers" / "00000").iterdir()}
    changed = {name for name, at in _times(tmp_path / "out").items() if made_at[name] != at}
    assert damaged.name in changed
    # Files of one recipe have the same name in every layer: compare layer 0 by its folder.
    assert untouched == {path.name for path in (tmp_path / "out" / "layers" / "00001").iterdir()}


def test_a_committed_layer_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    first = tasks.compress_layer(str(checkpoint), 1, GRID, str(tmp_path / "out"))
    monkeypatch.setattr(CheckpointWeights, "layer", _refuse)
    assert tasks.compress_layer(str(checkpoint), 1, GRID, str(tmp_path / "out")) == first
    with pytest.raises(AssertionError, match="read again"):
        tasks.compress_layer(str(checkpoint), 1, GRID[:3], str(tmp_path / "out"))


def _refuse(*_: object) -> None:
    raise AssertionError("read again")


def test_another_grid_or_checkpoint_replaces_what_was_committed(tmp_path: Path) -> None:
    first = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA), step=5)
    second = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA, seed=1), step=9)
    _compress(first, tmp_path / "out", GRID[:2])
    tasks.compress_layer(str(second), 0, GRID[:2], str(tmp_path / "out"))
    with pytest.raises(ValueError, match="different grids or checkpoints"):
        tasks.assemble(str(second), GRID[0], str(tmp_path / "out"))
    variants = _compress(second, tmp_path / "out", GRID[:3])
    expected = made.weights(made.LLAMA, seed=1)["layers.0.mlp.up.weight"].bfloat16().float()
    assert torch.equal(CompactFile(variants[0].path).tensor("layers.0.mlp.up.weight"), expected)
    assert len(list((tmp_path / "out" / "layers" / "00000").glob("*.safetensors"))) == 3
    with pytest.raises(ValueError, match=rf"recipe {GRID[5].name.replace('+', '.')} was not compressed"):
        tasks.assemble(str(second), GRID[5], str(tmp_path / "out"))


def test_assembling_before_every_layer_is_committed_is_refused(tmp_path: Path) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    tasks.compress_outer(str(checkpoint), GRID, str(tmp_path / "out"))
    tasks.compress_layer(str(checkpoint), 0, GRID, str(tmp_path / "out"))
    with pytest.raises(ValueError, match="layer 1 has not been compressed"):
        tasks.assemble(str(checkpoint), GRID[0], str(tmp_path / "out"))


def test_a_worker_killed_anywhere_leaves_nothing_that_counts(tmp_path: Path) -> None:
    """A worker is killed at different moments of its layer; the rerun's files are those of an undisturbed run."""
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    undisturbed = _compress(checkpoint, tmp_path / "calm")
    code = (
        "import sys; from compression import tasks; from tests.compression.test_tasks import GRID\n"
        "print('go', flush=True)\n"
        "for layer in range(3): tasks.compress_layer(sys.argv[1], layer, GRID, sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").rglob("magnitude-s50.*")) and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.send_signal(signal.SIGKILL)
    workspace = Workspace(tmp_path / "out")
    committed = [workspace.committed(index) for index in range(3)]
    assert None in committed  # killed before it was done
    after = _compress(checkpoint, tmp_path / "out")
    for one, two in zip(undisturbed, after, strict=True):
        assert Path(one.path).read_bytes() == Path(two.path).read_bytes()


def test_results_are_json(tmp_path: Path) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    result = tasks.compress_layer(str(checkpoint), 0, GRID, str(tmp_path / "out"))
    assert LayerResult.model_validate_json(result.model_dump_json()) == result
    assert [part.recipe for part in result.parts] == GRID
    (dense, *_) = result.parts
    assert dense.facts.weights == sum(rows * columns for rows, columns in made.LLAMA.linear_shapes().values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, bad: float) -> None:
    weights = made.weights(made.LLAMA)
    weights["layers.1.attention.k.weight"][3, 5] = bad
    weights["final_norm.weight"][2] = bad
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, weights)
    with pytest.raises(ValueError, match=r"layer 1, attention\.k\.weight: 1 of 768 weights are not finite"):
        tasks.compress_layer(str(checkpoint), 1, GRID, str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"final_norm\.weight: 1 of 48 weights"):
        tasks.compress_outer(str(checkpoint), GRID, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_group_that_does_not_divide_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = Recipe(quantize=Quantization(method="rtn", bits=4, group_size=20))
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    message = r"quantize\.group_size 20 does not divide the 48 columns of layers\.0\.attention\.q\.weight"
    with pytest.raises(ValueError, match=message):
        tasks.compress_layer(str(checkpoint), 1, [recipe], str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        check_recipes(made.LLAMA, [recipe])
    assert not (tmp_path / "out").exists()


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    recipes = [Recipe(), Recipe(embedding_bits=8)]
    with pytest.raises(ValueError, match="makes a second recipe called dense"):
        tasks.compress_outer(str(checkpoint), recipes, str(tmp_path / "out"))


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(path.read_bytes()[:-7]), lambda path: path.write_bytes(b"no model at all")],
)
def test_a_damaged_variant_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    (variant,) = _compress(checkpoint, tmp_path / "out", GRID[:1])
    damage(Path(variant.path))
    with pytest.raises(ValueError, match=r"dense\.safetensors is truncated or no safetensors file"):
        tasks.read_variant(variant.path)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no compact file of format 1"):
        CompactFile(tmp_path / "other.safetensors")


def test_a_header_can_be_read_without_the_weights(tmp_path: Path) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    (variant,) = _compress(checkpoint, tmp_path / "out", GRID[4:5])
    Workspace(tmp_path / "out").remove_layers()
    assert tasks.read_variant(variant.path) == variant
    assert CompactFile(variant.path).facts["trained"]["step"] == 5
    assert not (tmp_path / "out" / "layers").exists()


def test_assembly_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA))
    _compress(checkpoint, tmp_path / "out", GRID[:1])
    parts = sorted((tmp_path / "out" / "layers").rglob("*.safetensors"))
    from compression.container import TensorFile

    reads: list[str] = []
    original = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name: reads.append(name) or original(self, name))
    assemble_parts(parts, {}, tmp_path / "whole")
    assert sorted(reads) == sorted(TensorFile(tmp_path / "whole").specs)  # every tensor is read once
