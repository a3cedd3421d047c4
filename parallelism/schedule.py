"""Learning-rate schedules: pure functions of the fraction of the budget spent. Torch-free.

They never see a step count, so that a run goes on where it stood after a restart, at another batch size, or under a
clock budget whose number of steps nobody knows.
"""

import math
from collections.abc import Callable

from parallelism.training import TrainingConfig


def learning_rate(training: TrainingConfig, fraction: float) -> float:
    """The learning rate at ``fraction`` (0 to 1) of the budget: warm-up from zero, then the schedule.

    The peak is ``training.learning_rate`` (which must be resolved), the end ``final_learning_rate_fraction`` of it.
    """
    assert not isinstance(training.learning_rate, str), "learning_rate: auto must be resolved before training"
    if fraction < training.warmup_fraction:
        return training.learning_rate * fraction / training.warmup_fraction
    decayed = SCHEDULES[training.schedule](training, min(1.0, fraction))
    final = training.final_learning_rate_fraction
    return training.learning_rate * (final + (1.0 - final) * decayed)


def _cosine(training: TrainingConfig, fraction: float) -> float:
    """Loshchilov & Hutter, SGDR (ICLR 2017), equation 5, without restarts."""
    return 0.5 * (1.0 + math.cos(math.pi * _since(training.warmup_fraction, fraction)))


def _linear(training: TrainingConfig, fraction: float) -> float:
    return 1.0 - _since(training.warmup_fraction, fraction)


def _warmup_stable_decay(training: TrainingConfig, fraction: float) -> float:
    """Hu et al., MiniCPM (2024), with the linear decay of Hägele et al. (NeurIPS 2024), section 3."""
    return 1.0 - _since(max(training.warmup_fraction, 1.0 - training.decay_fraction), fraction)


def _constant(training: TrainingConfig, fraction: float) -> float:
    return 1.0


def _since(start: float, fraction: float) -> float:
    """Share of the stretch from ``start`` to the end of the budget that lies behind ``fraction``."""
    return max(0.0, fraction - start) / (1.0 - start)


SCHEDULES: dict[str, Callable[[TrainingConfig, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _warmup_stable_decay,
    "constant": _constant,
}
"""Name → how much of the way from final to peak learning rate is left (1 to 0) at a fraction past the warm-up."""
