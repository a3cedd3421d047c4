"""Engine deepspeed against the megatron engine on one rank, and its checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from parallelism.engines import limits
from parallelism.layout import Layout
from parallelism.training import TrainingConfig, TrainTask
from tests.parallelism.resuming import continue_from, save_after, stop_and_resume
from tests.parallelism.small_gpt import make_engine, micro_batches, small_task, train
from tests.ranks import run_ranks

STEPS = 16
FIRST_STEP, LAST_STEP, NORM = 5e-6, 5e-5, 5e-5
"""Largest differences of losses and gradient norms from one process."""
LAST_STEP_BF16, NORM_BF16 = 1.5e-3, 2e-2
"""The same in bfloat16, where the order of a sum shows in the third digit; the first step is as near as in float32."""

UNEVEN = {"style": "gpt2", "hidden": 35, "heads": 5, "kv_heads": 5, "ffn_hidden": 45}
"""Sizes of parameters that two data ranks cannot share evenly."""


def deepspeed_task(
    training: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **layout: Any
) -> TrainTask:
    return small_task(layout={"engine": "deepspeed", **layout}, training=training, model=model)


def train_all(tasks: list[TrainTask]) -> list[tuple[list[float], list[float], float]]:
    """Losses, norms and a validation loss of every task, one after the other in the same processes."""
    results = []
    for task in tasks:
        engine = make_engine(task)
        losses, norms = train(engine, task, 0, STEPS)
        results.append((losses, norms, engine.evaluate(micro_batches(task, engine.data_rank, STEPS))))
    return results


STAGES = (1, 2, 3)
PARITY = {
    "zero-0 data": deepspeed_task(data=2),
    **{f"zero-{stage} data": deepspeed_task(data=2, zero_stage=stage) for stage in STAGES},
    **{f"zero-{stage} tensor": deepspeed_task(tensor=2, zero_stage=stage) for stage in STAGES},
    **{f"zero-{stage} offload": deepspeed_task(data=2, zero_stage=stage, offload="cpu") for stage in STAGES},
    "zero-2 tensor offload": deepspeed_task(tensor=2, zero_stage=2, offload="cpu"),
    "zero-2 sequence": deepspeed_task(tensor=2, sequence_parallel=True, zero_stage=2),
    "zero-3 recompute": deepspeed_task({"recompute": True}, data=2, zero_stage=3),
}
BF16 = {"precision": "bf16"}
PARITY_BF16 = {
    **{f"zero-{stage} data": deepspeed_task(BF16, data=2, zero_stage=stage) for stage in STAGES},
    "zero-2 tensor": deepspeed_task(BF16, tensor=2, zero_stage=2),
    "zero-3 offload": deepspeed_task(BF16, data=2, zero_stage=3, offload="cpu"),
}


@pytest.fixture(scope="module")
def one_process() -> list[tuple[list[float], list[float], float]]:
    """In float32 and in bfloat16."""
    (results,) = run_ranks(train_all, 1, [small_task(), small_task(training=BF16)])
    return results


@pytest.fixture(scope="module")
def two_ranks() -> list[list[tuple[list[float], list[float], float]]]:
    return run_ranks(train_all, 2, [*PARITY.values(), *PARITY_BF16.values()], timeout=600)


def of_both_ranks(index: int, two_ranks: Any) -> tuple[list[float], list[float], float]:
    first, second = (results[index] for results in two_ranks)
    assert first == second, "all ranks report the same numbers"
    return first


@pytest.mark.parametrize("case", PARITY)
def test_losses_and_norms_equal_those_of_one_process(case: str, one_process: Any, two_ranks: Any) -> None:
    losses, norms, validation = one_process[0]
    assert sum(norm > 1.0 for norm in norms) > STEPS // 2, "clipping must be at work"
    assert losses[-1] < losses[0] - 0.5
    found_losses, found_norms, found_validation = of_both_ranks(list(PARITY).index(case), two_ranks)
    assert found_losses[0] == pytest.approx(losses[0], abs=FIRST_STEP)
    assert found_losses == pytest.approx(losses, abs=LAST_STEP)
    assert found_norms == pytest.approx(norms, abs=NORM)
    assert found_validation == pytest.approx(validation, abs=LAST_STEP)


@pytest.mark.parametrize("case", PARITY_BF16)
def test_losses_and_norms_in_bfloat16_are_near_those_of_one_process(
    case: str, one_process: Any, two_ranks: Any
) -> None:
    losses, norms, validation = one_process[1]
    index = len(PARITY) + list(PARITY_BF16).index(case)
    found_losses, found_norms, found_validation = of_both_ranks(index, two_ranks)
    assert found_losses[0] == pytest.approx(losses[0], abs=FIRST_STEP)
    assert found_losses == pytest.approx(losses, abs=LAST_STEP_BF16)
    assert found_norms == pytest.approx(norms, abs=NORM_BF16)
    assert found_validation == pytest.approx(validation, abs=LAST_STEP_BF16)


def resumed_layouts(precision: str) -> dict[str, TrainTask]:
    uneven, even = {**UNEVEN, "dropout": 0.1}, {"dropout": 0.1}
    training = {"precision": precision}
    tasks = {
        **{f"zero-{stage} data": deepspeed_task(training, uneven, data=2, zero_stage=stage) for stage in STAGES},
        **{f"zero-{stage} tensor": deepspeed_task(training, even, tensor=2, zero_stage=stage) for stage in STAGES},
        **{
            f"zero-{stage} offload": deepspeed_task(training, uneven, data=2, zero_stage=stage, offload="cpu")
            for stage in STAGES
        },
    }
    if precision == "fp32":
        tasks["zero-0 data"] = deepspeed_task(training, uneven, data=2)
    return tasks


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(precision: str, tmp_path: Path) -> None:
    tasks = resumed_layouts(precision)
    for results in run_ranks(stop_and_resume, 2, list(tasks.values()), 2, tmp_path):
        for case, result in zip(tasks, results, strict=True):
            assert result["found"] == result["expected"], case
            assert result["same_state"], case


def test_deepspeed_continues_what_megatron_began(tmp_path: Path) -> None:
    losses, _ = run_ranks(save_after, 2, small_task(layout={"tensor": 2}), 4, 8, tmp_path / "checkpoint")
    stages = [deepspeed_task(zero_stage=stage, data=2) for stage in (1, 3)]
    for result in run_ranks(continue_from, 2, stages, tmp_path / "checkpoint", 8)[0]:
        assert result == pytest.approx(losses[4:], abs=1e-5)


def test_other_engines_and_stages_continue_what_deepspeed_began(tmp_path: Path) -> None:
    task = deepspeed_task(model=UNEVEN, zero_stage=3, data=2)
    losses, _ = run_ranks(save_after, 2, task, 4, 8, tmp_path / "checkpoint")
    one = [small_task(model=UNEVEN), deepspeed_task(model=UNEVEN, zero_stage=1)]
    two = [small_task(model=UNEVEN, layout={"data": 2}), deepspeed_task(model=UNEVEN, zero_stage=2, data=2)]
    for tasks, world_size in ((one, 1), (two, 2)):
        for result in run_ranks(continue_from, world_size, tasks, tmp_path / "checkpoint", 8)[0]:
            assert result == pytest.approx(losses[4:], abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "training", "message"),
    [
        ({"offload": "cpu"}, {}, r"layout\.offload cpu.*zero_stage: 1"),
        ({"offload": "nvme", "offload_dir": "x", "zero_stage": 2}, {}, r"layout\.zero_stage 2.*disk.*offload: cpu"),
        ({}, {"precision": "bf16"}, r"layout\.zero_stage 0.*zero_stage: 1"),
        ({"data": 3, "zero_stage": 1}, {"micro_batch": 4}, r"training\.global_batch 8.*global_batch: 12"),
    ],
)
def test_what_it_cannot_do_is_refused(layout: dict[str, Any], training: dict[str, Any], message: str) -> None:
    base = {"global_batch": 8, "micro_batch": 2, "precision": "fp32"}
    with pytest.raises(ValueError, match=message):
        limits.check(Layout(engine="deepspeed", **layout), TrainingConfig(**(base | training)))
