"""Small real rank functions for tests of worker groups: they do what a trainer does, without a model."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from parallelism.budget import Burnt, Progress, Stopwatch
from parallelism.result import DivergedError, TrainResult
from parallelism.stop import StopRequest
from parallelism.training import TrainTask

Say = Any
STEP_SECONDS = 0.02


def count(task: dict[str, Any], report: Say, stop: StopRequest) -> dict[str, Any]:
    """Count to ``task["steps"]``, or until asked to stop."""
    step = 0
    while step < task["steps"] and not stop.reason:
        step += 1
        report("step", {"step": step})
        time.sleep(task.get("seconds", 0.0))
    return {"step": step, "reason": stop.reason, "threads": os.environ.get("OMP_NUM_THREADS")}


def add_up(task: dict[str, Any], report: Say, stop: StopRequest) -> float:
    """The sum of all ranks, by a collective."""
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return float(total) * task["factor"] + torch.get_num_threads() / 1000


def variable(task: dict[str, Any], report: Say, stop: StopRequest) -> str | None:
    """What an environment variable holds."""
    return os.environ.get(task["name"])


def fail(task: dict[str, Any], report: Say, stop: StopRequest) -> None:
    """The rank in process ``task["pid"]`` raises; the others work on."""
    if os.getpid() == task["pid"]:
        raise ValueError("training.learning_rate 9 is too high: lower it")
    time.sleep(60)


def unreadable(task: dict[str, Any], report: Say, stop: StopRequest) -> None:
    """Raise an error that cannot be carried to another process."""

    class LocalError(RuntimeError):
        def __init__(self, left: str, right: str) -> None:
            super().__init__(f"{left} and {right}")

    raise LocalError("this", "that")


def shout(task: dict[str, Any], report: Say, stop: StopRequest) -> None:
    """Write to both outputs."""
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)


def pretend_to_train(task: TrainTask, report: Say, stop: StopRequest) -> TrainResult:
    """A trainer whose "model" is the sum of its step numbers, in checkpoints that are real ones.

    A task named ``diverges-at-N`` does so; other faults come from outside, by signals.
    """
    from parallelism.checkpoint_store import CheckpointStore, read_info

    earlier = Burnt(task.burnt_device_seconds, task.burnt_wall_seconds)
    store, watch = CheckpointStore(task.checkpoint_dir), Stopwatch(1, earlier)
    info = read_info(task.resume_from) if task.resume_from else None
    progress = info.progress if info else Progress()
    total = int((info.path / "sum").read_text()) if info else 0
    report("start", {"step": progress.step, "resumed_from": task.resume_from, "parameters": 7, "world_size": 1})
    path = info.path if info else None
    while progress.tokens < task.budget.limit and not stop.reason:
        progress = progress.advanced(1, 1, 10.0)
        total += progress.step
        time.sleep(STEP_SECONDS)
        if task.name.startswith("diverges-at-") and progress.step == int(task.name.rpartition("-")[2]):
            raise DivergedError(progress.step, float("nan"), 1.0, None)
        report("step", {"step": progress.step, "loss": 1 / progress.step, "tokens": progress.tokens, "flops": 0.0})
        if progress.step % (task.checkpoint.steps or 10) == 0:
            path = _save(store, task, progress, total, watch.burnt())
            report("checkpoint", _facts(progress.step, path, watch))
    if path is None or not path.name.endswith(f"{progress.step:08d}"):
        path = _save(store, task, progress, total, watch.burnt())
        report("checkpoint", _facts(progress.step, path, watch))
    reason = stop.reason or "budget"
    report("finished", {"reason": reason, "step": progress.step})
    return TrainResult(
        reason=reason,
        progress=progress,
        burnt=Burnt(task.burnt_device_seconds, task.burnt_wall_seconds),
        checkpoint=str(path),
        train_loss=1.0,
        validation_loss=2.0,
        peak_memory_bytes=0,
        baseline_memory_bytes=0,
    )


def _save(store: Any, task: TrainTask, progress: Progress, total: int, burnt: Burnt) -> Path:
    from parallelism.checkpoint_store import Metrics

    directory = store.directory(task.epoch, progress.step)
    store.prepare(directory)
    (directory / "sum").write_text(str(total))
    (directory / "task.json").write_text(json.dumps(task.model_dump(mode="json")))
    store.commit(directory, task, progress, Metrics(burnt=burnt))
    store.keep_newest(task.checkpoint.keep)
    return directory


def _facts(step: int, path: Path, watch: Stopwatch) -> dict[str, Any]:
    return {"step": step, "path": str(path), "device_seconds": watch.burnt().device_seconds}
