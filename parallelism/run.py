"""One candidate's training on one rank: :func:`run_task`, or ``torchrun … -m parallelism.run TASK.json``.

What is reported, as (kind, fields); training facts come from rank 0:

- ``start`` {step, resumed_from, parameters, flops_per_token, world_size}
- ``step`` {step, samples, tokens, flops, loss, learning_rate, gradient_norm, seconds, tokens_per_second, mfu, fraction,
  device_seconds}: totals of the progress; rate, norm and speed of this step
- ``evaluating`` {step, done, samples}: a long evaluation is alive
- ``evaluation`` {step, tokens, flops, validation_loss}
- ``committing`` {step}: all that was said so far is in the checkpoint that is declared complete next
- ``checkpoint`` {step, path, stall_seconds, write_seconds, asynchronous, device_seconds}: burnt by all process groups
  when the state was taken
- ``checkpoint_failed`` {step, error, attempt}
- ``finished`` {reason, step, samples, tokens, flops, device_seconds, wall_seconds, fraction, checkpoint, train_loss,
  validation_loss, peak_memory_bytes, baseline_memory_bytes}
- ``stalled`` {step, doing, seconds, rank}: from any rank, which then ends with ``STALLED_EXIT_CODE``
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from parallelism import checkpoint, device
from parallelism.accounting import train_flops_per_sequence
from parallelism.budget import Burnt, Ledger, Progress, Stopwatch
from parallelism.checkpoint_store import CheckpointStore, Metrics, read_info, read_model
from parallelism.checkpoints import Checkpoints, FileSaver, Start
from parallelism.data.batches import TokenBatches
from parallelism.data.prepared import Split
from parallelism.engines.base import Engine
from parallelism.feed import Feed
from parallelism.instruments import Instruments, measured_peak_flops
from parallelism.registry import ENGINES, FAMILIES, load
from parallelism.result import DivergedError, LastCheckpointError, Report, TrainResult
from parallelism.start import check_start
from parallelism.stop import StopRequest
from parallelism.trainer import StepCost, Trainer
from parallelism.training import TrainTask
from parallelism.watchdog import Watchdog


def run_task(task: TrainTask, report: Report, stop: StopRequest) -> TrainResult:
    """Train one candidate; called on every rank after :func:`parallelism.device.connect`.

    Raises ``ValueError`` for a task that cannot run, and what :meth:`parallelism.trainer.Trainer.train` raises.
    """
    check_task(task, dist.get_world_size())
    stopwatch = Stopwatch(dist.get_world_size(), Burnt(task.burnt_device_seconds, task.burnt_wall_seconds))
    instruments = Instruments(stopwatch, measured_peak_flops(task.training.precision))
    with Watchdog(task.stall_seconds, dist.get_rank(), report) as watchdog, closing(FileSaver()) as saver:
        cost = step_cost(task)
        engine: Engine = load(ENGINES[task.layout.engine].implementation)(task)
        watchdog.beat(0, "loading")
        start = _start(task, engine)
        store = CheckpointStore(task.checkpoint_dir)
        if dist.get_rank() == 0:
            store.remove_incomplete(task.epoch)
            report("start", _start_fields(task, start, cost))
        watchdog.beat(start.progress.step, "training")
        trainer = Trainer(
            task=task,
            engine=engine,
            feed=_feed(task, engine, "train"),
            validation=_feed(task, engine, "validation"),
            checkpoints=Checkpoints(task, engine, store, saver, report, start),
            start=start,
            cost=cost,
            instruments=instruments,
            watchdog=watchdog,
            report=report,
            stop=stop,
        )
        return trainer.train()


def check_task(task: TrainTask, world_size: int) -> None:
    """Raise ``ValueError`` for a task that cannot run on this process group."""
    layout, training = task.layout, task.training
    if layout.engine not in ENGINES:
        raise ValueError(f"layout.engine {layout.engine!r} is unknown: available are {', '.join(sorted(ENGINES))}")
    if layout.world_size != world_size:
        raise ValueError(
            f"layout {layout} needs {layout.world_size} ranks, but the process group has {world_size}: "
            "change the layout or start that many"
        )
    for field in ("global_batch", "micro_batch", "learning_rate", "precision"):
        if getattr(training, field) == "auto":
            raise ValueError(f"training.{field} is auto: give a value (parallelism.rules.resolve_training finds one)")
    cost = step_cost(task)
    assert isinstance(training.micro_batch, int)
    if cost.samples % (training.micro_batch * layout.data):
        raise ValueError(
            f"training.global_batch {cost.samples} is not a multiple of micro_batch {training.micro_batch} × "
            f"layout.data {layout.data}: change one of them"
        )
    if task.budget.counts_progress and not Ledger(task.budget).allows_step(cost.tokens, cost.flops):
        needed = cost.flops if task.budget.unit == "flops" else cost.tokens
        raise ValueError(
            f"budget.{task.budget.unit} {task.budget.limit:g} is smaller than one step, which takes {needed:g}: "
            "raise it or lower training.global_batch"
        )
    check_start(task.start, task.model, layout)
    _check_teacher(task)
    if task.budget.unit == "cost" and not task.price_per_device_hour:
        raise ValueError("budget.cost needs price_per_device_hour: give the price, or a budget in another unit")


def step_cost(task: TrainTask) -> StepCost:
    """What one optimizer step adds to the progress; a teacher's forward pass is part of it.

    Raises ``ValueError`` where the teacher is no complete checkpoint.
    """
    samples = task.training.global_batch
    assert isinstance(samples, int)
    named = task.start.teacher if task.start is not None else None
    teacher = read_info(named).model if named is not None else None
    flops = train_flops_per_sequence(task.model, task.sequence_length, teacher)
    return StepCost(samples, samples * task.sequence_length, samples * flops)


def _check_teacher(task: TrainTask) -> None:
    if task.start is None or task.start.teacher is None:
        return
    teacher = read_info(task.start.teacher).model
    if (teacher.family, teacher.vocab_size) != (task.model.family, task.model.vocab_size):
        raise ValueError(
            f"start.teacher {task.start.teacher} is of family {teacher.family} with {teacher.vocab_size} tokens, the "
            f"model of family {task.model.family} with {task.model.vocab_size}: name its dense parent"
        )
    if teacher.context < task.sequence_length:
        raise ValueError(
            f"start.teacher {task.start.teacher} accepts {teacher.context} tokens: lower sequence_length "
            f"{task.sequence_length} to that"
        )


def _start(task: TrainTask, engine: Engine) -> Start:
    if task.resume_from is None:
        if task.start is not None:
            checkpoint.load_weights(engine, read_info(task.start.weights).path)
        return Start(Progress(), Metrics(), None)
    info = read_info(task.resume_from)
    return Start(checkpoint.load(engine, info.path), info.metrics, str(info.path))


def _start_fields(task: TrainTask, start: Start, cost: StepCost) -> dict[str, Any]:
    return {
        "step": start.progress.step,
        "resumed_from": start.checkpoint,
        "parameters": task.model.parameter_count(),
        "flops_per_token": cost.flops / cost.tokens,
        "world_size": task.layout.world_size,
    }


def _feed(task: TrainTask, engine: Engine, split: Split) -> Feed:
    assert isinstance(task.training.micro_batch, int)
    source = TokenBatches(task.data_dir, split, task.sequence_length, task.seed)
    collate = load(FAMILIES[task.model.family].sharded).collate
    return Feed(source, collate, task.training.micro_batch, task.layout.data, engine.data_rank)


def read_task(path: str | Path) -> TrainTask:
    """A task from its JSON file. Raises ``ValueError`` for one that is not valid, ``OSError`` for no file."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ValueError(f"{path}: a task is a JSON object with a model in it")
    return TrainTask.model_validate({**document, "model": read_model(document["model"])})


def continued(task: TrainTask) -> TrainTask:
    """The task, going on from the newest complete checkpoint under its ``checkpoint_dir`` in an epoch of its own.

    What was burnt between that checkpoint and the end of the earlier run is not known here; a launcher knows it.
    """
    newest = CheckpointStore(task.checkpoint_dir).newest()
    if newest is None:
        return task
    earlier = newest.metrics.burnt
    return task.model_copy(
        update={
            "resume_from": str(newest.path),
            "epoch": max(task.epoch, newest.epoch + 1),
            "burnt_device_seconds": max(task.burnt_device_seconds, earlier.device_seconds),
            "burnt_wall_seconds": max(task.burnt_wall_seconds, earlier.wall_seconds),
        }
    )


def main() -> int:
    """Run a task under torchrun, every rank printing what it reports as JSON lines."""
    parser = argparse.ArgumentParser(prog="python -m parallelism.run", description=main.__doc__)
    parser.add_argument("task", type=Path, help="a TrainTask as JSON")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="from the newest complete checkpoint")
    arguments = parser.parse_args()
    stop = StopRequest()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.request("signal"))
    try:
        task = read_task(arguments.task)
        task = continued(task) if arguments.go_on else task
        with _process_group(task):
            run_task(task, _print_line, stop)
    except (ValueError, OSError, DivergedError, LastCheckpointError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


@contextmanager
def _process_group(task: TrainTask) -> Iterator[None]:
    """The process group whose ranks torchrun has started; torchrun's agent hosts the rendezvous."""
    if "RANK" not in os.environ:
        raise ValueError(
            "start this with torchrun, for example: torchrun --nproc-per-node 2 -m parallelism.run TASK.json"
        )
    store, rank, world_size = next(rendezvous("env://"))
    device.connect(
        rank,
        world_size,
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        threads=task.threads_per_rank,
        timeout_seconds=task.stall_seconds,
        local_rank=int(os.environ["LOCAL_RANK"]),
        store=store,
    )
    yield
    device.disconnect()


def _print_line(kind: str, fields: dict[str, Any]) -> None:
    print(json.dumps({"event": kind, **fields}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
