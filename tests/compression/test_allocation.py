"""Strengths by matrix: the global threshold is exact, totals are met, and the sensitive are spared."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from compression.allocation import Allotment, allocate, bins_to_refine, spread_zeros, strengths_of
from compression.checks import check_recipes
from compression.measures import SPARSITIES, WIDTHS, LayerCounts, LayerMeasures, MatrixMeasures
from compression.recipe import Pruning, Quantization, Recipe, Structure
from compression.sensitivity import count_layer, measure_layer
from compression.solve import Solved, solve_layer
from parallelism.models.gpt.config import GPTConfig
from tests.compression import layers, made

CONFIG = made.LLAMA.model_copy(update={"layers": 4})


def _layers(config: GPTConfig) -> list[layers.MadeLayer]:
    """Layers of different scale; in every other one a few weights are much larger than the rest."""
    found = []
    for index in range(config.layers):
        weights = {
            name: value * (1.0 + 0.4 * index + 20.0 * (index % 2) * value.square()) if value.ndim == 2 else value
            for name, value in layers.weights_of(config, seed=index).items()
        }
        found.append(layers.layer(config, weights, seed=index))
    return found


LAYERS = _layers(CONFIG)


def _allot(recipes: Sequence[Recipe], made_layers: Sequence[layers.MadeLayer] = LAYERS) -> Allotment:
    """Both passes, through JSON as between processes."""
    config = made_layers[0].config
    measures = [
        LayerMeasures.model_validate_json(
            measure_layer(config, index, one.weights, one.statistics, recipes).model_dump_json()
        )
        for index, one in enumerate(made_layers)
    ]
    bins = bins_to_refine(recipes, measures)
    counts = [
        LayerCounts.model_validate_json(
            count_layer(config, index, one.weights, one.statistics, recipes, bins).model_dump_json()
        )
        for index, one in enumerate(made_layers)
    ]
    return allocate(config, recipes, measures, counts if bins else ())


def _solve(recipe: Recipe, allotment: Allotment, made_layers: Sequence[layers.MadeLayer] = LAYERS) -> list[Solved]:
    return [
        solve_layer(one.config, one.weights, [recipe], one.statistics, strengths_of(allotment.allocations, index))[0]
        for index, one in enumerate(made_layers)
    ]


def _weights(recipe: Recipe, **prune: object) -> Recipe:
    assert recipe.prune is not None
    return recipe.model_copy(update={"prune": recipe.prune.model_copy(update=prune)})


GLOBAL = Recipe(prune=Pruning(method="magnitude", sparsity=0.5, scope="global"))
BY_LAYER = Recipe(prune=Pruning(method="magnitude", sparsity=0.6, allocation="sensitivity"))


@pytest.mark.parametrize("sparsity", [0.001, 0.3, 0.5, 0.777, 0.97])
def test_the_global_mask_is_that_of_a_sort_over_everything(sparsity: float) -> None:
    recipe = _weights(GLOBAL, sparsity=sparsity)
    solved = _solve(recipe, _allot([recipe]))
    names = [name for name, value in LAYERS[0].weights.items() if value.ndim == 2]
    every = torch.cat([one.weights[name].abs().flatten() for one in LAYERS for name in names])
    zeros = round(sparsity * every.numel())
    threshold = every.sort().values[zeros - 1]
    masks = torch.cat([(one.dense()[name] != 0).flatten() for one in solved for name in names])
    assert int((~masks).sum()) == zeros
    assert torch.equal(masks, every > threshold)  # random weights have no ties


def test_equal_magnitudes_are_shared_out_in_order() -> None:
    config = CONFIG.model_copy(update={"layers": 2})
    tied = []
    for index in range(2):
        weights = {
            name: torch.where(value > 0, 0.5, -0.25) if value.ndim == 2 else value
            for name, value in layers.weights_of(config, seed=index).items()
        }
        tied.append(layers.layer(config, weights, seed=index))
    recipe = _weights(GLOBAL, sparsity=0.3)
    solved = _solve(recipe, _allot([recipe], tied), tied)
    facts = [one.facts for one in solved]
    assert sum(fact.pruned for fact in facts) == round(0.3 * sum(fact.weights for fact in facts))
    dropped = torch.cat(
        [
            (one.weights[name] - two.dense()[name]).flatten()
            for one, two in zip(tied, solved, strict=True)
            for name in one.weights
            if one.weights[name].ndim == 2
        ]
    )
    assert sorted(set(dropped.tolist())) == [-0.25, 0.0]
    assert facts[0].pruned > facts[1].pruned > 0


def test_several_global_sparsities_share_the_passes() -> None:
    recipes = [_weights(GLOBAL, sparsity=sparsity) for sparsity in (0.2, 0.5, 0.9)]
    together = _allot(recipes)
    for recipe in recipes:
        assert together.allocations[recipe.name] == _allot([recipe]).allocations[recipe.name]


def test_a_matrix_may_go_whole() -> None:
    tiny = [
        layers.layer(CONFIG, one.weights | {"attention.k.weight": one.weights["attention.k.weight"] * 1e-6})
        for one in LAYERS
    ]
    allotment = _allot([GLOBAL], tiny)
    strength = allotment.allocations[GLOBAL.name]["layers.0.attention.k"]
    assert 1 - 1 / (16 * 48) < (strength.sparsity or 0) < 1
    quantized = GLOBAL.model_copy(update={"quantize": Quantization(method="rtn", bits=4)})
    allotment = allotment.model_copy(update={"allocations": {quantized.name: allotment.allocations[GLOBAL.name]}})
    for one in _solve(quantized, allotment, tiny):
        assert not one.dense()["attention.k.weight"].any()
        assert one.dense()["attention.v.weight"].any()


@pytest.mark.parametrize("sparsity", [0.1, 0.6, 0.9])
def test_zeros_by_sensitivity_meet_the_total_to_the_last_weight(sparsity: float) -> None:
    recipe = _weights(BY_LAYER, sparsity=sparsity)
    allotment = _allot([recipe])
    row = allotment.allocations[recipe.name]
    assert set(row) == {f"layers.{index}.{name}" for index in range(4) for name in CONFIG.linear_shapes()}
    assert all(strength.sparsity is not None and 0 <= strength.sparsity <= 0.95 for strength in row.values())
    facts = [one.facts for one in _solve(recipe, allotment)]
    assert sum(fact.pruned for fact in facts) == round(sparsity * sum(fact.weights for fact in facts))


def test_zeros_by_sensitivity_hurt_less_than_uniform_ones() -> None:
    measures = [measure_layer(CONFIG, i, one.weights, one.statistics, [BY_LAYER]) for i, one in enumerate(LAYERS)]
    matrices = {f"{i}.{name}": row for i, one in enumerate(measures) for name, row in one.matrices[""].items()}
    uniform = sum(row.pruned[60] for row in matrices.values())

    def error(name: str, count: int) -> float:
        row = matrices[name]
        place = count / row.weights * 100
        low = min(int(place), 94)
        return row.pruned[low] + (place - low) * (row.pruned[low + 1] - row.pruned[low])

    found = sum(error(name, count) for name, count in spread_zeros(matrices, 0.6).items())
    assert found < uniform
    # Equal slopes: moving a hundred weights from any matrix to any other makes it no better.
    counts = spread_zeros(matrices, 0.6)
    for more in matrices:
        for less in matrices:
            moved = counts | {more: counts[more] + 100, less: counts[less] - 100}
            if more != less and moved[less] >= 0 and moved[more] <= 0.95 * matrices[more].weights:
                assert sum(error(name, count) for name, count in moved.items()) >= found - 1e-9


def test_more_sparsity_takes_more_of_every_matrix() -> None:
    recipes = [_weights(BY_LAYER, sparsity=sparsity) for sparsity in (0.3, 0.5, 0.7)]
    rows = [_allot(recipes).allocations[recipe.name] for recipe in recipes]
    for less, more in pairwise(rows):
        assert all((more[name].sparsity or 0) >= (strength.sparsity or 0) for name, strength in less.items())


def test_more_zeros_than_matrices_may_lose_are_refused() -> None:
    errors = tuple(sparsity**2 for sparsity in SPARSITIES)
    with pytest.raises(ValueError, match=r"prune\.sparsity 0\.97 is more than 0\.95"):
        spread_zeros({"a": MatrixMeasures(weights=1000, pruned=errors)}, 0.97)


def _mixed(**width: object) -> Recipe:
    return Recipe(quantize=Quantization.model_validate({"method": "rtn", "group_size": 16, **width}))


def _average(allotment: Allotment, recipe: Recipe) -> float:
    row, shapes = allotment.allocations[recipe.name], CONFIG.linear_shapes()
    size = {name: math.prod(shapes[name.split(".", 2)[2]]) for name in row}
    return sum((strength.bits or 0) * size[name] for name, strength in row.items()) / sum(size.values())


def test_average_bits_are_met_from_below_and_the_sensitive_get_more() -> None:
    recipes = [_mixed(average_bits=bits) for bits in (2.0, 3.0, 3.5, 5.0, 8.0)]
    allotment = _allot(recipes)
    averages = [_average(allotment, recipe) for recipe in recipes]
    for average, recipe in zip(averages, recipes, strict=True):
        assert recipe.quantize is not None
        assert recipe.quantize.average_bits is not None
        assert recipe.quantize.average_bits - 0.3 < average <= recipe.quantize.average_bits
    assert averages[0] == 2.0
    assert averages[-1] == 8.0
    uniform = _solve(_mixed(bits=3), Allotment(allocations={}))
    mixed = _solve(recipes[1], allotment)

    def errors(solved: Sequence[Solved]) -> float:
        total = 0.0
        for one, layer in zip(solved, LAYERS, strict=True):
            for name, known in layer.statistics.inputs.items():
                weight = layer.weights[f"{name}.weight"].double()
                delta, hessian = one.dense()[f"{name}.weight"].double() - weight, known.hessian.double()
                total += float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum())
        return total

    assert errors(mixed) < errors(uniform)


def test_layers_that_change_little_go_and_what_is_left_shares_the_total() -> None:
    measures = []
    recipe = Recipe(structure=Structure(layers=0.5), prune=BY_LAYER.prune, quantize=_mixed(average_bits=3.0).quantize)
    for index, one in enumerate(LAYERS):
        found = measure_layer(CONFIG, index, one.weights, one.statistics, [recipe])
        measures.append(found.model_copy(update={"influence": (0.4, 0.1, 0.3, 0.2)[index]}))
    plain_recipe = Recipe(structure=Structure(layers=0.5))
    allotment = allocate(CONFIG, [Recipe(), plain_recipe, recipe], measures)
    assert allotment.removed == {"layers-s50": (1, 3), recipe.name: (1, 3)}
    assert allotment.allocations["layers-s50"] == {}
    row = allotment.allocations[recipe.name]
    assert {name.split(".")[1] for name in row} == {"0", "2"}
    left = list(row.values())
    sizes = [rows * columns for rows, columns in CONFIG.linear_shapes().values()] * 2
    zeros = sum(round((strength.sparsity or 0) * size) for strength, size in zip(left, sizes, strict=True))
    assert zeros == round(0.6 * sum(sizes))
    assert sum((one.bits or 0) * size for one, size in zip(left, sizes, strict=True)) <= 3.0 * sum(sizes)
    assert Allotment.model_validate(json.loads(allotment.model_dump_json())) == allotment


def test_a_size_that_no_width_meets_is_refused() -> None:
    recipe = _mixed(target_bytes=20_000)
    with pytest.raises(ValueError, match=r"quantize\.target_bytes is too small by \d+ bytes even at 2 bits"):
        _allot([recipe])
    with pytest.raises(ValueError, match=r"target_bytes 20000 is less than \d+, the size at 2 bits everywhere"):
        check_recipes(CONFIG, [recipe])


def test_strengths_of_one_layer() -> None:
    allotment = _allot([BY_LAYER])
    rows = strengths_of(allotment.allocations, 1)
    assert set(rows[BY_LAYER.name]) == set(CONFIG.linear_shapes())
    assert rows[BY_LAYER.name]["mlp.up"] == allotment.allocations[BY_LAYER.name]["layers.1.mlp.up"]
    assert strengths_of(None, 0) == {}
    assert WIDTHS == (2, 3, 4, 6, 8)
