"""Streamed evaluation: its figures against definitions, and what it holds in memory."""

import math
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from compression import evaluation, tasks
from compression.evaluation import tally
from compression.recipe import Recipe
from parallelism.data.batches import TokenBatches
from parallelism.models.gpt.config import GPTConfig
from tests.compression import made
from tests.compression.test_tasks import GRID, _compress


class _InMemory:
    """A model given whole; counts the layers that are alive."""

    def __init__(self, config: GPTConfig, weights: dict[str, torch.Tensor]) -> None:
        self.config, self.weights = config, weights
        self.alive: list[weakref.ref] = []
        self.most_alive = 0
        self.loads: list[int | None] = []

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        prefix = f"layers.{index}."
        return self._hand_out(
            index, {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}
        )

    def outer(self) -> dict[str, torch.Tensor]:
        outer = {name: value for name, value in self.weights.items() if not name.startswith("layers.")}
        cut = {
            name: outer[name][: self.config.vocab_size]
            for name in ("embedding.tokens", "output.weight")
            if name in outer
        }
        return self._hand_out(None, outer | cut)

    def _hand_out(self, index: int | None, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.alive.append(weakref.ref(next(iter(copies.values()))))
        self.most_alive = max(self.most_alive, len(self.alive))
        self.loads.append(index)
        return copies


def _rows(config: GPTConfig, count: int) -> evaluation.Rows:
    tokens = made.rows(config, count)
    return lambda positions: tokens[np.asarray(positions)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_knows_nothing_has_the_loss_of_a_uniform_guess(name: str) -> None:
    config = made.CONFIGS[name]
    weights = made.weights(config) | {"final_norm.weight": torch.zeros(config.hidden)}
    if "final_norm.bias" in weights:
        weights["final_norm.bias"] = torch.zeros(config.hidden)
    (total,) = tally([_InMemory(config, weights)], _rows(config, 4), 4)
    quality = total.quality("uniform", bytes_per_token=2.0)
    assert quality.tokens == 4 * 24
    assert quality.validation_loss == pytest.approx(math.log(250), abs=1e-6)  # the padded rows do not count
    assert quality.perplexity == pytest.approx(250, rel=1e-5)
    assert quality.bits_per_byte == pytest.approx(math.log2(250) / 2)


def test_accuracy_counts_the_likeliest_token() -> None:
    config = GPTConfig(style="llama", layers=1, hidden=8, heads=2, vocab_size=8, context=32)
    weights = {name: torch.zeros(shape) for name, shape in config.parameter_shapes().items()}
    # The layer adds nothing and every token's embedding is its own axis: the likeliest next token is the same again.
    weights["embedding.tokens"][:8] = torch.eye(8)
    weights |= {name: torch.ones_like(value) for name, value in weights.items() if "norm" in name}
    tokens = np.array([[3, 3, 5, 5, 5, 1, 2, 2, 0]])
    (total,) = tally([_InMemory(config, weights)], lambda positions: tokens, 1)
    assert (total.correct, total.tokens) == (4, 8)


def test_chunks_and_companions_do_not_change_a_model_s_figures() -> None:
    config = made.LLAMA
    models = [_InMemory(config, made.weights(config, seed)) for seed in range(3)]
    together = tally(models, _rows(config, 7), 7)
    for model, total in zip(models, together, strict=True):
        (alone,) = tally([model], _rows(config, 7), 7)
        (pieces,) = tally([model], _rows(config, 7), 7, hidden_bytes=1)
        assert alone.tokens == pieces.tokens == total.tokens == 7 * 24
        assert alone.loss == pytest.approx(total.loss, rel=1e-6)
        assert pieces.loss == pytest.approx(total.loss, rel=1e-6)
        assert pieces.correct == total.correct


def test_one_layer_is_in_memory_whatever_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    config = made.LLAMA.model_copy(update={"layers": 6})
    model = _InMemory(config, made.weights(config))
    tally([model], _rows(config, 5), 5)
    assert model.most_alive == 1
    assert model.loads == [None, 0, 1, 2, 3, 4, 5, None]


def test_models_of_different_depth_go_side_by_side() -> None:
    deep, flat = made.LLAMA, made.LLAMA.model_copy(update={"layers": 1})
    both = tally([_InMemory(deep, made.weights(deep)), _InMemory(flat, made.weights(flat))], _rows(deep, 3), 3)
    (alone,) = tally([_InMemory(flat, made.weights(flat))], _rows(flat, 3), 3)
    assert both[1].loss == pytest.approx(alone.loss, rel=1e-6)
    assert abs(both[0].loss - both[1].loss) > 0.05


def test_small_working_memory_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    config = made.GPT2
    (whole,) = tally([_InMemory(config, made.weights(config))], _rows(config, 5), 5)
    monkeypatch.setattr(evaluation, "WORKING_BYTES", 20_000)
    (pieces,) = tally([_InMemory(config, made.weights(config))], _rows(config, 5), 5)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    assert pieces.correct == whole.correct


def test_a_model_that_overflows_is_reported() -> None:
    config = made.LLAMA
    weights = made.weights(config)
    weights["final_norm.weight"] = torch.full((48,), 1e38)
    with pytest.raises(ValueError, match=r"the loss of model 1 is (nan|inf)"):
        tally([_InMemory(config, made.weights(config)), _InMemory(config, weights)], _rows(config, 2), 2)


def test_variants_are_measured_on_the_held_out_text(tmp_path: Path) -> None:
    config = made.LLAMA.model_copy(update={"vocab_size": 257})
    data = made.prepared_text(tmp_path)
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, made.weights(config, std=0.05))
    variants = _compress(checkpoint, tmp_path / "out", [GRID[0], GRID[2], GRID[3]])
    qualities = tasks.evaluate([variant.path for variant in variants], str(data), 24, 480, 1)
    reference = tasks.evaluate_checkpoint(str(checkpoint), str(data), 24, 480, 1)
    assert [quality.name for quality in qualities] == ["dense", "magnitude-s80", "rtn-w8g16"]
    assert all(quality.tokens == 480 for quality in [*qualities, reference])
    # Bfloat16 and 8 bits hardly change anything, 80 % zeros do.
    assert qualities[0].validation_loss == pytest.approx(reference.validation_loss, abs=2e-3)
    assert qualities[2].validation_loss == pytest.approx(reference.validation_loss, abs=2e-2)
    assert qualities[1].validation_loss != pytest.approx(reference.validation_loss, abs=2e-2)
    text = TokenBatches(data, "validation", 24, 1)
    assert qualities[0].bits_per_byte == pytest.approx(
        qualities[0].validation_loss / math.log(2) / text.prepared.bytes_per_token
    )


def test_more_text_than_there_is_is_measured_once(tmp_path: Path) -> None:
    config = made.LLAMA.model_copy(update={"vocab_size": 257})
    data = made.prepared_text(tmp_path)
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, made.weights(config))
    text = TokenBatches(data, "validation", 24, 1)
    quality = tasks.evaluate_checkpoint(str(checkpoint), str(data), 24, 10**9, 1)
    assert quality.tokens == text.samples_per_epoch * 24


def test_recipes_that_do_less_harm_score_better(tmp_path: Path) -> None:
    """On a model whose predictions are sharp, coarser codes and more zeros cost quality."""
    config = GPTConfig(style="llama", layers=2, hidden=64, heads=4, ffn_hidden=128, vocab_size=256, context=32)
    weights = made.weights(config, std=0.1)
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, weights)
    variants: Sequence[Recipe] = [GRID[0], GRID[3], GRID[4], GRID[2]]
    files = _compress(checkpoint, tmp_path / "out", list(variants))
    models = [tasks.CompactFile(file.path) for file in files]
    # Text that the model itself finds likely: its own greedy continuations.
    rows = _greedy(_InMemory(config, weights), made.rows(config, 16, length=4), 24)
    dense, eight, three, sparse = (t.loss for t in tally(models, lambda positions: rows[np.asarray(positions)], 16))
    assert dense < three
    assert eight < three
    assert eight == pytest.approx(dense, rel=0.02)
    assert dense < sparse


def _greedy(model: _InMemory, start: np.ndarray, length: int) -> np.ndarray:
    from parallelism.models.gpt import plain

    tokens = torch.from_numpy(start)
    while tokens.shape[1] < length + 1:
        hidden = plain.embed(model.config, model.outer(), tokens)
        for index in range(model.config.layers):
            hidden = plain.layer(model.config, model.layer(index), hidden)
        tokens = torch.cat([tokens, plain.logits(model.config, model.outer(), hidden)[:, -1:].argmax(-1)], dim=1)
    return tokens.numpy()
