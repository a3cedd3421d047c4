"""What ``auto`` stands for, from 0.3M to 17B parameters."""

from itertools import pairwise

import pytest

from parallelism.accounting import train_flops_per_token
from parallelism.layout import Layout
from parallelism.presets import resolve_model
from parallelism.rules import (
    FEWEST_STEPS,
    DeviceKind,
    global_batch,
    learning_rate,
    micro_batch,
    micro_batches,
    resolve_training,
)
from parallelism.training import TrainingConfig


def test_rate_of_small_models_is_kaplans() -> None:
    # 0.003239 - 0.0001395 · ln(10^6) = 0.003239 - 0.0001395 · 13.815511
    assert learning_rate(1e6) == pytest.approx(1.31174e-3, rel=1e-5)
    assert learning_rate(1e8) == pytest.approx(6.6932e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("parameters", "published"),
    [(350e6, 3.0e-4), (1.3e9, 2.0e-4), (6.7e9, 1.2e-4), (13e9, 1.0e-4), (175e9, 0.6e-4)],
)
def test_rate_of_large_models_is_gpt3s(parameters: float, published: float) -> None:
    assert learning_rate(parameters) == pytest.approx(published, rel=1e-9)


def test_rate_falls_with_size_and_stays_usable() -> None:
    sizes = [0.3e6 * 1.2**power for power in range(75)]  # to 260B
    rates = [learning_rate(size) for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert 5e-5 < rates[-1] < rates[0] < 2e-3
    # No jump where one source ends and the other begins.
    assert max(first / second for first, second in pairwise(rates)) < 1.25
    # The published rate of both missions' models (Shoeybi et al. 2019; Turing-NLG): 1.5e-4.
    assert learning_rate(8.2e9) == pytest.approx(1.5e-4, rel=0.3)
    assert learning_rate(17e9) == pytest.approx(1.5e-4, rel=0.4)


def test_batch_grows_with_the_tokens_and_leaves_enough_steps() -> None:
    # 0.58 · (10^9)^0.571 = 79,878 tokens: 78 sequences of 1024, of which the power of two below is 64.
    assert global_batch(1e9, 1024) == 64
    batches = [global_batch(10.0**power, 256) for power in range(4, 13)]
    assert batches == sorted(batches)
    for power in range(5, 13):
        assert 10.0**power / (256 * global_batch(10.0**power, 256)) >= FEWEST_STEPS
    assert global_batch(1000.0, 256) == 1
    # 300B tokens in sequences of 2048: GPT-3 used 0.5M to 3.2M tokens.
    assert 0.5e6 < 2048 * global_batch(300e9, 2048) < 3.2e6


@pytest.mark.parametrize("budget", [1e12, 1e13, 1e15, 1e21])
def test_rules_hold_over_sizes_and_budgets(budget: float) -> None:
    for layers, hidden in ((1, 64), (8, 256), (24, 1024), (78, 4256)):
        model = resolve_model({"layers": layers, "hidden": hidden, "heads": 4}, 4096, 256)
        tokens = budget / train_flops_per_token(model, 256)
        training = resolve_training(TrainingConfig(), model, Layout(), 256, tokens, "cpu")
        assert isinstance(training.global_batch, int)
        assert isinstance(training.micro_batch, int)
        assert isinstance(training.learning_rate, float)
        assert training.global_batch % training.micro_batch == 0
        steps = tokens / (256 * training.global_batch)
        assert steps >= FEWEST_STEPS or training.global_batch == 1
        assert 5e-5 < training.learning_rate < 2e-3


def test_micro_batches_divide_the_share() -> None:
    assert micro_batches(24, 2) == [12, 6, 4, 3, 2, 1]
    assert micro_batch(64, Layout(), 256, "cpu") == 8  # 2048 tokens
    assert micro_batch(64, Layout(data=2), 256, "gpu") == 32
    assert micro_batch(64, Layout(pipeline=4), 256, "cpu") == 4  # 16 micro-batches for 4 stages
    assert micro_batch(64, Layout(data=2, engine="lean"), 256, "cpu") == 32


@pytest.mark.parametrize(
    ("layout", "training", "batch"),
    [
        (Layout(data=3), TrainingConfig(), 15),
        (Layout(data=2), TrainingConfig(micro_batch=3), 12),
        (Layout(pipeline=3, virtual_pipeline=2), TrainingConfig(), 15),
        (Layout(data=32), TrainingConfig(), 32),
        (Layout(), TrainingConfig(global_batch=7), 7),
    ],
)
def test_batch_by_rule_suits_the_layout(layout: Layout, training: TrainingConfig, batch: int) -> None:
    model = resolve_model({"layers": 6, "hidden": 64, "heads": 4}, 4096, 256)
    settled = resolve_training(training, model, layout, 256, 8e6, "cpu")  # 16 sequences by rule
    assert settled.global_batch == batch


def test_precision_by_device() -> None:
    model = resolve_model({"layers": 6, "hidden": 64, "heads": 4}, 4096, 256)

    def precision(layout: Layout, kind: DeviceKind) -> str:
        return resolve_training(TrainingConfig(), model, layout, 256, 1e6, kind).precision

    assert precision(Layout(), "gpu") == "bf16"
    assert precision(Layout(), "cpu") == "fp32"
    assert precision(Layout(engine="lean"), "gpu") == "fp32"


def test_what_the_owner_gives_stays() -> None:
    model = resolve_model({"layers": 6, "hidden": 64, "heads": 4}, 4096, 256)
    given = TrainingConfig(global_batch=12, micro_batch=4, learning_rate=0.5, precision="bf16", weight_decay=0.3)
    assert resolve_training(given, model, Layout(), 256, 1e6, "cpu") == given
    with pytest.raises(ValueError, match="micro_batch 5 does not divide global_batch 12"):
        resolve_training(TrainingConfig(global_batch=12, micro_batch=5), model, Layout(), 256, 1e6, "cpu")
