"""The training loop: one candidate under its budget, on every rank of its process group."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from parallelism import agreement
from parallelism.budget import Ledger
from parallelism.checkpoint_store import Metrics
from parallelism.checkpoints import Checkpoints, Start
from parallelism.engines.base import Engine, StepResult
from parallelism.feed import Feed
from parallelism.gradual import sparsity_at
from parallelism.instruments import Instruments
from parallelism.result import DivergedError, FinishReason, Report, TrainResult
from parallelism.schedule import learning_rate
from parallelism.stop import StopRequest
from parallelism.training import TrainTask
from parallelism.watchdog import Watchdog

REASONS: tuple[FinishReason, ...] = ("signal", "pause", "cancel", "budget")
"""From weak to strong: when ranks see different reasons to stop, the strongest counts."""


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step adds to the progress; FLOPs of forward and backward pass, without recomputation."""

    samples: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Decision:
    """What happens before and in the next step, the same on all ranks."""

    stop: FinishReason | None
    evaluations: int
    """Periodic evaluations that should have been done by now."""
    checkpoint: bool
    fraction: float
    """Where the learning-rate schedule stands for the next step."""


class Trainer:
    """Trains until the budget is spent or somebody asks to stop.

    Everything that influences later arithmetic comes from the task and the checkpoint, so that under a budget of
    ``flops`` or ``tokens`` an interrupted run ends with the same bits as an undisturbed one. Only rank 0 reads clocks.
    """

    def __init__(
        self,
        task: TrainTask,
        engine: Engine,
        feed: Feed,
        validation: Feed,
        checkpoints: Checkpoints,
        start: Start,
        cost: StepCost,
        instruments: Instruments,
        watchdog: Watchdog,
        report: Report,
        stop: StopRequest,
    ) -> None:
        self.task = task
        self.engine = engine
        self.feed = feed
        self.validation = validation
        self.checkpoints = checkpoints
        self.cost = cost
        self.instruments = instruments
        self.watchdog = watchdog
        self.report = report
        self.stop = stop
        self.metrics = start.metrics
        self.ledger = Ledger(task.budget, task.price_per_device_hour, start.progress, instruments.burnt())
        self._evaluated_step = -1
        self._sparsity = 0.0  # a resumed run prunes once more as far as it had, which changes nothing

    def train(self) -> TrainResult:
        """Run to the end of the budget, or to a checkpoint after a request to stop.

        Raises :class:`DivergedError` when loss or gradient norm is no longer finite, and
        :class:`parallelism.result.CheckpointError` when the last checkpoint cannot be written.
        """
        while True:
            # Periodic work, on the state after the last step
            self.checkpoints.poll()
            decision = self._decide()
            if decision.evaluations > self.metrics.evaluations:
                self._evaluate(decision.evaluations)
            if decision.checkpoint:
                self.checkpoints.write(self.ledger.progress, self._metrics_now())
            if decision.stop:
                return self._finish(decision.stop)
            self._prune(decision.fraction)

            # One optimizer step
            started = time.perf_counter()
            progress, cost = self.ledger.progress, self.cost
            batches = self.feed.micro_batches(progress.samples, cost.samples)
            rate = learning_rate(self.task.training, decision.fraction)
            result = self.engine.train_step(batches, rate)
            self._refuse_divergence(result)
            self.ledger.progress = progress.advanced(cost.samples, cost.tokens, cost.flops)
            self.metrics = self.metrics.model_copy(update={"train_loss": result.loss})
            self._report_step(result, rate, time.perf_counter() - started)

    def _decide(self) -> Decision:
        """Rank 0 decides on budget, evaluation and checkpoint; a request to stop counts on any rank."""
        reason: FinishReason | None = self.stop.reason
        ballot = [_strength(reason), -1.0, -1.0, -1.0]
        if dist.get_rank() == 0:
            self.ledger.burnt = self.instruments.burnt()
            if not self.ledger.allows_step(self.cost.tokens, self.cost.flops):
                reason = "budget"
            evaluations = 0 if reason else math.floor(self.ledger.fraction() * self.task.evaluations)
            checkpoint = not reason and self.checkpoints.due(self.ledger.progress.step)
            fraction = self.ledger.step_fraction(self.cost.tokens, self.cost.flops)
            ballot = [_strength(reason), evaluations, checkpoint, fraction]
        strength, evaluations_due, checkpoint_due, fraction = agreement.highest(ballot)
        stop = REASONS[int(strength)] if strength >= 0 else None
        return Decision(stop, int(evaluations_due), checkpoint_due > 0, fraction)

    def _prune(self, fraction: float) -> bool:
        """Prune as far as this part of the budget asks for; whether there was something to do."""
        sparsity = sparsity_at(self.task.training.prune, fraction)
        if sparsity <= self._sparsity:
            return False
        self.engine.prune(sparsity)
        self._sparsity = sparsity
        return True

    def _evaluate(self, count: int) -> None:
        """Report the loss on held-out samples, the same ones every time; ``count`` evaluations are then done."""
        progress = self.ledger.progress
        loss = self._validation_loss()
        self.metrics = self.metrics.model_copy(update={"validation_loss": loss, "evaluations": count})
        self._evaluated_step = progress.step
        self._tell("evaluation", step=progress.step, tokens=progress.tokens, flops=progress.flops, validation_loss=loss)
        self.watchdog.beat(progress.step, "training")

    def _validation_loss(self) -> float:
        """In portions of a training step's size, which bounds memory and lets the watchdog see progress."""
        layout, step = self.task.layout, self.ledger.progress.step
        # Interleaved pipelines take whole groups of micro-batches.
        groups = layout.pipeline if layout.virtual_pipeline > 1 else 1
        wanted = self.task.evaluation_tokens // self.task.sequence_length
        samples = self.validation.up_to(wanted, multiple=self.validation.smallest * groups)
        total, told = 0.0, time.monotonic()
        for first in range(0, samples, self.cost.samples):
            self.watchdog.beat(step, "evaluation")
            if time.monotonic() > told + self.task.stall_seconds / 4:
                self._tell("evaluating", step=step, done=first, samples=samples)
                told = time.monotonic()
            portion = min(self.cost.samples, samples - first)
            total += portion * self.engine.evaluate(self.validation.micro_batches(first, portion))
        return total / samples

    def _metrics_now(self) -> Metrics:
        return self.metrics.model_copy(update={"burnt": self.instruments.burnt()})

    def _refuse_divergence(self, result: StepResult) -> None:
        """The step has spoilt the weights: end before they reach a checkpoint."""
        if math.isfinite(result.loss) and math.isfinite(result.gradient_norm):
            return
        self.checkpoints.settle()
        step = self.ledger.progress.step + 1
        raise DivergedError(step, result.loss, result.gradient_norm, self.checkpoints.newest)

    def _finish(self, reason: FinishReason) -> TrainResult:
        progress = self.ledger.progress
        self.watchdog.beat(progress.step, "last checkpoint")
        if reason == "budget" and self._prune(1.0):  # the budget had no step at the ramp's end
            self.checkpoints.forget_newest()
        checkpoint = self.checkpoints.finish(progress, self._metrics_now())
        if reason == "budget" and self.task.evaluations and self._evaluated_step != progress.step:
            self._evaluate(self.task.evaluations)
        peak, baseline = self.instruments.peak_memory()
        self.ledger.burnt = self.instruments.burnt()
        result = TrainResult(
            reason=reason,
            progress=progress,
            burnt=self.ledger.burnt,
            checkpoint=checkpoint,
            train_loss=self.metrics.train_loss,
            validation_loss=self.metrics.validation_loss,
            peak_memory_bytes=peak,
            baseline_memory_bytes=baseline,
        )
        facts = result.model_dump(exclude={"progress", "burnt"})
        self._tell(
            "finished", **asdict(progress), **asdict(self.ledger.burnt), **facts, fraction=self.ledger.fraction()
        )
        return result

    def _report_step(self, result: StepResult, rate: float, seconds: float) -> None:
        self.ledger.burnt = self.instruments.burnt()
        progress = self.ledger.progress
        self.watchdog.stepped(progress.step)
        self._tell(
            "step",
            **asdict(progress),
            loss=result.loss,
            learning_rate=rate,
            gradient_norm=result.gradient_norm,
            seconds=seconds,
            tokens_per_second=self.cost.tokens / seconds,
            mfu=self.instruments.mfu(self.cost.flops, seconds),
            fraction=self.ledger.fraction(),
            device_seconds=self.ledger.burnt.device_seconds,
        )

    def _tell(self, kind: str, **fields: Any) -> None:
        if dist.get_rank() == 0:
            self.report(kind, fields)


def _strength(reason: FinishReason | None) -> float:
    return float(REASONS.index(reason)) if reason else -1.0
