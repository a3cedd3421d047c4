"""Checkpoints of a run on a GPU: continued there bit for bit, and read on the CPU."""

import hashlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import SEED, apart, connect, forget, made_batches, make_engine, make_task

STEPS, CHECKPOINT_STEP = 20, 10
MODELS: dict[str, dict[str, Any]] = {
    "gpt2 with dropout": {"style": "gpt2", "layers": 8, "hidden": 512, "heads": 8, "dropout": 0.1},
    "llama": {"style": "llama", "layers": 8, "hidden": 512, "heads": 8, "kv_heads": 2},
}
SMALL = {"layers": 2, "hidden": 64, "heads": 4}


def measure(tiny: bool) -> dict[str, Any]:
    """Both models, at the same time."""
    with ThreadPoolExecutor() as pool:
        resumed = list(pool.map(lambda name: resume_case(name, tiny), MODELS))
    return {"resumed": resumed, "passed": all(row["passed"] for row in resumed)}


def resume_case(name: str, tiny: bool) -> dict[str, Any]:
    """A run of 20 steps, and another process that continues it from step 10."""
    work = Path(tempfile.mkdtemp(prefix="gpu-checkpoint-"))
    try:
        prepare_data(work, 64 if tiny else 256)
        whole = apart(run, str(work), name, tiny, None, 0).result()
        final = fingerprint(newest(work, STEPS))
        middle = str(newest(work, CHECKPOINT_STEP))
        resumed = apart(run, str(work), name, tiny, middle, 1).result()
        on_gpu = apart(evaluate, str(work), name, tiny, middle, gpu=True)
        on_cpu = apart(evaluate, str(work), name, tiny, middle, gpu=False)
        losses = {"gpu": on_gpu.result(), "cpu": on_cpu.result()}
        equal_losses = steps_of(resumed) == steps_of(whole)[CHECKPOINT_STEP:]
        equal_tensors = fingerprint(newest(work, STEPS)) == final
    finally:
        shutil.rmtree(work)
    difference = abs(losses["gpu"]["fp32"] - losses["cpu"]["fp32"])
    return {
        "model": name,
        "first_loss": steps_of(whole)[0],
        "last_loss": steps_of(whole)[-1],
        "resumed_losses_equal": equal_losses,
        "resumed_tensors_equal": equal_tensors,
        "loss_on_gpu": losses["gpu"],
        "loss_on_cpu": losses["cpu"],
        "loss_difference_fp32": difference,
        "passed": equal_losses and equal_tensors and difference < 1e-4,
    }


def prepare_data(work: Path, sequence_length: int) -> None:
    """The standard library's sources as bytes."""
    from parallelism.data.config import DataConfig, TokenizerConfig
    from parallelism.data.prepare import prepare

    config = DataConfig(train=["builtin:python-stdlib"], tokenizer=TokenizerConfig(kind="bytes"))
    prepare(config.model_copy(update={"sequence_length": sequence_length}), work / "data", SEED)


def task_of(work: str, name: str, tiny: bool, precision: str = "bf16", **fields: Any) -> Any:
    """The run of a model, with a checkpoint after step 10 and one at the end."""
    from parallelism.budget import Budget
    from parallelism.models.gpt.config import GPTConfig
    from parallelism.training import CheckpointPolicy

    length = 64 if tiny else 256
    model = GPTConfig(**{"vocab_size": 257, "context": length} | MODELS[name] | (SMALL if tiny else {}))
    training = {"global_batch": 16, "micro_batch": 8, "precision": precision, "learning_rate": 1e-3}
    return make_task(
        model,
        work=work,
        training=training,
        budget=Budget(tokens=STEPS * 16 * length),
        checkpoint=CheckpointPolicy(steps=CHECKPOINT_STEP, seconds=None, keep=3),
        evaluations=0,
        **fields,
    )


def run(work: str, name: str, tiny: bool, resume_from: str | None, epoch: int) -> list[tuple[str, dict[str, Any]]]:
    """The product's own training path; what it reports."""
    from parallelism.run import run_task
    from parallelism.stop import StopRequest

    connect()
    events: list[tuple[str, dict[str, Any]]] = []
    task = task_of(work, name, tiny, resume_from=resume_from, epoch=epoch)
    run_task(task, lambda kind, fields: events.append((kind, fields)), StopRequest())
    return events


def evaluate(work: str, name: str, tiny: bool, directory: str) -> dict[str, float]:
    """Loss of the checkpoint on the same made batches, in both precisions."""
    import numpy as np

    from parallelism import checkpoint

    connect()
    losses = {}
    for precision in ("fp32", "bf16"):
        task = task_of(work, name, tiny, precision)
        engine = make_engine(task)
        checkpoint.load(engine, directory)
        losses[precision] = engine.evaluate(made_batches(task, np.random.default_rng(7)))
        forget()
    return losses


def steps_of(events: list[tuple[str, dict[str, Any]]]) -> list[float]:
    """Losses of all steps, in order."""
    return [fields["loss"] for kind, fields in events if kind == "step"]


def newest(work: Path, step: int) -> Path:
    """The checkpoint of a step, of the latest run that wrote one."""
    return max((work / "checkpoints").glob(f"e*-s{step:08d}"))


def fingerprint(directory: Path) -> str:
    """SHA-256 over what the ranks wrote: weights, masters, moments, random states."""
    total = hashlib.sha256()
    for file in sorted(directory.glob("*.distcp")):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
