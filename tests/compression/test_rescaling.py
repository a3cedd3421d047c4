"""AWQ and SmoothQuant: the layer's function stays, the scales are the papers', and rounding hurts less."""

import pytest
import torch

from compression.methods import awq, smoothquant
from compression.methods.base import Rescaler
from compression.methods.rtn import quantize, round_to_nearest
from compression.recipe import Quantization, Recipe
from compression.solve import solve_layer
from parallelism.models.gpt import plain
from parallelism.models.gpt.config import GPTConfig
from tests.compression import layers, made

FOUR = Recipe(quantize=Quantization(method="awq", bits=4, group_size=16))
THREE = Recipe(quantize=Quantization(method="awq", bits=3))
EIGHT = Recipe(quantize=Quantization(method="smoothquant", bits=8, activation_bits=8))
CASES = [(awq.rescale, FOUR), (awq.rescale, THREE), (smoothquant.rescale, EIGHT)]


@pytest.mark.parametrize("config", list(made.CONFIGS.values()), ids=list(made.CONFIGS))
@pytest.mark.parametrize(("rescale", "recipe"), CASES, ids=["awq-group", "awq-channel", "smoothquant"])
def test_the_layer_computes_the_same_and_its_statistics_follow(
    rescale: Rescaler, recipe: Recipe, config: GPTConfig
) -> None:
    made_layer = layers.layer(config)
    before = {name: value.clone() for name, value in made_layer.weights.items()}
    weights, statistics = rescale(config, made_layer.weights, made_layer.statistics, recipe)
    assert all(torch.equal(before[name], value) for name, value in made_layer.weights.items())
    assert not torch.equal(weights["attention.q.weight"], before["attention.q.weight"])
    output = plain.layer(config, weights, made_layer.hidden)
    scale = float(made_layer.output.abs().max())
    torch.testing.assert_close(output, made_layer.output, rtol=0.0, atol=1e-5 * scale)
    expected = layers.layer(config, weights).statistics
    for name, known in expected.inputs.items():
        found = statistics.inputs[name]
        torch.testing.assert_close(found.hessian, known.hessian, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.absmax, known.absmax, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mean_abs, known.mean_abs, rtol=1e-4, atol=1e-5)
    assert statistics.inputs["attention.q"] is statistics.inputs["attention.v"]
    assert len({id(known) for known in statistics.inputs.values()}) == 4


def test_scales_move_only_where_nothing_else_reads_them() -> None:
    made_layer = layers.layer(made.LLAMA)  # six heads share two key/value heads
    weights, _ = awq.rescale(made.LLAMA, made_layer.weights, made_layer.statistics, THREE)
    assert torch.equal(weights["attention.o.weight"], made_layer.weights["attention.o.weight"])
    assert not torch.equal(weights["mlp.down.weight"], made_layer.weights["mlp.down.weight"])
    gelu = layers.layer(made.GPT2)
    weights, _ = awq.rescale(made.GPT2, gelu.weights, gelu.statistics, THREE)
    assert torch.equal(weights["mlp.down.weight"], gelu.weights["mlp.down.weight"])
    assert not torch.equal(weights["attention.o.weight"], gelu.weights["attention.o.weight"])
    weights, _ = smoothquant.rescale(made.GPT2, gelu.weights, gelu.statistics, EIGHT)
    assert torch.equal(weights["attention.o.weight"], gelu.weights["attention.o.weight"])


def test_awq_takes_the_exponent_of_least_output_error() -> None:
    made_layer = layers.layer(made.LLAMA_UNTIED)
    inputs = made_layer.statistics.inputs["mlp.gate"]
    matrices = [made_layer.weights[f"mlp.{name}.weight"] for name in ("gate", "up")]
    seen: dict[str, torch.Tensor] = {}
    plain.layer(made_layer.config, made_layer.weights, made_layer.hidden, lambda name, x: seen.update({name: x}))
    tokens = seen["mlp.gate"].flatten(0, 1)
    assert THREE.quantize is not None
    errors = {}
    for step in range(21):
        scales = awq.scales_for(inputs.mean_abs, step / 20)
        rounded = [quantize([weight * scales], [None], [THREE.quantize])[0].dense() / scales for weight in matrices]
        pairs = zip(rounded, matrices, strict=True)
        errors[step] = sum(float((tokens @ (one - other).T).double().square().sum()) for one, other in pairs)
    best = min(errors, key=errors.__getitem__)
    assert 0 < best < 20
    found = awq.search(matrices, inputs, THREE.quantize)
    expected = inputs.mean_abs ** (best / 20)  # a common factor changes nothing
    torch.testing.assert_close(found / found[0], expected / expected[0], rtol=1e-4, atol=0.0)
    assert awq.output_error(matrices, inputs.hessian, found, THREE.quantize) == pytest.approx(errors[best], rel=1e-2)


def test_awq_does_no_harm_to_even_channels_and_survives_dead_ones() -> None:
    assert torch.equal(awq.scales_for(torch.zeros(4), 0.5), torch.ones(4))
    scales = awq.scales_for(torch.tensor([0.0, 1.0, 4.0, 3.0]), 0.5)
    assert scales.tolist() == pytest.approx([1e-2, 0.5**0.5, 2**0.5, 1.5**0.5])
    made_layer = layers.layer(made.LLAMA)
    for recipe, reader in ((THREE, "attention.q"), (THREE, "mlp.down"), (FOUR, "mlp.up")):
        assert recipe.quantize is not None
        matrices, known = [made_layer.weights[f"{reader}.weight"]], made_layer.statistics.inputs[reader]
        plain_error = awq.output_error(matrices, known.hessian, torch.ones_like(known.mean_abs), recipe.quantize)
        found = awq.search(matrices, known, recipe.quantize)
        assert awq.output_error(matrices, known.hessian, found, recipe.quantize) <= plain_error


def test_widths_found_later_are_searched_near_their_average() -> None:
    made_layer = layers.layer(made.LLAMA)
    for open_width, bits in (({"average_bits": 3.2}, 3), ({"target_bytes": 1000}, 4)):
        recipe = Recipe(quantize=Quantization(method="awq", **open_width))
        fixed = Recipe(quantize=Quantization(method="awq", bits=bits))
        one, _ = awq.rescale(made.LLAMA, made_layer.weights, made_layer.statistics, recipe)
        other, _ = awq.rescale(made.LLAMA, made_layer.weights, made_layer.statistics, fixed)
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_smoothquant_s_scales_are_those_of_the_paper() -> None:
    weights = [torch.tensor([[1.0, -4.0, 0.0, 2.0]]), torch.tensor([[-9.0, 1.0, 0.0, 0.5]])]
    scales = smoothquant.scales_for(weights, torch.tensor([4.0, 16.0, 5.0, 0.0]))
    assert scales.tolist() == pytest.approx([2 / 3, 4 / 2, 1.0, 1.0])
    uneven = smoothquant.scales_for(weights, torch.tensor([4.0, 16.0, 5.0, 0.0]), alpha=0.75)
    assert uneven.tolist() == pytest.approx([4**0.75 / 9**0.25, 16**0.75 / 4**0.25, 1.0, 1.0])


def test_smoothing_evens_out_both_ranges() -> None:
    made_layer = layers.layer(made.GPT2)
    weights, statistics = smoothquant.rescale(made.GPT2, made_layer.weights, made_layer.statistics, EIGHT)
    columns = torch.stack([weights[f"attention.{name}.weight"].abs().amax(0) for name in "qkv"]).amax(0)
    torch.testing.assert_close(statistics.inputs["attention.q"].absmax, columns, rtol=1e-4, atol=1e-5)


def test_the_grid_solves_rescaled_layers() -> None:
    """Codes are those of the rescaled weights, and the layer's output is nearer than without."""
    config, made_layer = made.LLAMA_UNTIED, layers.layer(made.LLAMA_UNTIED)
    plain_recipe = Recipe(quantize=Quantization(method="rtn", bits=3))
    results = solve_layer(config, made_layer.weights, [Recipe(), plain_recipe, THREE], made_layer.statistics)
    rescaled, _ = awq.rescale(config, made_layer.weights, made_layer.statistics, THREE)
    dense = results[2].dense()
    assert torch.equal(dense["mlp.up.weight"], round_to_nearest(rescaled["mlp.up.weight"], 3).dense())
    torch.testing.assert_close(dense["mlp.norm.weight"], rescaled["mlp.norm.weight"].bfloat16().float())

    def error(weights: dict[str, torch.Tensor]) -> float:
        return float((plain.layer(config, weights, made_layer.hidden) - made_layer.output).square().sum())

    assert error(dense) < error(results[1].dense())
