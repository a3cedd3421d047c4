"""Every layout trains like one process: losses and gradient norms over 20 steps, and golden values of one process."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from parallelism.layout import Layout
from tests.parallelism.small_gpt import make_engine, micro_batches, small_task, train
from tests.ranks import run_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "small_gpt_losses.json"
STEPS = 20
CLIP = 0.5
FIRST_STEP, LAST_STEP = 5e-6, 5e-5
"""How far a loss may be from that of one process."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},  # tied embeddings, grouped-query attention
    "llama-untied": {"tied_embeddings": False},
    "gpt2": {"style": "gpt2", "kv_heads": None},
}
DISTRIBUTED_OFF = {"distributed_optimizer": False}
T2, P2, D2 = {"tensor": 2}, {"pipeline": 2}, {"data": 2}
INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2}

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", T2, {}),
    ("llama", P2, {}),
    ("llama", D2, {}),
    ("llama", D2, DISTRIBUTED_OFF),
    ("llama", INTERLEAVED, {}),
    ("llama", {**T2, **P2}, {}),
    ("llama", {**T2, "sequence_parallel": True}, {}),
    ("llama", {**T2, **D2, "sequence_parallel": True}, {}),
    ("llama", {**P2, **D2}, {}),
    ("llama-untied", P2, {}),
    ("llama", T2, {"recompute": True}),
    ("gpt2", T2, {}),
    ("gpt2", {**T2, **P2}, {}),
    ("gpt2", {**T2, "sequence_parallel": True}, {}),
    ("gpt2", INTERLEAVED, {}),
    ("gpt2", D2, {}),
]


def run_training(model: str, layout: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """On every rank: losses and gradient norms of all steps, and a loss on held-out samples."""
    task = small_task(layout=layout, training={"gradient_clip": CLIP, **training}, model=MODELS[model])
    engine = make_engine(task)
    losses, norms = train(engine, task, 0, STEPS)
    held_out = engine.evaluate(micro_batches(task, engine.data_rank, 999))
    return {"losses": losses, "norms": norms, "held_out": held_out}


@cache
def one_process(model: str) -> dict[str, Any]:
    (result,) = run_ranks(run_training, 1, model, {}, {})
    return dict(result)


@pytest.mark.parametrize(("model", "layout", "training"), CASES, ids=str)
def test_layout_trains_like_one_process(model: str, layout: dict[str, Any], training: dict[str, Any]) -> None:
    expected = one_process(model)
    results = run_ranks(run_training, Layout(**layout).world_size, model, layout, training)
    assert all(result == results[0] for result in results), "all ranks report the same figures"
    differences = [abs(a - b) for a, b in zip(results[0]["losses"], expected["losses"], strict=True)]
    norms = [abs(a - b) / b for a, b in zip(results[0]["norms"], expected["norms"], strict=True)]
    print(f"first {differences[0]:.1e}, most {max(differences):.1e}, norms {max(norms):.1e}")  # shown by pytest -rP
    assert differences[0] <= FIRST_STEP
    assert max(differences) <= LAST_STEP
    assert norms[0] <= 1e-5
    assert max(norms) <= 1e-3
    assert abs(results[0]["held_out"] - expected["held_out"]) <= LAST_STEP


@pytest.mark.parametrize("model", MODELS)
def test_golden_losses(model: str) -> None:
    """A change of these numbers is a change of the product: the same seeds no longer give the same model."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[model]
    result = one_process(model)
    assert result["losses"] == pytest.approx(golden["losses"], abs=2e-5)
    assert result["norms"] == pytest.approx(golden["norms"], rel=1e-3)
    assert max(result["norms"]) > CLIP, "clipping is part of what is compared"
    assert min(result["losses"]) < result["losses"][0] - 0.5, "it learns"


def refused(layout: dict[str, Any], training: dict[str, Any]) -> str:
    task = small_task(layout=layout, training=training)
    try:
        engine = make_engine(task)
        engine.train_step(micro_batches(task, engine.data_rank, 0), 1e-3)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_interleaving_needs_whole_groups_of_micro_batches() -> None:
    for message in run_ranks(refused, 2, INTERLEAVED, {"global_batch": 6, "micro_batch": 2}):
        assert "micro-batches" in message
        assert "3" in message
        assert "global_batch" in message


def test_layout_must_fill_the_process_group() -> None:
    for message in run_ranks(refused, 2, {}, {}):
        assert "1 ranks" in message
        assert "has 2" in message


def untouched_by_evaluation(layout: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses of two steps with dropout, without and with an evaluation between them."""
    losses = []
    for evaluate in (False, True):
        task = small_task(layout=layout, model={"dropout": 0.1})
        engine = make_engine(task)
        first, _ = train(engine, task, 0, 1)
        if evaluate:
            engine.evaluate(micro_batches(task, engine.data_rank, 999))
        second, _ = train(engine, task, 1, 2)
        losses.append(first + second)
    return losses[0], losses[1]


@pytest.mark.parametrize("layout", [{}, P2], ids=str)
def test_evaluation_leaves_training_and_random_numbers_alone(layout: dict[str, Any]) -> None:
    for without, between in run_ranks(untouched_by_evaluation, Layout(**layout).world_size, layout):
        assert without == between


def dropout_differs() -> tuple[float, float]:
    """Losses of one step of a data rank with and without dropout."""
    results = []
    for dropout in (0.0, 0.5):
        task = small_task(layout=D2, model={"dropout": dropout})
        engine = make_engine(task)
        same_rows = micro_batches(task, 0, 0)
        results.append(train_loss(engine, same_rows))
    return results[0], results[1]


def train_loss(engine: Any, batches: list[Any]) -> float:
    return float(engine.train_step(batches, 0.0).loss)


def test_dropout_is_used_in_training() -> None:
    without, with_dropout = run_ranks(dropout_differs, 2)[0]
    assert abs(without - with_dropout) > 1e-3


def write_golden() -> None:
    """``python -m tests.parallelism.test_layouts`` writes the golden file anew."""
    GOLDEN.parent.mkdir(exist_ok=True)
    golden = {model: {key: one_process(model)[key] for key in ("losses", "norms")} for model in MODELS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
