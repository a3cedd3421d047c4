"""Chains: every layer is calibrated on what the recipe's own layers before it let through."""

from pathlib import Path

import numpy as np
import pytest
import torch

from compression import tasks
from compression.activations import RoundedInputs
from compression.calibration import CalibrationFiles, Gathered
from compression.compact import CompactFile
from compression.recipe import Quantization, Recipe
from compression.text import CalibrationText
from compression.workspace import Workspace, chain_directory
from parallelism.layer_reader import CheckpointWeights, plain_family
from tests.compression import made

ROUND = Recipe(quantize=Quantization(method="rtn", bits=3, group_size=16), embedding_bits=8)
ROUND_BOTH = Recipe(quantize=Quantization(method="rtn", bits=8, activation_bits=8), embedding_bits=8)
CONFIG = made.LLAMA.model_copy(update={"vocab_size": 257})
SEQUENCES = 4


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(made.write_checkpoint(tmp_path / "checkpoint", CONFIG, made.weights(CONFIG), tensor=2))


@pytest.fixture
def text(tmp_path: Path) -> CalibrationText:
    data = str(made.prepared_text(tmp_path))
    return CalibrationText(data_dir=data, sequence_length=24, sequences=SEQUENCES, seed=3, damping=0.01)


def _chain(source: str, text: CalibrationText, out: Path, layers: int = CONFIG.layers, recipe: Recipe = ROUND) -> None:
    tasks.compress_outer(source, [recipe], str(out))
    for layer in range(layers):
        tasks.compress_next(source, layer, recipe, str(out), text=text)


@pytest.mark.parametrize("recipe", [ROUND, ROUND_BOTH], ids=["weights", "weights-and-activations"])
def test_states_are_those_behind_the_compressed_layers(
    tmp_path: Path, source: str, text: CalibrationText, recipe: Recipe
) -> None:
    _chain(source, text, tmp_path / "out", recipe=recipe)
    variant = CompactFile(tasks.assemble(source, recipe, str(tmp_path / "out"), sequential=True).path)
    family, rows = plain_family(CONFIG), text.batches().rows(range(SEQUENCES))
    hidden = family.embed(CONFIG, variant.outer(), torch.from_numpy(rows)[:, :-1])
    for layer in range(CONFIG.layers):
        hidden = family.layer(CONFIG, variant.layer(layer), hidden, RoundedInputs.of(recipe))
    (states,) = chain_directory(str(tmp_path / "out"), recipe).rglob("hidden-*.npy")
    assert states.stem.endswith(f"-{CONFIG.layers:05d}")
    torch.testing.assert_close(torch.from_numpy(np.load(states)), hidden, rtol=1e-4, atol=1e-4)


def test_a_method_without_statistics_gives_the_same_file_as_without_a_chain(
    tmp_path: Path, source: str, text: CalibrationText
) -> None:
    _chain(source, text, tmp_path / "chain")
    chained = CompactFile(tasks.assemble(source, ROUND, str(tmp_path / "chain"), sequential=True).path)
    for layer in range(CONFIG.layers):
        tasks.compress_layer(source, layer, [ROUND], str(tmp_path / "plain"))
    tasks.compress_outer(source, [ROUND], str(tmp_path / "plain"))
    plain = CompactFile(tasks.assemble(source, ROUND, str(tmp_path / "plain")).path)
    assert chained.file.specs == plain.file.specs
    assert all(torch.equal(chained.file.read(name), plain.file.read(name)) for name in plain.file.specs)


def test_statistics_come_from_the_compressed_layers(
    tmp_path: Path, source: str, text: CalibrationText, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Gathered] = []
    statistics = Gathered.statistics
    monkeypatch.setattr(Gathered, "statistics", lambda self, damping: (seen.append(self), statistics(self, damping))[1])
    _chain(source, text, tmp_path / "out", layers=2)
    family, model, rows = plain_family(CONFIG), CheckpointWeights(source), text.batches().rows(range(SEQUENCES))
    parts = Workspace(chain_directory(str(tmp_path / "out"), ROUND))
    first = CompactFile(parts.layer(0) / parts.require(0).parts[0].file)
    outer = Workspace(tmp_path / "out")
    embedding = CompactFile(outer.layer(None) / outer.require(None).parts[0].file).outer()
    hidden = family.embed(CONFIG, embedding, torch.from_numpy(rows)[:, :-1])
    expected = Gathered()
    family.layer(CONFIG, model.layer(1), family.layer(CONFIG, first.layer(0), hidden), expected)
    for name, sums in expected.sums.items():
        scale = float(sums.hessian.abs().max())
        torch.testing.assert_close(seen[1].sums[name].hessian, sums.hessian, rtol=0, atol=1e-5 * scale)


def test_killed_between_commit_and_states_a_step_is_completed(
    tmp_path: Path, source: str, text: CalibrationText
) -> None:
    _chain(source, text, tmp_path / "whole")
    _chain(source, text, tmp_path / "broken", layers=2)
    (states,) = chain_directory(str(tmp_path / "broken"), ROUND).rglob("hidden-*.npy")
    kept = states.read_bytes()
    # As if the process had died before the states of step 1 appeared: those before it are still there.
    files = CalibrationFiles(chain_directory(str(tmp_path / "broken"), ROUND), states.parent.name)
    one = tmp_path / "one"
    _chain(source, text, one, layers=1)
    (earlier,) = chain_directory(str(one), ROUND).rglob("hidden-*.npy")
    files.hidden(1, 0).write_bytes(earlier.read_bytes())
    states.unlink()
    tasks.compress_next(source, 1, ROUND, str(tmp_path / "broken"), text=text)
    assert states.read_bytes() == kept
    tasks.compress_next(source, 2, ROUND, str(tmp_path / "broken"), text=text)
    paths = [tasks.assemble(source, ROUND, str(tmp_path / one), sequential=True).path for one in ("whole", "broken")]
    assert Path(paths[0]).read_bytes() == Path(paths[1]).read_bytes()
