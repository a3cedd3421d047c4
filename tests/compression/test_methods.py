"""Pruning and quantisation against definitions written out."""

from pathlib import Path

import pytest
import torch

from compression.compact import CompactFile
from compression.config import PruneConfig, QuantizeConfig
from compression.levels import FP8_DTYPE, SCALE_DTYPE, Levels
from compression.methods.magnitude import prune
from compression.methods.rtn import quantize, round_to_levels, round_to_nearest
from compression.recipe import Pruning, Quantization, Recipe
from compression.registry import PRUNING, QUANTIZATION
from compression.solve import solve_matrix, solve_outer
from parallelism.registry import load
from tests.compression.literal import e4m3_numbers

WEIGHT = torch.randn(33, 48, generator=torch.Generator().manual_seed(0)) * 0.05


def _pruning(sparsity: float) -> Pruning:
    return Pruning(method="magnitude", sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.5, 0.9, 0.9999])
def test_the_smallest_weights_go_and_exactly_as_many_as_asked(sparsity: float) -> None:
    (result,) = prune(WEIGHT, [_pruning(sparsity)])
    count = round(sparsity * WEIGHT.numel())
    smallest = sorted(range(WEIGHT.numel()), key=lambda place: (abs(float(WEIGHT.flatten()[place])), place))[:count]
    expected = torch.ones(WEIGHT.numel(), dtype=torch.bool)
    expected[smallest] = False
    assert torch.equal(result.mask, expected.view_as(WEIGHT))
    assert torch.equal(result.weight, WEIGHT * expected.view_as(WEIGHT))


def test_of_equal_weights_the_first_go() -> None:
    weight = torch.tensor([[2.0, -1.0, 1.0], [1.0, -1.0, 0.0]])
    masks = [result.mask.int().tolist() for result in prune(weight, [_pruning(s / 6) for s in (1, 2, 3, 5)])]
    assert masks == [[[1, 1, 1], [1, 1, 0]], [[1, 0, 1], [1, 1, 0]], [[1, 0, 0], [1, 1, 0]], [[1, 0, 0], [0, 0, 0]]]


def test_a_sparsity_that_rounds_to_no_weight_keeps_all() -> None:
    (result,) = prune(WEIGHT[:1, :4], [_pruning(0.1)])
    assert result.mask.all()


@pytest.mark.parametrize("sparsity", [0.1, 0.333, 0.5, 0.9])
def test_with_scope_row_every_row_loses_as_much(sparsity: float) -> None:
    (result,) = prune(WEIGHT, [Pruning(method="magnitude", sparsity=sparsity, scope="row")])
    count = round(sparsity * 48)
    for row, mask in zip(WEIGHT.tolist(), result.mask, strict=True):
        smallest = sorted(range(48), key=lambda place, row=row: abs(row[place]))[:count]
        assert sorted(smallest) == (~mask).nonzero().flatten().tolist()


def test_a_row_of_equal_weights_loses_the_first() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    (result,) = prune(weight, [Pruning(method="magnitude", sparsity=0.5, scope="row")])
    assert result.mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:6", "4:8", "16:24"])
def test_a_pattern_keeps_the_largest_of_neighbours(pattern: str) -> None:
    kept, width = map(int, pattern.split(":"))
    (result,) = prune(WEIGHT, [Pruning(method="magnitude", sparsity=1 - kept / width, pattern=pattern)])
    groups, masks = WEIGHT.abs().view(-1, width), result.mask.view(-1, width)
    assert (masks.sum(1) == kept).all()
    largest = groups.sort(1).values[:, width - kept :]
    assert torch.equal((groups * masks).sort(1).values[:, width - kept :], largest)
    ties = prune(torch.ones(1, width), [Pruning(method="magnitude", sparsity=1 - kept / width, pattern=pattern)])
    assert ties[0].mask.int().tolist() == [[0] * (width - kept) + [1] * kept]


def test_recipes_solved_together_are_bit_identical_to_recipes_alone() -> None:
    sparsities = [0.2, 0.5, 0.8]
    together = prune(WEIGHT, [_pruning(sparsity) for sparsity in sparsities])
    for sparsity, result in zip(sparsities, together, strict=True):
        (alone,) = prune(WEIGHT, [_pruning(sparsity)])
        assert torch.equal(alone.mask, result.mask)
        assert torch.equal(alone.weight, result.weight)


def _nearest(weight: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Distance of every weight [n] to the nearest of the levels [m]."""
    return (weight[:, None].double() - levels[None].double()).abs().amin(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_every_weight_goes_to_the_nearest_level_of_its_group(bits: int, group: int | None, symmetric: bool) -> None:
    weight = WEIGHT + 0.02  # not centred, so that the two kinds differ
    result = round_to_nearest(weight, bits, group, symmetric)
    assert result.scales.dtype == SCALE_DTYPE
    assert result.scales.shape == (33, 48 // (group or 48))
    assert (result.zeros is None) == symmetric
    dense, size = result.dense(), group or 48
    for row in range(33):
        for place in range(48 // size):
            columns = slice(place * size, (place + 1) * size)
            scale = result.scales[row, place].double()
            zero = 2 ** (bits - 1) if result.zeros is None else int(result.zeros[row, place])
            levels = (torch.arange(2**bits) - zero) * scale
            error = (dense[row, columns].double() - weight[row, columns].double()).abs()
            torch.testing.assert_close(error, _nearest(weight[row, columns], levels), rtol=0, atol=1e-7)
            # Half a step, as the levels span the group; another half where the zero was rounded; the scale's rounding.
            assert float(error.max()) <= float(scale) * ((0.5 if symmetric else 1.0) + 2 ** (bits - 11))


def test_levels_span_exactly_what_the_group_holds() -> None:
    weight = torch.tensor([[-0.75, 0.25, 1.5, 0.0]])
    symmetric = round_to_nearest(weight, 3)
    assert float(symmetric.scales) == pytest.approx(2 * 1.5 / 7, rel=1e-3)
    asymmetric = round_to_nearest(weight, 3, symmetric=False)
    assert float(asymmetric.scales) == pytest.approx(2.25 / 7, rel=1e-3)
    assert asymmetric.zeros is not None
    assert asymmetric.zeros.tolist() == [[2]]
    assert asymmetric.codes.tolist() == [[0, 3, 7, 2]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_tiny_or_huge_weights_stay_finite(symmetric: bool) -> None:
    for weight in (torch.zeros(2, 8), torch.full((2, 8), 1e-12), torch.full((2, 8), 1e9), -torch.full((2, 8), 0.3)):
        dense = round_to_nearest(weight, 4, symmetric=symmetric).dense()
        assert dense.isfinite().all()
        assert (dense.sign() * weight.sign() >= 0).all()
    assert (round_to_nearest(torch.zeros(2, 8), 4, symmetric=symmetric).dense() == 0).all()


def test_more_bits_and_smaller_groups_come_nearer() -> None:
    def error(bits: int, group: int | None, symmetric: bool = True) -> float:
        return float((round_to_nearest(WEIGHT, bits, group, symmetric).dense() - WEIGHT).square().sum())

    assert error(8, None) < error(6, None) / 4 < error(4, None) / 16 < error(3, None) / 16
    assert error(4, 16) < error(4, None)
    shifted = WEIGHT.abs()
    assert float((round_to_nearest(shifted, 4, 16, False).dense() - shifted).square().sum()) < float(
        (round_to_nearest(shifted, 4, 16, True).dense() - shifted).square().sum()
    )


@pytest.mark.parametrize("group", [None, 16])
def test_fp8_goes_to_the_nearest_number(group: int | None) -> None:
    result = round_to_levels(WEIGHT, Levels(8, number="fp8"), group)
    assert result.zeros is None
    numbers = torch.tensor(e4m3_numbers())
    assert len(numbers) == 254  # both zeros among them
    size = group or 48
    for row in range(33):
        for place in range(48 // size):
            columns = slice(place * size, (place + 1) * size)
            scale = float(result.scales[row, place])
            assert scale == pytest.approx(float(WEIGHT[row, columns].abs().max()) / 448, rel=1e-2)
            error = (result.dense()[row, columns].double() - WEIGHT[row, columns].double()).abs()
            torch.testing.assert_close(error, _nearest(WEIGHT[row, columns], numbers * scale), rtol=0, atol=1e-7)


def test_fp8_zero_has_no_sign_and_the_largest_number_is_kept() -> None:
    result = round_to_levels(torch.tensor([[-0.0, 0.0, -1e-9, 896.0, -896.0]]), Levels(8, number="fp8"))
    assert result.codes[0, :3].tolist() == [0, 0, 0]
    assert result.codes.view(FP8_DTYPE).float()[0, 3:].tolist() == [448.0, -448.0]


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_embeddings_take_the_bits_asked_for(bits: int, tmp_path: Path) -> None:
    solve_outer({"embedding.tokens": WEIGHT}, bits).write(tmp_path / "outer.safetensors")
    file = CompactFile(tmp_path / "outer.safetensors")
    assert file.file.specs["embedding.tokens:values"].bytes == WEIGHT.numel() * bits // 8
    expected = WEIGHT.bfloat16().float() if bits == 16 else round_to_nearest(WEIGHT, bits).dense()
    assert torch.equal(file.tensor("embedding.tokens"), expected)


def test_every_method_of_the_tables_is_there() -> None:
    for entry in (*PRUNING.values(), *QUANTIZATION.values()):
        assert callable(load(entry.implementation))
    PruneConfig.model_validate({"methods": ["magnitude", "wanda", "sparsegpt"], "patterns": ["2:4"]})
    QuantizeConfig.model_validate({"methods": ["rtn", "gptq"], "bits": [8, 6, 4, 3, 2], "act_order": True})


def test_the_grid_keeps_masks_exactly_and_equals_recipes_alone() -> None:
    quantizations = [Quantization(method="rtn", bits=bits, group_size=16) for bits in (8, 3)]
    prunings = [None, _pruning(0.5), _pruning(0.8)]
    recipes = [Recipe(prune=one, quantize=two) for one in prunings for two in (None, *quantizations)]
    results = solve_matrix(WEIGHT, recipes)
    for recipe, result in zip(recipes, results, strict=True):
        (alone,) = solve_matrix(WEIGHT, [recipe])
        assert torch.equal(alone.dense(), result.dense()), recipe.name
        if recipe.prune is None:
            assert result.mask is None
            continue
        (expected,) = prune(WEIGHT, [recipe.prune])
        assert result.mask is not None
        assert torch.equal(result.mask, expected.mask)
        assert (result.dense()[~expected.mask] == 0.0).all()
        if recipe.quantize:
            (codes,) = quantize([expected.weight], [expected.mask], [recipe.quantize])
            assert torch.equal(result.dense(), codes.dense())
    assert torch.equal(results[0].dense(), WEIGHT.bfloat16().float())


def test_bits_of_one_are_refused() -> None:
    with pytest.raises(ValueError, match="bits"):
        QuantizeConfig.model_validate({"methods": ["rtn"], "bits": [1]})
