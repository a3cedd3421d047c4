"""The fixed compute budget of one candidate's lineage, and the ledger of what has been spent. Torch-free.

``flops`` and ``tokens`` count *progress* (what is in the trained model): a restart does not change the result.
``device_hours``, ``wall_clock`` and ``cost`` count what was *burnt* (everything consumed, lost work included).
"""

import time
from dataclasses import dataclass, field
from typing import Literal, get_args

from pydantic import Field, model_validator

from parallelism.options import Options

Unit = Literal["flops", "tokens", "device_hours", "wall_clock", "cost"]
UNITS: tuple[Unit, ...] = get_args(Unit)
PROGRESS_UNITS: frozenset[str] = frozenset({"flops", "tokens"})


class Budget(Options):
    """Exactly one limit. Units: FLOPs, tokens, device-hours, seconds of wall-clock, currency of the price."""

    flops: float | None = Field(default=None, gt=0)
    tokens: float | None = Field(default=None, gt=0)
    device_hours: float | None = Field(default=None, gt=0)
    wall_clock: float | None = Field(default=None, gt=0, description="seconds")
    cost: float | None = Field(default=None, gt=0, description="needs execution.price_per_device_hour")

    @model_validator(mode="after")
    def _exactly_one(self) -> "Budget":
        given = [unit for unit in UNITS if getattr(self, unit) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"give exactly one of flops, tokens, device_hours, wall_clock, cost (found: {found})")
        return self

    @property
    def unit(self) -> Unit:
        """The one unit that is limited."""
        return next(unit for unit in UNITS if getattr(self, unit) is not None)

    @property
    def limit(self) -> float:
        """The limit, in :attr:`unit`."""
        return float(getattr(self, self.unit))

    @property
    def counts_progress(self) -> bool:
        """True when a restart does not use up any of it."""
        return self.unit in PROGRESS_UNITS

    def share(self, fraction: float) -> "Budget":
        """The same unit with ``fraction`` of the limit."""
        return Budget(**{self.unit: self.limit * fraction})


@dataclass
class Progress:
    """What is in the trained model; stored in the checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0

    def advanced(self, samples: int, tokens: int, flops: float) -> "Progress":
        """Progress after one more optimizer step."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens, self.flops + flops)


@dataclass
class Burnt:
    """Everything consumed, lost work included; kept in the journal, summed over attempts."""

    device_seconds: float = 0.0
    wall_seconds: float = 0.0

    def cost(self, price_per_device_hour: float) -> float:
        """Money spent at the given price."""
        return self.device_seconds / 3600.0 * price_per_device_hour


class Stopwatch:
    """What a process group burns: earlier attempts plus everything since: start-up, evaluation, checkpoints."""

    def __init__(self, devices: int, earlier: Burnt) -> None:
        self._devices = devices
        self._earlier = earlier
        self._started = time.monotonic()

    def burnt(self) -> Burnt:
        """Consumed up to now; every device of the group counts for the whole time."""
        elapsed = time.monotonic() - self._started
        return Burnt(self._earlier.device_seconds + elapsed * self._devices, self._earlier.wall_seconds + elapsed)


@dataclass
class Ledger:
    """One candidate's account: progress and what was burnt, held against a budget."""

    budget: Budget
    price_per_device_hour: float = 0.0
    progress: Progress = field(default_factory=Progress)
    burnt: Burnt = field(default_factory=Burnt)

    def spent(self) -> float:
        """Amount used, in the budget's unit."""
        unit = self.budget.unit
        if unit == "flops":
            return self.progress.flops
        if unit == "tokens":
            return float(self.progress.tokens)
        if unit == "device_hours":
            return self.burnt.device_seconds / 3600.0
        if unit == "wall_clock":
            return self.burnt.wall_seconds
        return self.burnt.cost(self.price_per_device_hour)

    def fraction(self) -> float:
        """Share of the budget spent, 0 to 1."""
        return min(1.0, self.spent() / self.budget.limit)

    def step_fraction(self, tokens: int, flops: float) -> float:
        """The fraction that learning-rate schedules see for one more step: the middle of that step's share.

        Neither the first step (rate zero under warm-up) nor the last (rate zero after decay) is wasted so, whatever
        the number of steps. What a step costs on a clock is not known before, so there it is the fraction spent.
        """
        share = {"flops": flops, "tokens": float(tokens)}.get(self.budget.unit, 0.0)
        return min(1.0, (self.spent() + share / 2) / self.budget.limit)

    def allows_step(self, tokens: int, flops: float) -> bool:
        """Whether one more step may start: ``flops`` and ``tokens`` are never exceeded, clocks by at most that step."""
        if self.budget.unit == "flops":
            return self.progress.flops + flops <= self.budget.limit
        if self.budget.unit == "tokens":
            return self.progress.tokens + tokens <= self.budget.limit
        return self.spent() < self.budget.limit
