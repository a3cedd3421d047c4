"""What is measured of a layer, against definitions written out."""

import pytest
import torch

from compression.measures import SPARSITIES, WIDTHS, LayerCounts, LayerMeasures, pack_counts, unpack_counts
from compression.methods.rtn import round_to_nearest
from compression.recipe import Pruning, Quantization, Recipe, Structure
from compression.sensitivity import count_layer, measure_layer, pruning_errors, rounding_errors
from compression.structure import reduced_layer
from parallelism.models.gpt import plain
from tests.compression import layers, made

GLOBAL = Recipe(prune=Pruning(method="magnitude", sparsity=0.5, scope="global"))
BY_LAYER = Recipe(prune=Pruning(method="magnitude", sparsity=0.5, allocation="sensitivity"))
MIXED = Recipe(quantize=Quantization(method="rtn", average_bits=3.5, group_size=16))
SMALLER = Recipe(
    structure=Structure(neurons=0.5), quantize=Quantization(method="rtn", average_bits=3.5, symmetric=False)
)


def _inputs(made_layer: layers.MadeLayer, name: str) -> torch.Tensor:
    seen: dict[str, torch.Tensor] = {}
    plain.layer(made_layer.config, made_layer.weights, made_layer.hidden, lambda linear, x: seen.update({linear: x}))
    return seen[name].flatten(0, 1).double()


@pytest.mark.parametrize("name", ["attention.v", "mlp.down"])
def test_errors_of_rounding_are_those_of_the_outputs(name: str) -> None:
    made_layer = layers.layer(made.LLAMA)
    weight, tokens = made_layer.weights[f"{name}.weight"], _inputs(made_layer, name)
    quantization = Quantization(method="rtn", average_bits=4.0, group_size=16, symmetric=False)
    found = rounding_errors(weight, made_layer.statistics.inputs[name], quantization)
    outputs = tokens @ weight.double().T
    for bits, error in zip(WIDTHS, found, strict=True):
        delta = round_to_nearest(weight, bits, 16, False).dense().double() - weight.double()
        expected = (tokens @ delta.T).square().sum() / outputs.square().sum()
        assert error == pytest.approx(float(expected), rel=1e-3)
    assert list(found) == sorted(found, reverse=True)


def test_errors_of_pruning_are_sums_of_the_smallest_scores() -> None:
    made_layer = layers.layer(made.LLAMA)
    weight, statistics = made_layer.weights["mlp.up.weight"], made_layer.statistics.inputs["mlp.up"]
    tokens = _inputs(made_layer, "mlp.up")
    scores = (weight.double().abs() * tokens.norm(dim=0)).square().flatten().sort().values
    whole = (tokens @ weight.double().T).square().sum()
    found = pruning_errors(weight, statistics)
    for sparsity, error in zip(SPARSITIES, found, strict=True):
        expected = scores[: round(sparsity * weight.numel())].sum() / whole
        assert error == pytest.approx(float(expected), rel=1e-4, abs=1e-9)
    steps = torch.tensor(found).diff()
    assert found[0] == 0.0
    assert (steps.diff() > -1e-6).all()  # the curve is convex


def test_only_what_is_asked_for_is_measured() -> None:
    made_layer = layers.layer(made.LLAMA)

    def measure(*recipes: Recipe) -> LayerMeasures:
        return measure_layer(made.LLAMA, 3, made_layer.weights, made_layer.statistics, recipes)

    assert measure(Recipe(), Recipe(quantize=Quantization(method="rtn", bits=4))).matrices == {}
    only = measure(GLOBAL).matrices[""]["mlp.up"]
    assert (only.weights, only.pruned, only.rounded) == (64 * 48, (), {})
    everything = measure(GLOBAL, BY_LAYER, MIXED, SMALLER)
    assert everything.layer == 3
    assert everything.influence == pytest.approx(made_layer.statistics.influence)
    assert set(everything.matrices) == {"", "neurons-s50"}
    assert set(everything.magnitudes) == {""}
    up = everything.matrices[""]["mlp.up"]
    assert (len(up.pruned), list(up.rounded)) == (96, ["g16"])
    smaller = everything.matrices["neurons-s50"]["mlp.up"]
    assert (smaller.weights, smaller.pruned, list(smaller.rounded)) == (32 * 48, (), ["channel-asym"])
    weights, statistics = reduced_layer(made.LLAMA, made_layer.weights, made_layer.statistics, Structure(neurons=0.5))
    assert SMALLER.quantize is not None
    down = rounding_errors(weights["mlp.down.weight"], statistics.inputs["mlp.down"], SMALLER.quantize)
    assert everything.matrices["neurons-s50"]["mlp.down"].rounded["channel-asym"] == down
    again = LayerMeasures.model_validate_json(everything.model_dump_json())
    assert again == everything
    assert len(everything.model_dump_json()) < 40_000


def test_global_magnitudes_need_no_statistics() -> None:
    weights = layers.weights_of(made.LLAMA)
    measures = measure_layer(made.LLAMA, 0, weights, None, [GLOBAL])
    assert measures.influence is None
    every = torch.cat([weight.abs().flatten() for weight in weights.values() if weight.ndim == 2])
    counts = unpack_counts(measures.magnitudes[""])
    assert counts.sum() == every.numel()
    value = float(every[17])
    one = int(torch.tensor(value).view(torch.int32)) >> 16
    low, high = (torch.tensor(bits << 16, dtype=torch.int32).view(torch.float32) for bits in (one, one + 1))
    assert counts[one] == int(((every >= low) & (every < high)).sum()) > 0
    closer = count_layer(made.LLAMA, 0, weights, None, [GLOBAL], {"": [one]})
    row = closer.bins[""][one]["mlp.down"]
    down = weights["mlp.down.weight"].abs()
    assert row.below == int((down < low).sum())
    assert unpack_counts(row.inside).sum() == int(((down >= low) & (down < high)).sum())
    assert LayerCounts.model_validate_json(closer.model_dump_json()) == closer


def test_counts_survive_as_text() -> None:
    counts = torch.tensor([0, 5, 2**32 - 1, 0]).numpy()
    assert unpack_counts(pack_counts(counts)).tolist() == [0, 5, 2**32 - 1, 0]
