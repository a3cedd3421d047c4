"""Activations in eight bits: by hand, as compressed-tensors rounds them, and in the evaluation of a variant."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm, silu

from compression import tasks
from compression.activations import RoundedInputs, round_fp8, round_int8
from compression.compact import CompactFile
from compression.evaluation import tally
from compression.recipe import Quantization, Recipe
from parallelism.models.gpt import plain
from parallelism.models.gpt.config import GPTConfig
from tests.compression import layers, made
from tests.compression.test_tasks import _compress

W8 = Recipe(quantize=Quantization(method="rtn", bits=8))
W8A8 = Recipe(quantize=Quantization(method="rtn", bits=8, activation_bits=8))


def test_int8_by_hand() -> None:
    row = torch.tensor([[2.55, -2.55, 0.011, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-51.0, 25.3, 0.19, -0.21, 1.0]])
    # Scales 0.02 and 0.4: 2.55 / 0.02 = 127.5 is cut to 127, -127.5 goes to the even -128.
    expected = [[2.54, -2.56, 0.02, 1.0, 0.0], [0.0] * 5, [-51.2, 25.2, 0.0, -0.4, 0.8]]
    torch.testing.assert_close(round_int8(row), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_fp8_by_hand() -> None:
    row = torch.tensor([[448.0, 17.0, -1.06, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    # Three bits of mantissa: steps of 2 from 16 to 32, of 1/8 from 1 to 2, of 1/32 from 1/4 to 1/2.
    expected = [[448.0, 16.0, -1.0, 0.3125, 0.0], [0.0] * 5]
    torch.testing.assert_close(round_fp8(row), torch.tensor(expected))
    torch.testing.assert_close(round_fp8(row * 3.0), torch.tensor(expected) * 3.0)


@pytest.mark.parametrize(("kind", "ours"), [("int", round_int8), ("float", round_fp8)])
def test_the_bits_are_those_of_compressed_tensors(kind: str, ours: object) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    inputs = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(0)) * 3
    arguments = quantization.QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    scale, zero = helpers.compute_dynamic_scales_and_zp(inputs, arguments, None)
    assert callable(ours)
    assert torch.equal(ours(inputs), forward.fake_quantize(inputs, scale, zero, arguments))


def test_every_linear_layer_takes_the_rounded_input() -> None:
    config = GPTConfig(style="llama", layers=1, hidden=16, heads=1, ffn_hidden=24, vocab_size=8, context=32)
    weights, token = layers.weights_of(config), torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))

    def times(name: str, inputs: torch.Tensor) -> torch.Tensor:
        scale = inputs.abs().max() / 127.5
        return (inputs / scale).round().clamp(-128, 127) * scale @ weights[f"{name}.weight"].T

    # One token attends to itself alone: attention gives back its value.
    middle = token + times(
        "attention.o", times("attention.v", rms_norm(token, (16,), weights["attention.norm.weight"], 1e-5))
    )
    normed = rms_norm(middle, (16,), weights["mlp.norm.weight"], 1e-5)
    expected = middle + times("mlp.down", silu(times("mlp.gate", normed)) * times("mlp.up", normed))
    found = plain.layer(config, weights, token, RoundedInputs("int"))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain.layer(config, weights, token), rtol=1e-4)


def test_shared_inputs_stay_shared() -> None:
    rounded, seen = RoundedInputs("int"), []
    made_layer = layers.layer(made.LLAMA)

    def watch(name: str, inputs: torch.Tensor) -> torch.Tensor:
        seen.append((inputs, rounded(name, inputs)))
        return seen[-1][1]

    plain.layer(made.LLAMA, made_layer.weights, made_layer.hidden, watch)
    assert len({id(inputs) for inputs, _ in seen}) == len({id(replaced) for _, replaced in seen}) == 4


def test_variants_with_rounded_activations_are_measured_so(tmp_path: Path) -> None:
    config = made.LLAMA
    checkpoint = made.write_checkpoint(tmp_path / "checkpoint", config, made.weights(config))
    files = _compress(checkpoint, tmp_path / "out", [W8, W8A8])
    models = [CompactFile(file.path) for file in files]
    tokens = made.rows(config, 6)
    exact, rounded = tally(models, lambda positions: tokens[np.asarray(positions)], 6)
    batch, variant = torch.from_numpy(tokens), models[1]
    hidden = plain.embed(config, variant.outer(), batch[:, :-1])
    for index in range(config.layers):
        hidden = plain.layer(config, variant.layer(index), hidden, lambda name, inputs: round_int8(inputs))
    logits = plain.logits(config, variant.outer(), hidden)
    expected = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
    assert rounded.loss == pytest.approx(float(expected), rel=1e-6)
    assert rounded.loss != pytest.approx(exact.loss, rel=1e-5)
    assert rounded.loss == pytest.approx(exact.loss, rel=2e-2)
    assert tasks.read_variant(files[1].path).name == "rtn-w8a8"
