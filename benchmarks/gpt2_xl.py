"""GPT-2 XL (1.56B parameters) trained for real on a small machine: engine lean, tensor parallel over two processes.

Two runs of the product's own training path (:func:`parallelism.run.run_task`) on the standard library's sources as
bytes: one of 20 steps with a checkpoint after step 10, and one in fresh processes that continues from that checkpoint.
Compared are the losses of the steps after it and, byte by byte, the checkpoints at the end. Memory is the sum over
ranks of each process's peak resident set (VmHWM), saving and loading included. Not part of
``make bench``: it needs 19 GiB.

    python benchmarks/gpt2_xl.py [--layers 48] [--hidden 1600] [--heads 20] [--work DIR] [--output FILE]
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallelism.budget import Budget
from parallelism.data.config import DataConfig, TokenizerConfig
from parallelism.data.prepare import prepare
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.training import CheckpointPolicy, TrainingConfig, TrainTask

GIB = 2**30
RANKS = 2
STEPS, CHECKPOINT_STEP = 20, 10
SEED = 1234
LEAST_AVAILABLE_BYTES = 2 * GIB
"""Below this the run ends itself before the kernel ends somebody."""
TIMEOUT_SECONDS = 4 * 3600.0


def main() -> None:
    """Both runs, and the comparison."""
    options = parse_arguments()
    work = Path(tempfile.mkdtemp(prefix="gpt2-xl-", dir=options.work))
    try:
        document = measure(options, work)
    finally:
        shutil.rmtree(work)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in document.items() if not isinstance(value, list)}, indent=2))
    if not (document["resumed_losses_equal"] and document["final_states_equal"] and document["loss_fell"]):
        sys.exit("the resumed run differs from the undisturbed one, or the loss did not fall")


def parse_arguments() -> argparse.Namespace:
    """Defaults are GPT-2 XL's shape with 20 heads instead of 25, so that two ranks can share them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=1600)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--least-available-gib", type=float, default=19.0, help="refuse to start with less memory free")
    parser.add_argument("--work", type=Path, default=None, help="where two checkpoints lie meanwhile")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results" / "gpt2_xl.json")
    options = parser.parse_args()
    available = psutil.virtual_memory().available / GIB
    if available < options.least_available_gib:
        parser.error(f"{available:.1f} GiB of memory are available, {options.least_available_gib:g} are needed")
    return options


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """What the two runs took and whether they agree."""
    load_before = os.getloadavg()[0]
    data = DataConfig(train=["builtin:python-stdlib"], tokenizer=TokenizerConfig(kind="bytes"))
    prepare(data.model_copy(update={"sequence_length": options.sequence}), work / "data", SEED)
    task = make_task(options, work)
    whole = run(task)
    final = fingerprint(newest(work, STEPS), remove=True)
    resumed = run(task.model_copy(update={"resume_from": str(newest(work, CHECKPOINT_STEP)), "epoch": 1}))
    losses, seconds = steps_of(whole, "loss"), steps_of(whole, "seconds")
    saved = next(fields for kind, fields in whole["events"] if kind == "checkpoint")
    return {
        "parameters": task.model.parameter_count(),
        "layout": str(task.layout),
        "sequence_length": task.sequence_length,
        "threads_per_rank": task.threads_per_rank,
        "losses": losses,
        "resumed_losses": steps_of(resumed, "loss"),
        "resumed_losses_equal": steps_of(resumed, "loss") == losses[CHECKPOINT_STEP:],
        "final_states_equal": fingerprint(newest(work, STEPS)) == final,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "loss_fell": statistics.mean(losses[-5:]) < statistics.mean(losses[:5]) - 1.0,
        "seconds_by_step": [round(value, 3) for value in seconds],
        "seconds_per_step_median": statistics.median(seconds),
        "seconds_per_step_least": min(seconds),
        "peak_gib_all_ranks": sum(whole["peaks"]) / GIB,
        "peak_gib_all_ranks_resumed": sum(resumed["peaks"]) / GIB,
        "peak_gib_first_rank_before_saving": dict(whole["peaks_by_step"])[CHECKPOINT_STEP] / GIB,
        "peak_gib_first_rank": whole["peaks"][0] / GIB,
        "least_available_gib": min(whole["least_available"], resumed["least_available"]) / GIB,
        "checkpoint_seconds": saved["stall_seconds"],
        "checkpoint_gib": size(newest(work, CHECKPOINT_STEP)) / GIB,
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": psutil.virtual_memory().total / GIB,
            "load_average_before": load_before,
            "load_average_after": os.getloadavg()[0],
        },
    }


def make_task(options: argparse.Namespace, work: Path) -> TrainTask:
    """One sequence per step, AdamW with β2 0.95, no evaluation, checkpoints written while training waits."""
    return TrainTask(
        name="gpt2-xl",
        seed=SEED,
        model=GPTConfig(
            style="gpt2",
            layers=options.layers,
            hidden=options.hidden,
            heads=options.heads,
            vocab_size=options.vocabulary,
            context=1024,
        ),
        layout=Layout(engine="lean", tensor=RANKS),
        training=TrainingConfig(
            global_batch=1,
            micro_batch=1,
            learning_rate=options.learning_rate,
            schedule="constant",
            warmup_fraction=0.2,
            precision="fp32",
        ),
        budget=Budget(tokens=STEPS * options.sequence),
        data_dir=str(work / "data"),
        sequence_length=options.sequence,
        checkpoint_dir=str(work / "checkpoints"),
        # A snapshot beside the training would double the memory: every page of it changes in the next step.
        checkpoint=CheckpointPolicy(steps=CHECKPOINT_STEP, seconds=None, keep=2, asynchronous=False),
        evaluations=0,
        stall_seconds=3600.0,
    )


def run(task: TrainTask) -> dict[str, Any]:
    """The task on fresh processes: rank 0's events, every rank's peak memory, the least memory left on the machine."""
    from parallelism.device import host_store

    store = host_store()
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    ranks = [
        context.Process(target=train_rank, args=(rank, store.port, task, sender))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(ranks, pipes, strict=True):
        process.start()
        sender.close()
    try:
        results, least = collect([receiver for receiver, _ in pipes])
        for process in ranks:
            process.join(60)
    finally:
        for process in ranks:
            process.kill()
    return {**results[0], "peaks": [result["peak"] for result in results], "least_available": least}


def collect(receivers: list[Connection]) -> tuple[list[dict[str, Any]], int]:
    """Results by rank, and the least available memory seen meanwhile; ends the program when it becomes too little."""
    results: dict[int, dict[str, Any]] = {}
    least, deadline = psutil.virtual_memory().available, time.monotonic() + TIMEOUT_SECONDS
    while len(results) < len(receivers):
        for rank, receiver in enumerate(receivers):
            if rank not in results and receiver.poll(0.1):
                results[rank] = receiver.recv()
        least = min(least, psutil.virtual_memory().available)
        if least < LEAST_AVAILABLE_BYTES:
            sys.exit(f"stopped: only {least / GIB:.1f} GiB of memory were left on this machine")
        if time.monotonic() > deadline:
            sys.exit(f"stopped: the ranks did not end within {TIMEOUT_SECONDS:g} s")
    return [results[rank] for rank in range(len(receivers))], least


def train_rank(rank: int, port: int, task: TrainTask, sender: Connection) -> None:
    """The life of one rank."""
    from parallelism import device
    from parallelism.run import run_task
    from parallelism.stop import StopRequest

    events: list[tuple[str, dict[str, Any]]] = []
    peaks_by_step: list[tuple[int, int]] = []

    def report(kind: str, fields: dict[str, Any]) -> None:
        events.append((kind, fields))
        if kind == "step":
            peaks_by_step.append((fields["step"], device.peak_memory_bytes()))
            print(
                f"step {fields['step']}: loss {fields['loss']:.4f}, {fields['seconds']:.1f} s",
                file=sys.stderr,
                flush=True,
            )

    device.connect(rank, RANKS, "127.0.0.1", port, threads=task.threads_per_rank, store=client_store(port))
    run_task(task, report, StopRequest())
    sender.send({"events": events, "peaks_by_step": peaks_by_step, "peak": device.peak_memory_bytes()})
    device.disconnect()


def client_store(port: int) -> Any:
    """The rendezvous that the parent hosts."""
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, is_master=False)


def steps_of(result: dict[str, Any], field: str) -> list[float]:
    """One field of all steps, in order."""
    return [fields[field] for kind, fields in result["events"] if kind == "step"]


def newest(work: Path, step: int) -> Path:
    """The checkpoint of a step, of the latest run that wrote one."""
    return max((work / "checkpoints").glob(f"e*-s{step:08d}"))


def fingerprint(checkpoint: Path, remove: bool = False) -> str:
    """SHA-256 over everything that the ranks wrote: weights, moments, random states."""
    total = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.distcp")):
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    if remove:
        shutil.rmtree(checkpoint)
    return total.hexdigest()


def size(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())


if __name__ == "__main__":
    main()
