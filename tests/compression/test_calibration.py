"""Calibration: what is gathered is what the layers saw, whatever was interrupted and however it was cut."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compression import tasks, text
from compression.calibration import (
    GRAM_BLOCK,
    CalibrationFiles,
    add_gram,
    calibrate_step,
    mirror,
    read_statistics,
)
from compression.sizes import statistics_bytes
from compression.text import CalibrationText, shards
from parallelism.layer_reader import CheckpointWeights, plain_family
from tests.compression import made

SEQUENCES, LENGTH = 5, 24


@pytest.fixture
def model(tmp_path: Path) -> CheckpointWeights:
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", made.LLAMA, made.weights(made.LLAMA), tensor=2)
    return CheckpointWeights(checkpoint)


@pytest.fixture(autouse=True)
def two_sequences_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "SHARD_SEQUENCES", 2)


def _tokens() -> np.ndarray:
    return made.rows(made.LLAMA, SEQUENCES, LENGTH)


def _rows(positions: object) -> np.ndarray:
    return _tokens()[np.asarray(positions)]


def _calibrate(model: CheckpointWeights, files: CalibrationFiles) -> None:
    for layer in range(model.config.layers):
        for shard, positions in enumerate(shards(SEQUENCES)):
            calibrate_step(model, _rows, layer, shard, positions, files)


class Fragile(CheckpointWeights):
    """Breaks off when one layer is read for the first time."""

    def __init__(self, directory: Path, fatal: int) -> None:
        super().__init__(directory)
        self.fatal = fatal
        self.passed: list[int] = []

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        self.passed.append(index)
        if index == self.fatal and self.passed.count(index) == 1:
            raise KeyboardInterrupt
        return super().layer(index)


def _seen(model: CheckpointWeights) -> list[dict[str, torch.Tensor]]:
    """Layer by layer, the inputs of every linear layer in one pass over everything, in float64."""
    family, config, seen = plain_family(model.config), model.config, []
    outer = {name: tensor.double() for name, tensor in model.outer().items()}
    hidden = family.embed(config, outer, torch.from_numpy(_tokens())[:, :-1])
    for index in range(config.layers):
        inputs: dict[str, torch.Tensor] = {}
        weights = {name: tensor.double() for name, tensor in model.layer(index).items()}
        before = hidden
        hidden = family.layer(config, weights, hidden, lambda name, x, into=inputs: into.update({name: x}))
        inputs["influence"] = 1 - torch.nn.functional.cosine_similarity(before, hidden, dim=-1).mean()
        seen.append(inputs)
    return seen


def test_sums_are_those_of_all_inputs_of_the_layer(tmp_path: Path, model: CheckpointWeights) -> None:
    files = CalibrationFiles(tmp_path / "out", "x")
    _calibrate(model, files)
    for layer, seen in enumerate(_seen(model)):
        statistics = read_statistics(files, layer, SEQUENCES, damping=0.02)
        assert statistics.influence == pytest.approx(float(seen.pop("influence")), abs=1e-5)
        assert set(statistics.inputs) == set(seen)
        for name, inputs in seen.items():
            flat, found = inputs.flatten(0, 1), statistics.inputs[name]
            assert (found.rows, found.damping) == (SEQUENCES * LENGTH, 0.02)
            scale = float((flat.T @ flat).abs().max())
            torch.testing.assert_close(found.hessian.double(), flat.T @ flat, rtol=0, atol=1e-5 * scale)
            torch.testing.assert_close(found.absmax.double(), flat.abs().amax(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.mean_abs.double(), flat.abs().mean(0), rtol=1e-4, atol=1e-5)
        for one, other in (("attention.q", "attention.k"), ("attention.q", "attention.v"), ("mlp.gate", "mlp.up")):
            assert statistics.inputs[one] is statistics.inputs[other]
        assert len({id(found) for found in statistics.inputs.values()}) == 4


def test_what_they_take_on_the_disk_is_known_before(tmp_path: Path, model: CheckpointWeights) -> None:
    files = CalibrationFiles(tmp_path / "out", "x")
    _calibrate(model, files)
    sizes = {path.stat().st_size for path in files.folder.rglob("*.safetensors")}
    assert max(sizes) <= statistics_bytes(model.config) < 1.05 * min(sizes)


def test_interrupted_in_any_layer_the_sums_are_the_same_bits(tmp_path: Path, model: CheckpointWeights) -> None:
    whole, layers = CalibrationFiles(tmp_path / "whole", "x"), model.config.layers
    _calibrate(model, whole)
    for fatal in range(layers):
        broken = CalibrationFiles(tmp_path / f"broken{fatal}", "x")
        fragile = Fragile(model.reader.directory, fatal)
        with pytest.raises(KeyboardInterrupt):
            _calibrate(fragile, broken)
        _calibrate(fragile, broken)
        count = len(shards(SEQUENCES))
        assert fragile.passed == sorted([fatal, *(layer for layer in range(layers) for _ in range(count))])
        for path in sorted(whole.folder.rglob("*.safetensors")):
            assert path.read_bytes() == (broken.folder / path.relative_to(whole.folder)).read_bytes()
        assert len(list(broken.folder.glob("hidden-*"))) == count


def test_killed_between_sums_and_states_a_step_is_done_again(tmp_path: Path, model: CheckpointWeights) -> None:
    files = CalibrationFiles(tmp_path / "out", "x")
    _calibrate(model, files)
    path = files.sums(1, 0)
    expected = path.read_bytes()
    again = CalibrationFiles(tmp_path / "again", "x")
    calibrate_step(model, _rows, 0, 0, shards(SEQUENCES)[0], again)
    states = again.hidden(1, 0).read_bytes()
    calibrate_step(model, _rows, 1, 0, shards(SEQUENCES)[0], again)
    again.hidden(2, 0).unlink()
    again.hidden(1, 0).write_bytes(states)
    calibrate_step(model, _rows, 1, 0, shards(SEQUENCES)[0], again)
    assert again.sums(1, 0).read_bytes() == expected


def test_what_is_done_is_not_done_again(tmp_path: Path, model: CheckpointWeights) -> None:
    files = CalibrationFiles(tmp_path / "out", "x")
    _calibrate(model, files)
    times = {path: path.stat().st_mtime_ns for path in files.folder.rglob("*.safetensors")}
    assert len(times) == model.config.layers * len(shards(SEQUENCES))
    _calibrate(model, files)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    files.remove_layer(1)
    _calibrate(model, files)
    assert not files.sums(1, 0).exists()


def test_missing_statistics_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 1 has not been calibrated"):
        read_statistics(CalibrationFiles(tmp_path, "x"), 1, SEQUENCES, 0.01)


def test_the_task_takes_its_text_from_prepared_data(tmp_path: Path) -> None:
    config = made.LLAMA.model_copy(update={"vocab_size": 257})
    source = str(made.write_checkpoint(tmp_path / "checkpoint", config, made.weights(config)))
    data = str(made.prepared_text(tmp_path))
    wanted = CalibrationText(data_dir=data, sequence_length=24, sequences=SEQUENCES, seed=3, damping=0.01)
    for layer in range(config.layers):
        for shard in range(len(shards(SEQUENCES))):
            tasks.calibrate(source, layer, shard, wanted, str(tmp_path / "out"))
    (folder,) = (tmp_path / "out" / "statistics").iterdir()
    statistics = read_statistics(CalibrationFiles(tmp_path / "out", folder.name), 2, SEQUENCES, 0.01)
    assert statistics.inputs["mlp.down"].rows == SEQUENCES * 24


@pytest.mark.parametrize("width", [1, GRAM_BLOCK, GRAM_BLOCK + 1, 3 * GRAM_BLOCK - 5])
def test_the_gram_matrix_in_blocks_is_the_whole_one_and_symmetric(width: int) -> None:
    first, second = (torch.randn(50, width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    upper = torch.zeros(width, width)
    for rows in (first, second):
        add_gram(upper, rows)
    whole = mirror(upper)
    exact = first.double().T @ first.double() + second.double().T @ second.double()
    assert torch.equal(whole, whole.T)
    assert torch.equal(mirror(whole.clone()), whole)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-4)
