"""Training that begins with given weights: zeros held, weights rounded, a teacher followed, weights pruned."""

from pathlib import Path
from typing import Any

import pytest
import torch

from compression.compact import CompactFile
from compression.config import RecoverConfig
from compression.recipe import Pruning, Quantization, Recipe, Strength
from compression.recovery import start_point
from compression.rounding import round_weight
from compression.tasks import assemble, compress_layer, compress_outer, to_checkpoint
from parallelism.checkpoint_store import read_info
from parallelism.engines import limits
from parallelism.gradual import GradualPruning, sparsity_at
from parallelism.layer_reader import CheckpointWeights, plain_family
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.plain_checkpoint import write_checkpoint
from parallelism.run import check_task, step_cost
from parallelism.start import Rounding, StartPoint, check_start
from tests.parallelism.real_runs import (
    assert_same_bits,
    losses,
    made_data,
    made_task,
    resumed,
    run_once,
    stored_tensors,
)
from tests.parallelism.recovering import (
    HELD_OUT,
    LINEAR,
    MODEL,
    MadeWeights,
    PlainModel,
    all_gradients,
    chosen_smallest,
    plain_loss,
    pruned_from,
    recover_and_save,
    run_many,
    start_task,
    started,
    train_dense,
    zeros_of_every_step,
)
from tests.parallelism.small_gpt import make_engine
from tests.ranks import run_ranks

T2, P2, D2 = {"tensor": 2}, {"pipeline": 2}, {"data": 2}
LEAN = {"engine": "lean"}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}
BF16, NOT_DISTRIBUTED = {"precision": "bf16"}, {"distributed_optimizer": False}
ROUNDING = Rounding(
    function="compression.rounding:round_weight",
    group_size=8,
    arguments={"bits": 4},
    by_matrix={"layers.0.mlp.down": {"bits": 3}, "layers.1.attention.q": {"symmetric": False}},
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small model, trained until it has learnt something."""
    root = tmp_path_factory.mktemp("dense")
    run_ranks(train_dense, 1, root, 60)
    return root / "dense"


@pytest.fixture(scope="module")
def pruned(dense: Path) -> str:
    return str(pruned_from(dense, 0.7))


# Weights alone as a checkpoint


@pytest.mark.parametrize("changed", [{}, {"style": "gpt2", "kv_heads": None}, {"tied_embeddings": False}], ids=str)
def test_weights_come_back_from_a_plain_checkpoint(tmp_path: Path, changed: dict[str, Any]) -> None:
    weights = MadeWeights(GPTConfig(**(MODEL | {"vocab_size": 250, "context": 16} | changed)))
    info = write_checkpoint(weights, tmp_path / "made", "one")
    back = CheckpointWeights(info.path)
    assert back.config == weights.config
    for index in range(weights.config.layers):
        assert_equal(back.layer(index), weights.layer(index))
    assert_equal(back.outer(), weights.outer())
    table = stored_tensors(info.path)["embedding.word_embeddings.weight"]
    assert table.shape == (256, 32)
    assert bool((table[250:] == 0.0).all())
    assert [path.name for path in tmp_path.iterdir()] == ["made"], "nothing unfinished is left"


def test_a_plain_checkpoint_is_made_once_and_replaced_by_that_of_other_weights(tmp_path: Path) -> None:
    config = GPTConfig(**MODEL, vocab_size=250)
    first = write_checkpoint(MadeWeights(config), tmp_path / "made", "one")
    assert write_checkpoint(MadeWeights(config, 0.5), tmp_path / "made", "one").created == first.created
    second = write_checkpoint(MadeWeights(config, 0.5), tmp_path / "made", "two")
    assert bool((CheckpointWeights(second.path).layer(0)["mlp.up.weight"] == 0.0).any())


def test_weights_of_another_shape_leave_nothing(tmp_path: Path) -> None:
    weights = MadeWeights(GPTConfig(**MODEL, vocab_size=250))
    weights.outer = lambda: {"embedding.tokens": torch.zeros(3, 3)}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"embedding\.tokens has shape"):
        write_checkpoint(weights, tmp_path / "made", "one")
    assert list(tmp_path.iterdir()) == []


def test_a_variant_becomes_a_checkpoint_with_the_weights_that_are_evaluated(dense: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        prune=Pruning(method="magnitude", sparsity=0.5), quantize=Quantization(method="rtn", bits=4, group_size=8)
    )
    for index in range(MODEL["layers"]):
        compress_layer(str(dense), index, [recipe], str(tmp_path / "out"))
    compress_outer(str(dense), [recipe], str(tmp_path / "out"))
    variant = assemble(str(dense), recipe, str(tmp_path / "out")).path
    checkpoint = to_checkpoint(variant, str(tmp_path / "start"))
    weights, back = CompactFile(variant), CheckpointWeights(checkpoint)
    for index in range(MODEL["layers"]):
        assert_equal(back.layer(index), weights.layer(index))
    assert_equal(back.outer(), weights.outer())
    assert to_checkpoint(checkpoint, "unused") == checkpoint


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# Zeros


def test_zeros_stay_zero_after_every_step_and_the_loss_falls(pruned: str) -> None:
    start = StartPoint(weights=pruned, hold_zeros=True)
    cases = [(T2, {}), (P2, {}), (D2, {}), (D2, NOT_DISTRIBUTED), (D2, BF16), (T2, BF16), (P2, BF16 | NOT_DISTRIBUTED)]
    cases += [(T2 | LEAN, {}), (D2 | LEAN, {})]
    tasks = [start_task(start, layout, **training) for layout, training in cases]
    steps = 8
    for task, *ranks in zip(tasks, *run_ranks(zeros_of_every_step, 2, tasks, steps), strict=True):
        masters = {"fp32_param"} if task.training.precision == "bf16" else set()
        # Data ranks share the writing, and so the pieces, of what both hold.
        held = sum(rank["zeros"] for rank in ranks) / steps
        print(f"{task.layout} {task.training.precision}: {ranks[0]['before']:.4f} -> {ranks[0]['after']:.4f}")
        for seen in ranks:
            assert seen["broken"] == [], task.layout
            assert seen["others"] == 0, "what was not pruned is trained"
            assert masters | {"exp_avg", "exp_avg_sq"} <= seen["kinds"]
            assert seen["after"] < seen["before"] - 0.1
        assert 0.69 < held / task.layout.data / linear_weights() < 0.71


def linear_weights() -> int:
    config = GPTConfig(**MODEL, vocab_size=250)
    return config.layers * sum(out * width for out, width in config.linear_shapes().values())


def test_without_holding_them_zeros_are_trained(pruned: str) -> None:
    task = start_task(StartPoint(weights=pruned))
    ((seen,),) = run_ranks(zeros_of_every_step, 1, [task], 1)
    assert seen["broken"] != []


# Rounded weights


def test_the_loss_in_training_is_that_of_the_weights_rounded_in_the_end(pruned: str, tmp_path: Path) -> None:
    start = StartPoint(weights=pruned, hold_zeros=True, rounding=ROUNDING)
    found = {}
    for name, layout in (("one", {}), ("tensor", T2), ("pipeline", P2)):
        task = start_task(start, layout)
        results = run_ranks(recover_and_save, task.layout.world_size, task, 6, tmp_path / name)
        model = PlainModel(tmp_path / name)
        latent = plain_loss(task, model, None, HELD_OUT).item()
        zeros = rounded_in_place(model)
        found[name] = plain_loss(task, model, None, HELD_OUT).item()
        print(f"{name}: training {results[0]:.6f}, rounded {found[name]:.6f}, latent {latent:.6f}")
        assert results[0] == pytest.approx(found[name], abs=2e-6)
        assert abs(results[0] - latent) > 1e-4, "rounding is felt"
        assert zeros >= 0.69 * linear_weights()
        assert_zeros_kept(pruned, tmp_path / name)
    assert found["tensor"] == pytest.approx(found["one"], abs=1e-3)
    assert found["pipeline"] == pytest.approx(found["one"], abs=1e-3)


def rounded_in_place(model: PlainModel) -> int:
    """Round the linear weights as the start point says; returns how many are zero."""
    zeros = 0
    for index, weights in enumerate(model.layers):
        for name, tensor in weights.items():
            if tensor.ndim == 2:
                own = ROUNDING.by_matrix.get(f"layers.{index}.{name.removesuffix('.weight')}", {})
                weights[name] = round_weight(tensor.detach(), **({"group_size": 8} | ROUNDING.arguments | own))
                zeros += int((weights[name] == 0.0).sum())
    return zeros


def assert_zeros_kept(before: str | Path, after: str | Path) -> None:
    start, end = stored_tensors(before), stored_tensors(after)
    for key, tensor in start.items():
        if key.endswith(LINEAR):
            assert torch.equal(end[key] == 0.0, tensor == 0.0), key


def lean_rounds(task: Any) -> dict[str, Any]:
    (seen,) = zeros_of_every_step([task], 6)
    return seen


def test_engine_lean_rounds_too_and_learns(pruned: str) -> None:
    task = start_task(StartPoint(weights=pruned, hold_zeros=True, rounding=ROUNDING), T2 | LEAN)
    for seen in run_ranks(lean_rounds, 2, task):
        assert seen["broken"] == []
        assert seen["others"] == 0
        assert seen["after"] < seen["before"] - 0.1


# A teacher


def test_losses_and_gradients_are_those_of_one_process_in_plain_torch(dense: Path, pruned: str) -> None:
    start = StartPoint(weights=pruned, teacher=str(dense), distill_weight=0.7, temperature=2.0)
    layouts = (T2, T2 | {"sequence_parallel": True}, P2, INTERLEAVED, T2 | LEAN)
    tasks = [start_task(start, layout, gradient_clip=0.0) for layout in layouts]
    alone = start_task(start, {}, gradient_clip=0.0)
    student, teacher = PlainModel(pruned), PlainModel(dense)
    loss = plain_loss(alone, student, teacher, 0)
    loss.backward()
    expected = loss.item()
    slopes = student.stored_gradients()
    cases = [(alone, run_ranks(all_gradients, 1, [alone]))]
    by_rank = run_ranks(all_gradients, 2, tasks)
    cases += [(task, [[rank[index]] for rank in by_rank]) for index, task in enumerate(tasks)]
    for task, ranks in cases:
        worst, seen = 0.0, set()
        for (result,) in ranks:
            assert result["loss"] == pytest.approx(expected, abs=2e-6)
            for key, offset, values in result["gradients"]:
                window = tuple(slice(at, at + size) for at, size in zip(offset, values.shape, strict=True))
                scale = float(slopes[key].abs().max())
                worst = max(worst, float(abs(values - slopes[key][window].numpy()).max()) / scale)
                seen.add(key)
        print(f"{task.layout}: gradients within {worst:.1e} of the largest")
        assert worst < 1e-5
        assert seen == (set() if task.layout.engine == "lean" else slopes.keys())


def test_a_teacher_costs_its_forward_pass(dense: Path, pruned: str) -> None:
    plain, taught = start_task(StartPoint(weights=pruned)), start_task(StartPoint(weights=pruned, teacher=str(dense)))
    assert step_cost(taught).flops == pytest.approx(step_cost(plain).flops * 4 / 3)


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_data(tmp_path_factory.mktemp("made"))


def test_resumed_with_masks_rounding_and_teacher_a_run_ends_with_the_same_bits(tmp_path: Path, data: Path) -> None:
    config = made_task(data, tmp_path).model
    weights = write_checkpoint(MadeWeights(config, 0.6), tmp_path / "start", "start").path
    teacher = write_checkpoint(MadeWeights(config), tmp_path / "teacher", "teacher").path
    rounding = Rounding(function=ROUNDING.function, group_size=8, arguments={"bits": 3})
    start = StartPoint(weights=str(weights), hold_zeros=True, rounding=rounding, teacher=str(teacher))
    wholes = [
        made_task(data, tmp_path / f"whole{case}", layout=Layout(**layout), start=start)
        for case, layout in enumerate((T2, P2, T2 | LEAN))
    ]
    halves = [
        task.model_copy(update={"checkpoint_dir": str(tmp_path / f"halves{case}")}) for case, task in enumerate(wholes)
    ]
    attempts = [(task, None) for task in wholes] + [(task, 5) for task in halves]
    done = run_ranks(run_many, 2, attempts)[0]
    continued = run_ranks(run_many, 2, [(resumed(task), None) for task in halves])[0]
    for (expected, events), (_, before), (result, after) in zip(done[:3], done[3:], continued, strict=True):
        assert result.progress == expected.progress
        assert_same_bits(result.checkpoint, expected.checkpoint)
        assert losses(before) | losses(after) == losses(events)
        assert result.validation_loss == expected.validation_loss
        assert_zeros_kept(weights, result.checkpoint)


RAMP = GradualPruning(sparsity=0.6, begin=0.1, end=0.7, every=0.1)


def pruning_task(data: Path, root: Path, layout: dict[str, Any], ramp: GradualPruning = RAMP) -> Any:
    task = made_task(data, root, layout=Layout(**layout), dropout=0.0)
    return task.model_copy(update={"training": task.training.model_copy(update={"prune": ramp})})


def matrix_sparsity(checkpoint: str) -> dict[str, float]:
    """Of every linear matrix; masters and moments have their zeros where it has."""
    weights, found = CheckpointWeights(checkpoint), {}
    for index in range(weights.config.layers):
        for name, tensor in weights.layer(index).items():
            if tensor.ndim == 2:
                found[f"{index}.{name}"] = float((tensor == 0.0).sum()) / tensor.numel()
    stored = stored_tensors(checkpoint)
    for key in (key for key in stored if key.startswith("decoder.layers.") and key.endswith(LINEAR)):
        for name in {
            f"optimizer.state.{part}.{key}" for part in ("fp32_param", "exp_avg", "exp_avg_sq")
        } & stored.keys():
            assert bool((stored[name][stored[key] == 0.0] == 0.0).all()), name
    return found


def test_gradual_pruning_is_exact_and_the_same_at_every_layout(tmp_path: Path, data: Path) -> None:
    layouts = {"tensor": T2, "pipeline": P2, "data": D2, "bf16": D2, "lean": T2 | LEAN, "halves": T2}
    tasks = {name: pruning_task(data, tmp_path / name, layout) for name, layout in ({"one": {}} | layouts).items()}
    in_bf16 = tasks["bf16"].training.model_copy(update=BF16)
    tasks["bf16"] = tasks["bf16"].model_copy(update={"training": in_bf16})
    results = dict(zip(["one"], run_ranks(run_many, 1, [(tasks["one"], None)])[0], strict=True))
    attempts = [(tasks[name], 6 if name == "halves" else None) for name in layouts]
    results |= zip(layouts, run_ranks(run_many, 2, attempts)[0], strict=True)
    for name in tasks.keys() - {"halves"}:
        shares = matrix_sparsity(results[name][0].checkpoint)
        assert len(shares) == 4 * 7
        # 60 % of the sizes here is no whole number of weights, but for the nearest one.
        assert all(abs(share - 0.6) < 0.5 / (16 * 32) for share in shares.values()), name
    alone = losses(results["one"][1])
    for name in ("tensor", "pipeline", "data"):
        apart = max(abs(loss - alone[step]) for step, loss in losses(results[name][1]).items())
        print(f"{name}: losses within {apart:.1e}")
        assert apart < 1e-4
    result, _ = run_ranks(run_once, 2, resumed(tasks["halves"]))[0]
    assert_same_bits(result.checkpoint, results["tensor"][0].checkpoint)


def test_a_ramp_that_ends_behind_the_last_step_is_completed(tmp_path: Path, data: Path) -> None:
    task = pruning_task(data, tmp_path, {}, GradualPruning(sparsity=0.5, begin=0.0, end=1.0, every=0.25))
    ((result, _),) = run_ranks(run_once, 1, task)
    assert set(matrix_sparsity(result.checkpoint).values()) == {0.5}


def test_the_smallest_weights_do_not_depend_on_the_ranks() -> None:
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(12, 10, generator=generator), torch.randn(12, 10, generator=generator)]
    matrices += [(10 * matrix).round() / 10 for matrix in matrices] + [torch.zeros(4, 4), torch.ones(4, 4)]
    sparsities = [0.0, 0.37, 0.99]
    ranks = run_ranks(chosen_smallest, 2, [matrix.numpy() for matrix in matrices], sparsities)
    for case, sparsity in enumerate(sparsities):
        for index, matrix in enumerate(matrices):
            found = torch.cat([torch.from_numpy(rank[case][index]) for rank in ranks], dim=index % 2)
            assert torch.equal(found, smallest_by_sorting(matrix, round(sparsity * matrix.numel()), index % 2))


def smallest_by_sorting(matrix: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    ordered = matrix if dim == 0 else matrix.t()
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[ordered.reshape(-1).abs().sort(stable=True).indices[:count]] = True
    return mask.view(ordered.shape) if dim == 0 else mask.view(ordered.shape).t()


def test_the_ramp_is_cubic_in_stairs() -> None:
    assert [sparsity_at(RAMP, fraction) for fraction in (0.0, 0.05, 0.15)] == [0.0, 0.0, 0.0]
    assert sparsity_at(RAMP, 0.45) == sparsity_at(RAMP, 0.41) == pytest.approx(0.6 * (1 - 0.5**3))
    assert sparsity_at(RAMP, 0.7) == sparsity_at(RAMP, 1.0) == 0.6
    stairs = [sparsity_at(RAMP, step / 1000) for step in range(1001)]
    assert stairs == sorted(stairs)
    assert len(set(stairs)) == 7
    assert sparsity_at(None, 0.5) == 0.0


def test_a_recipe_says_where_its_recovery_begins() -> None:
    both = RecoverConfig(budget_fraction=0.1, distill=True, quantization_aware=True)
    neither = RecoverConfig(budget_fraction=0.1)
    prune = Pruning(method="wanda", sparsity=0.5)
    mixed = Quantization(method="gptq", average_bits=3.5, group_size=8, symmetric=False)
    strengths = {f"layers.{index}.mlp.up": Strength(bits=bits) for index, bits in enumerate((2, 3, 4, 8))}
    found = start_point(
        Recipe(prune=prune, quantize=mixed), "here", both, teacher="dense", strengths=strengths, removed=(1,)
    )
    assert (found.weights, found.hold_zeros, found.teacher) == ("here", True, "dense")
    assert found.rounding == Rounding(
        function="compression.rounding:round_weight",
        group_size=8,
        arguments={"symmetric": False, "number": "int"},
        by_matrix={f"layers.{index}.mlp.up": {"bits": bits} for index, bits in enumerate((2, 4, 8))},
    )
    uniform = Recipe(quantize=Quantization(method="rtn", bits=3))
    assert start_point(uniform, "here", both).rounding.arguments["bits"] == 3
    assert start_point(uniform, "here", neither, teacher="dense") == StartPoint(weights="here")


# Refusals


def loaded_as_if_it_had_an_optimizer(task: Any) -> str:
    from parallelism import checkpoint

    engine = started(task)
    try:
        checkpoint.load(engine, task.start.weights)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_no_training_goes_on_from_weights_alone(pruned: str) -> None:
    (message,) = run_ranks(loaded_as_if_it_had_an_optimizer, 1, start_task(StartPoint(weights=pruned)))
    assert "without an optimizer" in message
    assert "start.weights instead of resume_from" in message


def refused_by_engine(task: Any) -> str:
    try:
        make_engine(task)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("fields", "layout", "message"),
    [
        ({"group_size": 16}, T2, r"group_size 16: layers\.0\.mlp\.down .* the 24 of its 48 columns .*tensor: 1"),
        ({"group_size": None}, T2, r"group_size None: layers\.0\.attention\.o is rounded by 32 columns"),
        ({"group_size": 5}, {}, r"group_size 5: layers\.0\.attention\.q .* its 32 columns: use a divisor"),
        ({"by_matrix": {"layers.9.mlp.up": {}}}, {}, r"by_matrix names layers\.9\.mlp\.up"),
    ],
    ids=str,
)
def test_rounding_that_does_not_fit_is_refused(fields: dict[str, Any], layout: Any, message: str) -> None:
    start = StartPoint(weights="somewhere", rounding=ROUNDING.model_copy(update=fields))
    config = GPTConfig(**MODEL, vocab_size=250)
    check_start(StartPoint(weights="somewhere", rounding=ROUNDING), config, Layout(**layout))
    with pytest.raises(ValueError, match=message):
        check_start(start, config, Layout(**layout))


def test_engines_refuse_by_themselves_what_they_cannot_do() -> None:
    rounding = ROUNDING.model_copy(update={"group_size": None})
    task = start_task(StartPoint(weights="somewhere", rounding=rounding), T2)
    assert all("group_size None" in message for message in run_ranks(refused_by_engine, 2, task))


def test_engine_deepspeed_is_refused(tmp_path: Path, data: Path) -> None:
    task = made_task(data, tmp_path, layout=Layout(engine="deepspeed"))
    start = StartPoint(weights="somewhere", hold_zeros=True)
    with pytest.raises(ValueError, match=r"start: engine deepspeed .* set layout\.engine: megatron"):
        check_task(task.model_copy(update={"start": start}), 1)
    pruning = task.training.model_copy(update={"prune": RAMP})
    with pytest.raises(ValueError, match=r"training\.prune: engine deepspeed .* set layout\.engine: megatron"):
        limits.check(task.layout, pruning)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, data: Path, dense: Path) -> None:
    task = made_task(data, tmp_path)
    start = StartPoint(weights="somewhere", teacher=str(dense))
    with pytest.raises(ValueError, match=r"start\.teacher .* with 250 tokens, the model of family gpt with 257"):
        check_task(task.model_copy(update={"start": start}), 1)
    assert read_info(dense).model.vocab_size == 250


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"begin": 0.8, "end": 0.7}, "begin 0.8 is not before end 0.7"), ({"every": 0.9}, "every 0.9 is longer")],
    ids=str,
)
def test_a_ramp_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualPruning(sparsity=0.5, **fields)


def test_the_plain_family_finds_the_matrices_in_what_is_stored() -> None:
    config = GPTConfig(**MODEL, vocab_size=250)
    family, weights = plain_family(config), MadeWeights(config).layer(0)
    found = {}
    for name, tensor in family.join_layer(config, weights).items():
        for matrix in family.matrices(config, name, tensor):
            found[f"{matrix.name}.weight"] = matrix.view.reshape(-1, matrix.view.shape[-1])
    assert_equal(found, {name: tensor for name, tensor in weights.items() if tensor.ndim == 2})
