"""What ``auto`` stands for: learning rate, batch and precision by rule, with the source of each. Torch-free.

An untuned learning rate would make a comparison of sizes worthless, so every candidate gets the rate of its size.
"""

import bisect
import math

from parallelism.accounting import non_embedding_parameters
from parallelism.layout import DeviceKind, Layout
from parallelism.models.base import ModelConfig
from parallelism.training import TrainingConfig

LARGEST_KAPLAN = 125e6
GPT3_RATES = (
    (125e6, 6.0e-4),
    (350e6, 3.0e-4),
    (760e6, 2.5e-4),
    (1.3e9, 2.0e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1.0e-4),
    (175e9, 0.6e-4),
)
"""(parameters, peak learning rate) of Brown et al. 2020, table 2.1."""

FEWEST_STEPS = 100
"""A schedule needs some steps to act: the batch is made smaller until a budget gives at least this many."""

MICRO_BATCH_TOKENS = {"cpu": 2048, "gpu": 16384}
"""Tokens in a forward pass beyond which matrices do not get faster and only memory grows."""


def learning_rate(parameters: float) -> float:
    """Peak rate of Adam for a model of ``parameters`` (without embeddings).

    Up to 125M: lr = 0.003239 - 0.0001395·ln N (Kaplan et al. 2020, equation D.1, stated for small models and not
    valid for large ones). Above: Brown et al. 2020, table 2.1, interpolated in log-log and constant beyond its end.

    The formula was found with batches of half a million tokens. Whether it holds for the small budgets of a laptop was
    tried with Llama-style models on Python's standard library, batches by :func:`global_batch`, rates a factor of two
    apart: at 1e12 FLOPs the best were 0.8e-3, 0.9e-3 and 2.1e-3 for 0.4M, 1.8M and 6.4M parameters, at 1e13 FLOPs
    1.7e-3, 0.9e-3 and 0.5e-3; the rates that this function gives (1.4e-3, 1.2e-3, 1.05e-3) cost less than 0.1 nats
    against the best. Step Law's own rate, 1.79·N^-0.713·D^0.307, was two to eight times too high for the two smaller.
    """
    if parameters <= LARGEST_KAPLAN:
        return 0.003239 - 0.0001395 * math.log(parameters)
    sizes = [size for size, _ in GPT3_RATES]
    upper = bisect.bisect_left(sizes, parameters)
    if upper == len(sizes):
        return GPT3_RATES[-1][1]
    (low, low_rate), (high, high_rate) = GPT3_RATES[upper - 1], GPT3_RATES[upper]
    share = math.log(parameters / low) / math.log(high / low)
    return low_rate * (high_rate / low_rate) ** share


def global_batch(tokens: float, sequence_length: int) -> int:
    """Sequences per step for a run of ``tokens``: a power of two.

    B = 0.58·D^0.571 tokens (Li et al. 2025, "Step Law"), and never so many that the budget gives fewer than
    :data:`FEWEST_STEPS` steps.
    """
    wanted = 0.58 * tokens**0.571 / sequence_length
    most = tokens / sequence_length / FEWEST_STEPS
    return int(2 ** max(0, math.floor(math.log2(max(1.0, min(wanted, most))))))


def micro_batches(global_batch_size: int, data: int) -> list[int]:
    """Micro-batches that divide a data rank's share of the batch, largest first."""
    share = max(1, global_batch_size // data)
    return [size for size in range(share, 0, -1) if share % size == 0]


def micro_batch(global_batch_size: int, layout: Layout, sequence_length: int, kind: DeviceKind) -> int:
    """The largest that :data:`MICRO_BATCH_TOKENS` allow; a pipeline also wants four micro-batches for every stage.

    That keeps its bubble below a quarter (Huang et al. 2019, GPipe: negligible from 4 × stages on). The planner, which
    knows the memory, tries all of :func:`micro_batches` instead. The lean engine takes the whole share at once.
    """
    share = max(1, global_batch_size // layout.data)
    if layout.engine == "lean":
        return share
    most = max(1, MICRO_BATCH_TOKENS[kind] // sequence_length)
    if layout.pipeline > 1:
        most = max(1, min(most, share // (4 * layout.pipeline)))
    return next(size for size in micro_batches(global_batch_size, layout.data) if size <= most)


def resolve_training(
    training: TrainingConfig, config: ModelConfig, layout: Layout, sequence_length: int, tokens: float, kind: DeviceKind
) -> TrainingConfig:
    """``training`` without any ``auto``, for a run of about ``tokens`` tokens.

    The global batch by rule is rounded to what the layout and a given micro-batch need. Raises ``ValueError`` where a
    given micro-batch does not divide a given global batch.
    """
    sequences = training.global_batch
    if sequences == "auto":
        unit = layout.data * (training.micro_batch if isinstance(training.micro_batch, int) else 1)
        unit *= layout.pipeline if layout.virtual_pipeline > 1 else 1
        sequences = max(1, global_batch(tokens, sequence_length) // unit) * unit
    micro = training.micro_batch
    if micro == "auto":
        micro = micro_batch(sequences, layout, sequence_length, kind)
    rate = training.learning_rate
    if rate == "auto":
        rate = learning_rate(non_embedding_parameters(config))
    precision = training.precision
    if precision == "auto":
        precision = "bf16" if kind == "gpu" and layout.engine != "lean" else "fp32"
    update = {"global_batch": sequences, "micro_batch": micro, "learning_rate": rate, "precision": precision}
    return TrainingConfig.model_validate(training.model_dump() | update)
