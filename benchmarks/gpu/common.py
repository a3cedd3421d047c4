"""What the parts of the GPU benchmark share: processes with and without the GPU, tasks, batches."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

GIB = 2**30
SEED = 1234


def apart(function: Callable[..., Any], *arguments: Any, gpu: bool = True, threads: int = 4) -> "Future[Any]":
    """Run a function of a module in a fresh process; ``gpu=False`` hides the GPUs from it."""
    pool = ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(gpu, threads, os.getpid())
    )
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


def _begin(gpu: bool, threads: int, parent: int) -> None:
    """Before torch is imported; a process that outlived its parent would disturb what is measured next."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from parallelism.device import die_with_parent

    die_with_parent(parent)


def threads() -> int:
    """What :func:`apart` gave this process."""
    return int(os.environ["OMP_NUM_THREADS"])


def connect() -> None:
    """Make this process the only rank of its group."""
    from parallelism import device

    store = device.host_store()
    device.connect(0, 1, "127.0.0.1", store.port, threads=threads(), store=store)


def make_task(model: Any, **fields: Any) -> Any:
    """A task on one rank; ``training`` and ``layout`` are dictionaries, ``work`` is where data and checkpoints lie."""
    from parallelism.budget import Budget
    from parallelism.layout import Layout
    from parallelism.training import TrainingConfig, TrainTask

    work = fields.pop("work", "unused")
    defaults: dict[str, Any] = {
        "name": "gpu",
        "seed": SEED,
        "layout": Layout(**fields.pop("layout", {})),
        "training": TrainingConfig(**{"learning_rate": 1e-4, "schedule": "constant"} | fields.pop("training")),
        "budget": Budget(tokens=1e12),
        "data_dir": f"{work}/data",
        "checkpoint_dir": f"{work}/checkpoints",
        "sequence_length": model.context,
        "threads_per_rank": threads(),
    }
    return TrainTask(model=model, **defaults | fields)


def make_engine(task: Any) -> Any:
    """The engine that the task's layout names."""
    from parallelism.registry import ENGINES, load

    return load(ENGINES[task.layout.engine].implementation)(task)


def made_batches(task: Any, generator: Any) -> list[Any]:
    """One step's micro-batches of random tokens."""
    from parallelism.models.gpt.sharded import collate

    rows, length = task.training.micro_batch, task.sequence_length
    shape = (rows, length + 1)
    count = task.training.global_batch // rows
    return [collate(generator.integers(0, task.model.vocab_size, shape)) for _ in range(count)]


@contextmanager
def quick_start_weights() -> Any:
    """Draw start weights on the device, where their values are of no account: on the host 1.6 billion take long."""
    from unittest.mock import patch

    def fill(chunks: Any, seed: int, std: float, layers: int) -> None:
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.normal_(0.0, std) if parameter.ndim > 1 else parameter.data.fill_(1.0)

    with patch("parallelism.engines.megatron.initialize", fill):
        yield


def forget(compiled: bool = False) -> None:
    """Give back what engines have left behind; ``compiled``: kernels too, before others are made for other shapes."""
    import torch

    gc.collect()
    if compiled:
        torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the device has done it, and the result."""
    synchronize()
    started = time.perf_counter()
    result = action()
    synchronize()
    return time.perf_counter() - started, result
