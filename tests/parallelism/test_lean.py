"""Engine lean: its arithmetic, the same losses at every layout, and its checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallelism.engines import limits
from parallelism.engines.lean import adamw_in_chunks
from parallelism.engines.single_stage import CHUNK_ELEMENTS, square_sum
from parallelism.layout import Layout
from parallelism.training import TrainingConfig, TrainTask
from tests.parallelism.resuming import continue_from, save_after, stop_and_resume
from tests.parallelism.small_gpt import make_engine, micro_batches, small_task, train
from tests.ranks import run_ranks

STEPS = 20
BFLOAT16_ROUNDING = 2**-8


def lean_task(model: dict[str, Any] | None = None, **layout: Any) -> TrainTask:
    """One micro-batch per data rank; with ``recompute=True`` activations are computed again."""
    training = {"micro_batch": 8 // layout.get("data", 1), "recompute": layout.pop("recompute", False)}
    return small_task(layout={"engine": "lean", **layout}, training=training, model=model)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_the_update_is_torch_adamw(moments: torch.dtype) -> None:
    training = TrainingConfig(weight_decay=0.1, beta1=0.9, beta2=0.95)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, CHUNK_ELEMENTS // 2 + 1, generator=generator)
    bias = torch.randn(7, generator=generator)
    expected = [torch.nn.Parameter(tensor.clone()) for tensor in (weight, bias)]
    groups = [{"params": expected[:1], "weight_decay": 0.1}, {"params": expected[1:], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    state = [(torch.zeros_like(tensor, dtype=moments), torch.zeros_like(tensor, dtype=moments)) for tensor in expected]
    for step in (1, 2, 3):
        for tensor, parameter, (average, square) in zip((weight, bias), expected, state, strict=True):
            gradient = torch.randn(tensor.shape, generator=generator)
            parameter.grad = gradient * 0.25
            adamw_in_chunks(
                tensor, gradient, average, square, training, step=step, learning_rate=1e-2, gradient_scale=0.25
            )
        reference.step()
    # A step moves a weight by at most about the learning rate; rounded moments change that by their relative error.
    tolerance = 1e-6 if moments == torch.float32 else 3 * 1e-2 * 4 * BFLOAT16_ROUNDING
    for tensor, parameter in zip((weight, bias), expected, strict=True):
        torch.testing.assert_close(tensor, parameter.detach(), rtol=0.0, atol=tolerance)
    assert state[0][0].dtype == moments


def test_a_square_sum_counts_every_chunk_in_double_precision() -> None:
    gradient = torch.arange(2 * CHUNK_ELEMENTS + 5, dtype=torch.float32)
    assert float(square_sum(gradient)) == pytest.approx(float(gradient.double().square().sum()), rel=1e-11)


def modules_of(engine: Any) -> torch.nn.Module:
    """The model of engine lean or megatron."""
    return engine.module if hasattr(engine, "module") else torch.nn.ModuleList(engine.chunks)


def train_all(tasks: list[TrainTask]) -> list[dict[str, Any]]:
    """Every task, one after the other in the same processes."""
    results = []
    for task in tasks:
        engine = make_engine(task)
        losses, norms = train(engine, task, 0, STEPS)
        validation = engine.evaluate(micro_batches(task, engine.data_rank, STEPS))
        left = sum(parameter.grad is not None for parameter in modules_of(engine).parameters())
        results.append({"losses": losses, "norms": norms, "validation": validation, "gradients_left": left})
    return results


LAYOUTS = {
    "tensor": lean_task(tensor=2),
    "sequence": lean_task(tensor=2, sequence_parallel=True),
    "data": lean_task(data=2),
    "tensor recompute": lean_task(tensor=2, recompute=True),
}


@pytest.fixture(scope="module")
def one_rank() -> list[dict[str, Any]]:
    (results,) = run_ranks(train_all, 1, [lean_task(), lean_task(recompute=True), small_task()])
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[list[dict[str, Any]]]:
    return run_ranks(train_all, 2, list(LAYOUTS.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_do_not_depend_on_the_layout(layout: str, one_rank: Any, two_ranks: Any) -> None:
    first, second = (results[list(LAYOUTS).index(layout)] for results in two_ranks)
    assert first == second, "all ranks report the same numbers"
    reference = one_rank[0]
    assert sum(norm > 1.0 for norm in reference["norms"]) > STEPS // 2, "clipping must be at work"
    assert first["losses"][0] == pytest.approx(reference["losses"][0], abs=5e-6)
    assert first["losses"] == pytest.approx(reference["losses"], abs=5e-5)
    assert first["norms"][0] == pytest.approx(reference["norms"][0], abs=5e-6)
    assert first["norms"] == pytest.approx(reference["norms"], abs=5e-4)
    assert first["validation"] == pytest.approx(reference["validation"], abs=5e-5)
    assert first["gradients_left"] == 0


def test_recomputation_changes_no_bit(one_rank: Any) -> None:
    assert one_rank[1] == one_rank[0]


def test_it_learns_as_the_megatron_engine_does(one_rank: Any) -> None:
    lean, _, megatron = one_rank
    assert lean["losses"][0] == pytest.approx(megatron["losses"][0], abs=5e-6)
    assert lean["norms"][0] == pytest.approx(megatron["norms"][0], rel=1e-6)
    # bfloat16 moments, and clipping by the norm of the step before.
    assert lean["losses"] == pytest.approx(megatron["losses"], abs=5e-3)
    assert lean["losses"][-1] < lean["losses"][0] - 0.5


def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    tasks = [lean_task({"dropout": 0.1}, tensor=2), lean_task({"dropout": 0.1, "tied_embeddings": False}, data=2)]
    for results in run_ranks(stop_and_resume, 2, tasks, 3, tmp_path):
        for result in results:
            assert result["found"] == result["expected"]
            assert result["same_state"]


def test_other_layouts_and_engines_continue_what_lean_began(tmp_path: Path) -> None:
    losses, _ = run_ranks(save_after, 2, lean_task(tensor=2), 4, 8, tmp_path / "checkpoint")
    (found,) = run_ranks(continue_from, 1, [lean_task(), small_task()], tmp_path / "checkpoint", 8)
    lean, megatron = found
    assert lean == pytest.approx(losses[4:], abs=1e-5)
    assert megatron[0] == pytest.approx(losses[4], abs=5e-6), "the same weights"
    assert megatron == pytest.approx(losses[4:], abs=2e-3), "but for its own moments and clipping, the same way"


def test_lean_continues_what_megatron_began(tmp_path: Path) -> None:
    (losses,) = run_ranks(save_after, 1, small_task(), 4, 8, tmp_path / "checkpoint")
    found, _ = run_ranks(continue_from, 2, [lean_task(tensor=2)], tmp_path / "checkpoint", 8)
    assert found[0][0] == pytest.approx(losses[4], abs=5e-6), "the same weights"
    assert found[0] == pytest.approx(losses[4:], abs=2e-3)


@pytest.mark.parametrize(
    ("layout", "training", "message"),
    [
        ({}, {"micro_batch": 2}, r"training\.micro_batch 2.*global_batch 8; set training\.global_batch: 2"),
        ({"data": 2}, {"micro_batch": 2}, r"training\.micro_batch 2.*set training\.global_batch: 4"),
        ({}, {"precision": "bf16"}, r"training\.precision bf16.*set training\.precision: fp32"),
        ({}, {"beta2": 0.999}, r"training\.beta2 0\.999.*lower training\.beta2"),
    ],
)
def test_what_it_cannot_do_is_refused(layout: dict[str, Any], training: dict[str, Any], message: str) -> None:
    base = {"global_batch": 8, "micro_batch": 8, "precision": "fp32"}
    with pytest.raises(ValueError, match=message):
        limits.check(Layout(engine="lean", **layout), TrainingConfig(**(base | training)))
