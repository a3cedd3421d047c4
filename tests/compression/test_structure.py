"""Removing heads, neurons and layers: which go, what is left, and how well it stands in for the whole."""

from dataclasses import replace

import pytest
import torch

from compression.checks import check_recipes
from compression.methods.base import LayerStatistics
from compression.recipe import Quantization, Recipe, Structure
from compression.reduced import kept_layers, kept_units, reduced_config, removed_layers
from compression.structure import contributions, expand, reduced_layer, refit, strongest
from parallelism.models.base import Units
from parallelism.models.gpt import anatomy, plain
from parallelism.models.gpt.config import GPTConfig
from tests.compression import layers, made

NAMES = sorted(made.CONFIGS)
GROUPED = made.LLAMA.model_copy(update={"heads": 8, "kv_heads": 4, "head_dim": 6})


def _units(config: GPTConfig, kind: str) -> Units:
    return next(units for units in anatomy.units(config) if units.kind == kind)


@pytest.mark.parametrize(
    ("count", "fraction", "kept"), [(704, 0.5, 352), (64, 0.3, 48), (64, 0.99, 8), (65, 0.5, 32), (12, 0.9, 1)]
)
def test_widths_stay_multiples_of_eight_where_they_were(count: int, fraction: float, kept: int) -> None:
    units = Units("neurons", count, {"mlp.up": 1}, "mlp.down", 1)
    assert kept_units(units, Structure(neurons=fraction)) == kept
    heads = Units("heads", count, {}, "attention.o", 4)
    assert kept_units(heads, Structure(neurons=fraction)) == count
    assert kept_units(heads, Structure(heads=fraction)) == max(1, round(count * (1 - fraction)))


@pytest.mark.parametrize("config", [*made.CONFIGS.values(), GROUPED], ids=[*made.CONFIGS, "grouped"])
def test_the_smaller_config_has_the_shapes_of_the_smaller_layer(config: GPTConfig) -> None:
    made_layer, structure = layers.layer(config), Structure(heads=0.5, neurons=0.5, layers=0.3)
    smaller = reduced_config(config, structure)
    assert isinstance(smaller, GPTConfig)
    weights, statistics = reduced_layer(config, made_layer.weights, made_layer.statistics, structure)
    assert {name: tuple(value.shape) for name, value in weights.items()} == smaller.layer_shapes()
    assert smaller.query_groups == max(1, config.query_groups // 2)
    assert smaller.heads // smaller.query_groups == config.heads // config.query_groups
    assert (smaller.head_dim, smaller.ffn_hidden, smaller.layers) == (config.channels, config.feed_forward // 2, 2)
    assert smaller.parameter_count() < config.parameter_count()
    for name, (_, columns) in smaller.linear_shapes().items():
        known = statistics.inputs[name]
        assert tuple(known.hessian.shape) == (columns, columns)
        assert known.absmax.shape == known.mean_abs.shape == (columns,)
    assert statistics.inputs["attention.q"] is made_layer.statistics.inputs["attention.q"]
    assert statistics.influence == made_layer.statistics.influence


def test_no_structure_changes_nothing() -> None:
    assert reduced_config(made.LLAMA, None) is made.LLAMA
    assert reduced_config(made.LLAMA, Structure(layers=0.4)) == made.LLAMA.model_copy(update={"layers": 2})
    made_layer = layers.layer(made.LLAMA)
    weights, statistics = reduced_layer(made.LLAMA, made_layer.weights, made_layer.statistics, Structure(layers=0.4))
    assert all(torch.equal(value, made_layer.weights[name]) for name, value in weights.items())
    assert statistics == made_layer.statistics


def test_a_family_without_description_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from parallelism.registry import FAMILIES

    monkeypatch.setitem(FAMILIES, "gpt", replace(FAMILIES["gpt"], anatomy=None))
    with pytest.raises(ValueError, match="family gpt have no parts that can be removed"):
        reduced_config(made.LLAMA, Structure(heads=0.5))
    with pytest.raises(ValueError, match="leave structure, awq and smoothquant out"):
        check_recipes(made.LLAMA, [Recipe(quantize=Quantization(method="awq", bits=4))])


def test_groups_have_to_divide_what_is_left() -> None:
    quantize = Quantization(method="rtn", bits=4, group_size=16)
    check_recipes(made.LLAMA, [Recipe(structure=Structure(neurons=0.5), quantize=quantize)])
    with pytest.raises(ValueError, match=r"the 40 columns of layers\.0\.mlp\.down\.weight after neurons-s40"):
        check_recipes(made.LLAMA, [Recipe(structure=Structure(neurons=0.4), quantize=quantize)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_contribution_is_the_energy_that_a_unit_adds(name: str, kind: str) -> None:
    config = made.CONFIGS[name]
    made_layer, units = layers.layer(config), _units(config, kind)
    seen: dict[str, torch.Tensor] = {}
    plain.layer(config, made_layer.weights, made_layer.hidden, lambda linear, x: seen.update({linear: x}))
    inputs, weight = seen[units.reader].flatten(0, 1).double(), made_layer.weights[f"{units.reader}.weight"].double()
    expected = [
        float((inputs[:, part] @ weight[:, part].T).square().sum())
        for part in (slice(u * units.width, (u + 1) * units.width) for u in range(units.count))
    ]
    found = contributions(weight.float(), made_layer.statistics.inputs[units.reader].hessian, units.width)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0.0)


def test_the_strongest_stay_in_their_order() -> None:
    assert strongest(torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert expand(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.mark.parametrize("config", [made.GPT2, made.LLAMA_UNTIED, GROUPED], ids=["gpt2", "llama", "grouped"])
def test_what_contributes_nothing_is_removed_without_a_trace(config: GPTConfig) -> None:
    """Half the heads and neurons are not read by anything: the smaller layer computes the same."""
    weights = layers.weights_of(config)
    for units in anatomy.units(config):
        columns = expand(torch.arange(0, units.count, 2), units.width)
        weights[f"{units.reader}.weight"][:, columns] = 0.0
    made_layer, structure = layers.layer(config, weights), Structure(heads=0.5, neurons=0.5)
    smaller, _ = reduced_layer(config, weights, made_layer.statistics, structure)
    output = plain.layer(reduced_config(config, structure), smaller, made_layer.hidden)
    torch.testing.assert_close(output, made_layer.output, rtol=1e-5, atol=1e-5)
    heads = _units(config, "heads")
    rows = expand(torch.arange(1, heads.count, 2), heads.makers["attention.q"])
    assert torch.equal(smaller["attention.q.weight"], weights["attention.q.weight"][rows])
    assert torch.equal(smaller["mlp.up.weight"], weights["mlp.up.weight"][1::2])


def _random_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(5, 12, generator=generator, dtype=torch.float64), inputs, torch.tensor([0, 3, 4, 7, 8, 11])


def test_the_refit_is_the_damped_least_squares_solution() -> None:
    weight, inputs, kept = _random_problem()
    hessian, damping = inputs.T @ inputs, 0.05
    extra = (damping * hessian.diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    rows = torch.cat([inputs, extra])  # damping is a row of its own for every column
    expected = torch.linalg.lstsq(rows[:, kept], rows @ weight.T).solution.T
    torch.testing.assert_close(refit(weight, hessian, kept, damping), expected)


def test_the_refit_is_the_update_of_optimal_brain_compression() -> None:
    weight, inputs, kept = _random_problem()
    hessian = inputs.T @ inputs
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64))
    gone = torch.tensor([1, 2, 5, 6, 9, 10])
    updated = weight - weight[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ inverse[gone]
    assert updated[:, gone].abs().max() < 1e-9
    torch.testing.assert_close(refit(weight, hessian, kept, 0.01), updated[:, kept])


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_refitted_columns_stand_in_for_the_removed_ones(name: str) -> None:
    config = made.CONFIGS[name]
    made_layer, structure = layers.layer(config, rows=60), Structure(neurons=0.5)
    smaller, _ = reduced_layer(config, made_layer.weights, made_layer.statistics, structure)
    width = smaller["mlp.down.weight"].shape[1]
    kept = strongest(
        contributions(made_layer.weights["mlp.down.weight"], made_layer.statistics.inputs["mlp.down"].hessian, 1), width
    )
    cut = smaller | {"mlp.down.weight": made_layer.weights["mlp.down.weight"][:, kept]}

    def error(weights: dict[str, torch.Tensor]) -> float:
        output = plain.layer(reduced_config(config, structure), weights, made_layer.hidden)
        return float((output - made_layer.output).square().sum())

    assert error(smaller) < 0.95 * error(cut)


def test_statistics_that_cannot_be_inverted_are_named() -> None:
    made_layer = layers.layer(made.LLAMA)
    known = made_layer.statistics.inputs["mlp.down"]
    empty = replace(known, hessian=torch.zeros_like(known.hessian))
    broken = LayerStatistics({**made_layer.statistics.inputs, "mlp.down": empty}, 0.1)
    with pytest.raises(ValueError, match=r"mlp\.down: its inputs' H is singular"):
        reduced_layer(made.LLAMA, made_layer.weights, broken, Structure(neurons=0.5))


def test_the_layers_that_change_least_go() -> None:
    influences = [0.5, 0.1, 0.3, 0.1, 0.2, 0.9]
    assert removed_layers(influences, None) == ()
    assert removed_layers(influences, Structure(heads=0.5)) == ()
    assert removed_layers(influences, Structure(layers=0.2)) == (1,)
    assert removed_layers(influences, Structure(layers=0.5)) == (1, 3, 4)
    assert removed_layers(influences, Structure(layers=0.99)) == (0, 1, 2, 3, 4)
    assert kept_layers(6, Structure(layers=0.99)) == 1
