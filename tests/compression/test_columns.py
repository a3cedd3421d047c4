"""The column solver against the papers' algorithms written out, and a grid against its recipes one by one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compression.columns import BLOCK, ColumnJob, ColumnResult, solve_columns
from compression.errors import RecipeError
from compression.levels import FP8_DTYPE
from compression.methods.base import InputStatistics
from compression.methods.magnitude import prune as by_magnitude
from compression.methods.wanda import prune as by_wanda
from compression.recipe import Pruning, Quantization, Recipe
from compression.solve import solve_group, solve_matrix
from tests.compression import literal

GPTQ4 = Quantization(method="gptq", bits=4)
HALF = Pruning(method="sparsegpt", sparsity=0.5)
TWO_OF_FOUR = Pruning(method="sparsegpt", sparsity=0.5, pattern="2:4")


def _inputs(columns: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """X [tokens, in] float64: columns of unequal size that go together, as activations do."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    shared = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    common = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    sizes = torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    return (shared + 0.5 * common) * sizes


def _weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 99), dtype=torch.float64) * 0.05


def _statistics(inputs: Tensor, dtype: torch.dtype, damping: float = 0.01) -> InputStatistics:
    hessian, size = inputs.T @ inputs, inputs.abs()
    return InputStatistics(hessian.to(dtype), len(inputs), size.amax(0).to(dtype), size.mean(0).to(dtype), damping)


def _job(weight: Tensor, **parts: object) -> ColumnJob:
    return ColumnJob(**{"name": "mlp.up", "weight": weight, "mask": None, "prune": None, "quantize": None} | parts)


def _solve(job: ColumnJob, inputs: Tensor, block: int = BLOCK) -> ColumnResult:
    (result,) = solve_columns([job], _statistics(inputs, job.weight.dtype), block)
    return result


def _literal(job: ColumnJob, inputs: Tensor, block: int = BLOCK) -> literal.Solution:
    rounding = thinning = None
    recipe, prune = job.quantize, job.prune
    if recipe:
        assert recipe.bits
        rounding = literal.Rounding(recipe.bits, recipe.group_size, recipe.symmetric, recipe.number == "fp8")
    if prune:
        pattern = tuple(map(int, prune.pattern.split(":"))) if prune.pattern else None
        thinning = literal.Thinning(prune.sparsity, pattern)
    # The transcription takes the very numbers that the solver takes.
    hessian = _statistics(inputs, job.weight.dtype).hessian
    act_order = bool(recipe and recipe.act_order)
    return literal.solve(job.weight, hessian, rounding, thinning, job.mask, block=block, act_order=act_order)


def _codes(result: ColumnResult) -> Tensor:
    assert result.quantized is not None
    codes = result.quantized.codes
    return codes.view(FP8_DTYPE).double() if result.quantized.number == "fp8" else codes.double()


def _agree(job: ColumnJob, inputs: Tensor, block: int = BLOCK) -> None:
    result, expected = _solve(job, inputs, block), _literal(job, inputs, block)
    if job.prune or job.mask is not None:
        assert result.mask is not None
        assert torch.equal(result.mask, expected.mask)
        assert (result.weight[~result.mask] == 0.0).all()
    if job.quantize:
        assert torch.equal(_codes(result), expected.codes)
        assert result.quantized is not None
        for (row, group), scale in expected.scales.items():
            assert float(result.quantized.scales[row, group]) == scale
    assert float((result.weight.double() - expected.weight).abs().max()) < 1e-9


QUANTIZATIONS = {
    "4 bits": GPTQ4,
    "3 bits asymmetric": Quantization(method="gptq", bits=3, symmetric=False),
    "8 bits in groups": Quantization(method="gptq", bits=8, group_size=8),
    "2 bits in groups, asymmetric": Quantization(method="gptq", bits=2, group_size=24, symmetric=False),
    "4 bits in order": Quantization(method="gptq", bits=4, act_order=True),
    "3 bits in groups, in order": Quantization(method="gptq", bits=3, group_size=24, act_order=True, symmetric=False),
    "fp8": Quantization(method="gptq", bits=8, number="fp8", group_size=24),
}
PRUNINGS = {
    "half": HALF,
    "nine tenths": Pruning(method="sparsegpt", sparsity=0.9),
    "2:4": TWO_OF_FOUR,
    "1:3": Pruning(method="sparsegpt", sparsity=2 / 3, pattern="1:3"),
    "5:24": Pruning(method="sparsegpt", sparsity=19 / 24, pattern="5:24"),
}


@pytest.mark.parametrize("block", [128, 32, 20, 1])
@pytest.mark.parametrize("quantize", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_gptq_is_the_papers(quantize: Quantization, block: int) -> None:
    _agree(_job(_weight(5, 72), quantize=quantize), _inputs(72), block)


@pytest.mark.parametrize("block", [128, 32, 20, 1])
@pytest.mark.parametrize("prune", PRUNINGS.values(), ids=PRUNINGS)
def test_sparsegpt_is_the_papers(prune: Pruning, block: int) -> None:
    _agree(_job(_weight(6, 72, 1), prune=prune), _inputs(72, 1), block)


# Patterns are of neighbours, which act_order takes apart: refused, see below.
BOTH = {
    f"{one}, {two}": (prune, quantize)
    for one, prune in PRUNINGS.items()
    for two, quantize in QUANTIZATIONS.items()
    if not (prune.pattern and quantize.act_order)
}


@pytest.mark.parametrize("block", [128, 32, 20])
@pytest.mark.parametrize(("prune", "quantize"), BOTH.values(), ids=BOTH)
def test_pruning_and_rounding_in_one_solve_are_the_papers(prune: Pruning, quantize: Quantization, block: int) -> None:
    _agree(_job(_weight(5, 72, 2), prune=prune, quantize=quantize), _inputs(72, 2), block)


@pytest.mark.parametrize("quantize", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
def test_gptq_keeps_a_given_mask_and_makes_up_for_it(quantize: Quantization) -> None:
    weight, inputs = _weight(5, 72, 3), _inputs(72, 3)
    (pruned,) = by_wanda(weight, [HALF], _statistics(inputs, torch.float64))
    job = _job(pruned.weight, mask=pruned.mask, quantize=quantize)
    _agree(job, inputs, 32)
    result = _solve(job, inputs)
    assert result.mask is pruned.mask


@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (3, 130), (40, 16), (2, 256)])
@pytest.mark.parametrize("quantize", [GPTQ4, Quantization(method="gptq", bits=3, group_size=2)])
def test_all_shapes_are_solved_as_in_the_papers(rows: int, columns: int, quantize: Quantization) -> None:
    for prune in (None, HALF):
        _agree(_job(_weight(rows, columns, 4), prune=prune, quantize=quantize), _inputs(columns, 4, 600))


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    inputs = _inputs(48, 5)
    inputs[:, [3, 17, 40]] = 0.0
    for job in (_job(_weight(4, 48), quantize=GPTQ4), _job(_weight(4, 48), prune=HALF)):
        _agree(job, inputs, 16)
        assert (_solve(job, inputs).weight[:, [3, 17, 40]] == 0.0).all()


@pytest.mark.parametrize("prune", [HALF, TWO_OF_FOUR, Pruning(method="sparsegpt", sparsity=0.3)])
def test_of_equal_scores_the_first_go(prune: Pruning) -> None:
    alike = torch.ones(3, 32, dtype=torch.float64)
    alike[1, 5:9] = -2.0
    _agree(_job(alike, prune=prune), torch.eye(32, dtype=torch.float64), 16)


def test_wanda_is_the_papers() -> None:
    weight, inputs = _weight(7, 48, 6), _inputs(48, 6)
    for recipe, thinning in (
        (Pruning(method="wanda", sparsity=0.4), literal.Thinning(0.4)),
        (Pruning(method="wanda", sparsity=0.5, pattern="2:4"), literal.Thinning(pattern=(2, 4))),
        (Pruning(method="wanda", sparsity=0.5, pattern="3:6"), literal.Thinning(pattern=(3, 6))),
    ):
        (result,) = by_wanda(weight, [recipe], _statistics(inputs, torch.float64))
        assert torch.equal(result.mask, literal.wanda(weight, inputs, thinning))
        assert torch.equal(result.weight, weight * result.mask)


def _objective(change: Tensor, hessian: Tensor) -> float:
    """tr(ΔW H ΔWᵀ)."""
    change = change.double()
    return float(((change @ hessian.double()) * change).sum())


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("prune", [None, HALF, TWO_OF_FOUR], ids=["dense", "half", "2:4"])
def test_in_float32_almost_every_code_is_the_same(bits: int, group: int | None, prune: Pruning | None) -> None:
    weight, inputs = _weight(256, 192, 7).float(), _inputs(192, 7, 2000).float()
    job = _job(weight, prune=prune, quantize=Quantization(method="gptq", bits=bits, group_size=group))
    result = _solve(job, inputs)
    double = _statistics(inputs, torch.float32)
    exact = replace(double, hessian=double.hessian.double(), factors={})
    (expected,) = solve_columns([replace(job, weight=weight.double())], exact)
    differing = float((_codes(result) != _codes(expected)).double().mean())
    assert differing < 1e-3
    objectives = [_objective(one.weight - weight, double.hessian) for one in (result, expected)]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-3)


def _grid() -> list[dict[str, object]]:
    """Parts of jobs of every kind."""
    coarse = Quantization(method="gptq", bits=4, group_size=48)
    jobs: list[dict[str, object]] = [{"quantize": one} for one in (*QUANTIZATIONS.values(), coarse)]
    jobs += [{"prune": one} for one in PRUNINGS.values()]
    return jobs + [{"prune": prune, "quantize": quantize} for prune, quantize in BOTH.values()]


@pytest.mark.parametrize("columns", [144, 192])
def test_a_grid_is_solved_to_the_same_bits_as_each_recipe_alone(columns: int) -> None:
    inputs = _inputs(columns, 8).float()
    matrices = {"attention.q": _weight(37, columns, 8).float(), "attention.k": _weight(13, columns, 9).float()}
    jobs = []
    for name, weight in matrices.items():
        jobs += [_job(weight, name=name, **parts) for parts in _grid()]
        (pruned,) = by_magnitude(weight, [Pruning(method="magnitude", sparsity=0.5)])
        jobs += [_job(pruned.weight, name=name, mask=pruned.mask, quantize=one) for one in QUANTIZATIONS.values()]
    together = solve_columns(jobs, _statistics(inputs, torch.float32))
    for job, result in zip(jobs, together, strict=True):
        alone = _solve(job, inputs)
        assert torch.equal(result.weight, alone.weight)
        assert (result.mask is None) == (alone.mask is None)
        if result.mask is not None and alone.mask is not None:
            assert torch.equal(result.mask, alone.mask)
        if result.quantized and alone.quantized:
            assert torch.equal(result.quantized.codes, alone.quantized.codes)
            assert torch.equal(result.quantized.scales, alone.quantized.scales)


def test_many_rows_are_solved_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = _inputs(64, 10).float(), _weight(24, 64, 10).float()
    jobs = [_job(weight, quantize=Quantization(method="gptq", bits=bits)) for bits in (8, 6, 4, 3, 2)]
    whole = solve_columns(jobs, _statistics(inputs, torch.float32))
    monkeypatch.setattr("compression.columns.ROWS", 50)
    for one, other in zip(whole, solve_columns(jobs, _statistics(inputs, torch.float32)), strict=True):
        assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize("seed", range(5))
def test_the_published_order_holds(seed: int) -> None:
    weight, inputs = _weight(48, 96, seed).float(), _inputs(96, seed).float()
    known = _statistics(inputs, torch.float32)
    recipes = [Recipe(prune=Pruning(method=method, sparsity=0.5)) for method in ("sparsegpt", "wanda", "magnitude")] + [
        Recipe(quantize=Quantization(method=method, bits=bits)) for bits in (4, 3) for method in ("gptq", "rtn")
    ]
    worth = [_objective(result.dense() - weight, known.hessian) for result in solve_matrix(weight, recipes, known)]
    assert worth[0] < worth[1] < worth[2]
    assert worth[3] < worth[4]
    assert worth[5] < worth[6]


def test_the_masks_of_other_methods_survive_the_whole_way() -> None:
    weight, inputs = _weight(20, 64, 12).float(), _inputs(64, 12).float()
    known = _statistics(inputs, torch.float32)
    prunings = [
        Pruning(method=method, sparsity=0.5, pattern=pattern)
        for method in ("magnitude", "wanda")
        for pattern in (None, "2:4")
    ]
    recipes = [Recipe(prune=one, quantize=GPTQ4) for one in prunings]
    for recipe, result in zip(recipes, solve_matrix(weight, recipes, known), strict=True):
        assert recipe.prune is not None
        prune = by_magnitude if recipe.prune.method == "magnitude" else by_wanda
        (expected,) = prune(weight, [recipe.prune], known)
        assert result.mask is not None
        assert torch.equal(result.mask, expected.mask)
        assert (result.dense()[~result.mask] == 0.0).all()


def test_a_sparsegpt_mask_has_the_share_of_zeros_asked_for() -> None:
    weight, inputs = _weight(20, 160, 13).float(), _inputs(160, 13).float()
    result = _solve(_job(weight, prune=Pruning(method="sparsegpt", sparsity=0.3)), inputs)
    assert result.mask is not None
    assert int((~result.mask[:, :128]).sum()) == round(0.3 * 20 * 128)
    assert int((~result.mask[:, 128:]).sum()) == round(0.3 * 20 * 32)
    assert ((result.weight == 0.0) == ~result.mask).all()


def test_statistics_are_factorised_once_for_all_recipes_of_an_order() -> None:
    weight, known = _weight(8, 64).float(), _statistics(_inputs(64), torch.float32)
    recipes = [Recipe(quantize=one) for one in QUANTIZATIONS.values() if not one.group_size]
    solve_matrix(weight, [*recipes, Recipe(prune=HALF)], known)
    assert len(known.factors) == 2
    before = dict(known.factors)
    solve_matrix(weight, recipes, known)
    assert all(known.factors[key] is value for key, value in before.items())


def test_statistics_that_are_not_finite_are_refused() -> None:
    known = _statistics(_inputs(32), torch.float32)
    known.hessian[4, 5] = torch.nan
    with pytest.raises(ValueError, match=r"attention\.q, attention\.v: .*not finite"):
        solve_group(
            {"attention.q": _weight(4, 32).float(), "attention.v": _weight(4, 32).float()},
            [dict.fromkeys(("attention.q", "attention.v"), Recipe(quantize=GPTQ4))],
            known,
        )


def test_singular_statistics_are_damped() -> None:
    rank_one = torch.ones(3, 1, dtype=torch.float64) * _weight(1, 32)
    for damping in (0.01, 0.0):
        (result,) = solve_columns([_job(_weight(4, 32), quantize=GPTQ4)], _statistics(rank_one, torch.float64, damping))
        assert result.weight.isfinite().all()


def test_statistics_that_no_damping_helps_are_refused() -> None:
    known = _statistics(_inputs(32), torch.float32)
    known.hessian[3, 4] = known.hessian[4, 3] = 100.0 * known.hessian.max()
    with pytest.raises(ValueError, match=r"mlp\.up: .*singular.*calibrate"):
        solve_columns([_job(_weight(4, 32).float(), quantize=GPTQ4)], known)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"quantize": Quantization(method="gptq", bits=4, group_size=20)},
            "group_size 20 does not divide the 32 columns of mlp.up",
        ),
        (
            {"prune": Pruning(method="sparsegpt", sparsity=0.6, pattern="2:5")},
            "2:5 does not divide the 32 columns of mlp.up",
        ),
        (
            {"prune": TWO_OF_FOUR, "quantize": Quantization(method="gptq", bits=4, act_order=True)},
            "chooses by pattern 2:4: set act_order to false",
        ),
    ],
)
def test_recipes_that_do_not_fit_are_refused(parts: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _solve(_job(_weight(4, 32), **parts), _inputs(32))
