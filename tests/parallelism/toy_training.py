"""A trainer around a tiny real engine (linear regression with Adam and noise) whose faults can be planned."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallelism.budget import Budget, Burnt, Progress, Stopwatch
from parallelism.checkpoint_files import CheckpointError
from parallelism.checkpoint_store import CheckpointStore, Metrics, read_info
from parallelism.checkpoints import Checkpoints, Start
from parallelism.engines.base import StepResult
from parallelism.feed import Feed
from parallelism.instruments import Instruments
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.result import TrainResult
from parallelism.stop import StopRequest
from parallelism.trainer import StepCost, Trainer
from parallelism.training import CheckpointPolicy, TrainingConfig, TrainTask
from parallelism.watchdog import Watchdog

LENGTH, GLOBAL_BATCH, MICRO_BATCH = 8, 8, 2
STEP_TOKENS = LENGTH * GLOBAL_BATCH
COST = StepCost(GLOBAL_BATCH, STEP_TOKENS, 5e6)
MODEL = GPTConfig(layers=1, hidden=8, heads=2, vocab_size=50)


def toy_task(root: Path, **fields: Any) -> TrainTask:
    """Twenty steps on one rank, a checkpoint every five, in the foreground."""
    defaults: dict[str, Any] = {
        "budget": Budget(tokens=20 * STEP_TOKENS + 13),
        "layout": Layout(),
        "checkpoint": CheckpointPolicy(steps=5, asynchronous=False),
        "evaluations": 0,
        "evaluation_tokens": 4 * LENGTH,
    }
    training = TrainingConfig(
        global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, learning_rate=0.05, precision="fp32", warmup_fraction=0.2
    )
    return TrainTask(
        name="toy",
        seed=5,
        model=MODEL,
        training=training,
        data_dir="unused",
        sequence_length=LENGTH,
        checkpoint_dir=str(root),
        **(defaults | fields),
    )


class MadeRows:
    """Rows that follow from their position alone; remembers which were asked for."""

    def __init__(self, samples_per_epoch: int = 1000) -> None:
        self.samples_per_epoch = samples_per_epoch
        self.asked: list[int] = []

    def rows(self, positions: Any) -> np.ndarray:
        self.asked += list(positions)
        return np.stack([np.random.default_rng(position).integers(0, 50, LENGTH + 1) for position in positions])


def collate(rows: np.ndarray) -> dict[str, torch.Tensor]:
    return {"rows": torch.from_numpy(rows)}


class ToyEngine:
    """Predicts the last token from the others; noise on the inputs makes the random state matter."""

    def __init__(self, task: TrainTask, before_step: Callable[[int], None] = lambda step: None) -> None:
        self.layout, self.config, self.seed = task.layout, task.model, task.seed
        self.data_rank = dist.get_rank()
        self.before_step = before_step
        self.steps = 0
        self.rates: list[float] = []
        self.loss_factor = 1.0
        torch.manual_seed(task.seed)
        self.model = torch.nn.Linear(LENGTH, 1)
        self.adam = torch.optim.Adam(self.model.parameters())

    def _loss(self, batch: dict[str, torch.Tensor], noise: float) -> torch.Tensor:
        inputs = batch["rows"][:, :-1].float() / 50
        inputs = inputs + noise * torch.randn_like(inputs) if noise else inputs
        return ((self.model(inputs)[:, 0] - batch["rows"][:, -1] / 50) ** 2).mean() * self.loss_factor

    def train_step(self, micro_batches: list[dict[str, torch.Tensor]], learning_rate: float) -> StepResult:
        self.before_step(self.steps + 1)
        self.rates.append(learning_rate)
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.zero_grad()
        loss = torch.stack([self._loss(batch, noise=0.1) for batch in micro_batches]).mean() / dist.get_world_size()
        loss.backward()
        for parameter in self.model.parameters():
            dist.all_reduce(parameter.grad)
        total = loss.detach().clone()
        dist.all_reduce(total)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters()])
        self.adam.step()
        self.steps += 1
        return StepResult(float(total), float(norm))

    @torch.no_grad()
    def evaluate(self, micro_batches: list[dict[str, torch.Tensor]]) -> float:
        total = torch.stack([self._loss(batch, noise=0.0) for batch in micro_batches]).mean()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "adam": self.adam.state_dict(), "random": torch.get_rng_state()}

    def restore(self, state: dict[str, Any], step: int) -> None:
        self.model.load_state_dict(state["model"])
        self.adam.load_state_dict(state["adam"])
        torch.set_rng_state(state["random"])
        self.steps = step


@dataclass
class ToySaver:
    """Writes the toy's state; in the background it is on its way until ``polls`` calls of :meth:`poll`.

    ``faults`` counts down the writes that fail: at the hand-over, or in the background.
    """

    faults: int = 0
    polls: int = 2
    wrote: list[int] = field(default_factory=list)
    _pending: tuple[Path, int] | None = None
    _left: int = 0

    def save(self, engine: Any, progress: Progress, directory: Path) -> object:
        self.start(engine, progress, directory)
        return self.wait()

    def start(self, engine: Any, progress: Progress, directory: Path) -> object:
        assert self._pending is None, "one write at a time"
        torch.save(engine.state(), directory / f"rank{dist.get_rank()}.pt")
        self._pending, self._left = (directory, progress.step), self.polls
        return None

    def poll(self) -> object | None:
        self._left -= 1
        return self.wait() if self._left <= 0 else None

    def wait(self) -> object:
        assert self._pending is not None
        directory, step = self._pending
        self._pending = None
        if self.faults:
            self.faults -= 1
            raise CheckpointError("no space left on device")
        self.wrote.append(step)
        return directory

    def close(self) -> None:
        self._pending = None


class Toy:
    """One attempt: engine, saver, reports and the trainer that uses them."""

    def __init__(self, task: TrainTask, saver: ToySaver | None = None, engine: ToyEngine | None = None) -> None:
        self.task = task
        self.saver = saver or ToySaver()
        self.engine = engine or ToyEngine(task)
        self.rows, self.held_out = MadeRows(), MadeRows()
        self.stop = StopRequest()
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda kind, fields: None

    def report(self, kind: str, fields: dict[str, Any]) -> None:
        self.events.append((kind, fields))
        self.on_event(kind, fields)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for found, fields in self.events if found == kind]

    def train(self) -> TrainResult:
        task = self.task
        start = Start(Progress(), Metrics(), None)
        if task.resume_from:
            info = read_info(task.resume_from)
            self.engine.restore(torch.load(info.path / f"rank{dist.get_rank()}.pt"), info.step)
            start = Start(info.progress, info.metrics, str(info.path))
        store = CheckpointStore(task.checkpoint_dir)
        earlier = Burnt(task.burnt_device_seconds, task.burnt_wall_seconds)
        with Watchdog(task.stall_seconds, dist.get_rank(), self.report) as watchdog:
            return Trainer(
                task=task,
                engine=self.engine,  # type: ignore[arg-type]
                feed=self._feed(self.rows),
                validation=self._feed(self.held_out),
                checkpoints=Checkpoints(task, self.engine, store, self.saver, self.report, start),  # type: ignore[arg-type]
                start=start,
                cost=COST,
                instruments=Instruments(Stopwatch(dist.get_world_size(), earlier), peak_flops=1e9),
                watchdog=watchdog,
                report=self.report,
                stop=self.stop,
            ).train()

    def _feed(self, rows: MadeRows) -> Feed:
        return Feed(rows, collate, MICRO_BATCH, self.task.layout.data, self.engine.data_rank)


def after_step(step: int, action: Callable[[], None]) -> Callable[[str, dict[str, Any]], None]:
    """An event listener that acts when this step has been reported."""

    def listen(kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == step:
            action()

    return listen


def slow(seconds: float) -> Callable[[int], None]:
    """Makes every step take this long."""
    return lambda step: time.sleep(seconds)
