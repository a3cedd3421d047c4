"""Memory of real training processes against the planner's estimate.

Every case starts its ranks as fresh processes on this machine, trains three steps on random tokens, and takes each
rank's peak resident memory above what the process held after its imports. The estimate is
:func:`parallelism.accounting.memory_per_rank`; the figure that counts is the rank that needs most. Cases of recovery
hold zeros, compute with rounded weights, learn from a teacher of the model's own shape, or all of that.

    python benchmarks/memory/bench.py [CASE ...] [--json FILE]
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parallelism.accounting import memory_per_rank
from parallelism.budget import Budget
from parallelism.layout import Layout
from parallelism.memory import Companions, MemoryEstimate
from parallelism.models.base import ModelConfig
from parallelism.presets import resolve_model
from parallelism.start import Rounding, StartPoint
from parallelism.training import TrainingConfig, TrainTask

STEPS = 3
TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True)
class Case:
    """One model at one layout."""

    name: str
    model: dict[str, Any]
    layout: Layout
    micro_batch: int = 4
    micro_batches: int = 2
    sequence_length: int = 256
    precision: str = "fp32"
    recompute: bool = False
    taught: bool = False
    rounded: bool = False

    def start(self, teacher: Path) -> StartPoint | None:
        """Where a recovery begins, its teacher's checkpoint being at ``teacher``."""
        if not (self.taught or self.rounded):
            return None
        rounding = Rounding(function="compression.rounding:round_weight", group_size=32, arguments={"bits": 4})
        return StartPoint(
            weights="unused",
            hold_zeros=True,
            rounding=rounding if self.rounded else None,
            teacher=str(teacher) if self.taught else None,
        )

    def estimate(self) -> MemoryEstimate:
        """What the planner says of the rank that needs most."""
        task = self.task(Path("unused"))
        companions = Companions(task.model if self.taught else None, self.rounded) if task.start else None
        return memory_per_rank(task.model, task.layout, task.training, task.sequence_length, "cpu", companions)

    def task(self, teacher: Path) -> TrainTask:
        """What every rank is given; ``teacher`` is where a teacher's checkpoint lies."""
        training = TrainingConfig(
            global_batch=self.micro_batch * self.micro_batches * self.layout.data,
            micro_batch=self.micro_batch,
            learning_rate=1e-4,
            precision=self.precision,
            recompute=self.recompute,
        )
        return TrainTask(
            name=self.name,
            seed=1,
            model=resolve_model(self.model, context=self.sequence_length),
            start=self.start(teacher),
            layout=self.layout,
            training=training,
            budget=Budget(tokens=1e12),
            data_dir="unused",
            sequence_length=self.sequence_length,
            checkpoint_dir="unused",
        )


GPT2 = {"family": "gpt", "style": "gpt2", "layers": 12, "hidden": 512, "heads": 8, "vocab_size": 32000}
DEEP = {"family": "gpt", "style": "llama", "layers": 16, "hidden": 512, "heads": 8, "kv_heads": 4, "vocab_size": 8192}
WIDE = {
    "family": "gpt",
    "style": "llama",
    "layers": 6,
    "hidden": 1024,
    "heads": 16,
    "vocab_size": 4096,
    "tied_embeddings": False,
}
T2, P2, D2 = Layout(tensor=2), Layout(pipeline=2), Layout(data=2)

CASES = [
    Case("gpt2-54m T1", GPT2, Layout()),
    Case("gpt2-54m T2", GPT2, T2),
    Case("gpt2-54m P2", GPT2, P2, micro_batches=4),
    Case("deep-50m T1", DEEP, Layout()),
    Case("deep-50m D2", DEEP, D2),
    Case("deep-50m P2", DEEP, P2, micro_batches=4),
    Case("wide-84m T1", WIDE, Layout(), sequence_length=512),
    Case("wide-84m T2", WIDE, T2, sequence_length=512),
    Case("wide-84m D2 bf16", WIDE, D2, precision="bf16"),
    Case("wide-84m T2 lean", WIDE, Layout(tensor=2, engine="lean"), micro_batches=1),
]
RECOVERED = [
    replace(case, name=f"{case.name} {kind}", **changes)
    for kind, changes in {
        "rounded": {"rounded": True},
        "taught": {"taught": True},
        "both": {"rounded": True, "taught": True},
    }.items()
    for case in CASES
    if case.name in ("gpt2-54m T1", "deep-50m T1", "deep-50m P2", "wide-84m T2", "wide-84m D2 bf16", "wide-84m T2 lean")
]


def main() -> None:
    """Measure the named cases (all by default) and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("cases", nargs="*", help="beginnings of case names")
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    rows = []
    print(
        f"{'case':24} {'measured':>10} {'estimate':>10} {'error':>7}   rank above baseline, baseline (MB)", flush=True
    )
    for case in [*CASES, *RECOVERED]:
        if options.cases and not case.name.startswith(tuple(options.cases)):
            continue
        rows.append(row := measure(case))
        ranks = ", ".join(f"{rank['peak'] / 1e6:.0f}/{rank['baseline'] / 1e6:.0f}" for rank in row["ranks"])
        print(
            f"{case.name:24} {row['measured_bytes'] / 1e6:10.0f} {row['estimated_bytes'] / 1e6:10.0f} "
            f"{row['error']:+7.1%}   {ranks}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(case: Case) -> dict[str, Any]:
    """The largest rank's peak beside the estimate."""
    estimate = case.estimate()
    with tempfile.TemporaryDirectory() as folder:
        task = case.task(Path(folder) / "teacher")
        if case.taught:
            write_teacher(task.model, Path(folder) / "teacher")
        ranks = run(task, case)
    measured = max(rank["peak"] for rank in ranks)
    return {
        "case": case.name,
        "parameters": task.model.parameter_count(),
        "measured_bytes": measured,
        "estimated_bytes": estimate.total,
        "error": estimate.total / measured - 1.0,
        "estimate": estimate.model_dump(),
        "ranks": ranks,
    }


def write_teacher(model: ModelConfig, directory: Path) -> None:
    """A checkpoint of random weights."""
    from parallelism.plain_checkpoint import write_checkpoint

    write_checkpoint(RandomWeights(model), directory, "random")


@dataclass(frozen=True)
class RandomWeights:
    """Weights of small size by canonical name."""

    config: ModelConfig

    def layer(self, index: int) -> dict[str, Any]:
        """One layer's, its prefix left off."""
        prefix = f"layers.{index}."
        shapes = self.config.parameter_shapes()
        return {name.removeprefix(prefix): self._drawn(shapes[name]) for name in shapes if name.startswith(prefix)}

    def outer(self) -> dict[str, Any]:
        """Everything outside the layers, the vocabulary without padding."""
        from parallelism.models.gpt.plain import outer_shapes

        return {name: self._drawn(shape) for name, shape in outer_shapes(self.config).items()}

    def _drawn(self, shape: tuple[int, ...]) -> Any:
        import torch

        return torch.randn(shape) * 0.02


def run(task: TrainTask, case: Case) -> list[dict[str, Any]]:
    """What every rank reports: bytes above its baseline after building and at its peak."""
    from parallelism.device import host_store

    store = host_store()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = [(rank, store.port, task, case, sender) for rank in range(task.layout.world_size)]
    ranks = [context.Process(target=rank_main, args=argument, daemon=True) for argument in arguments]
    for rank in ranks:
        rank.start()
    sender.close()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    reports: list[dict[str, Any]] = []
    try:
        while len(reports) < len(ranks):
            if receiver.poll(1.0):
                reports.append(receiver.recv())
            elif any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                raise RuntimeError(f"{case.name}: exit codes {[rank.exitcode for rank in ranks]}")
    finally:
        for rank in ranks:
            rank.kill()
    return sorted(reports, key=lambda report: report["rank"])


def rank_main(rank: int, port: int, task: TrainTask, case: Case, sender: Connection) -> None:
    """One rank: connect, note the baseline, train, report."""
    import numpy as np
    from torch.distributed import TCPStore

    from parallelism import device
    from parallelism.registry import ENGINES, FAMILIES, load

    store = TCPStore("127.0.0.1", port, is_master=False)
    device.connect(rank, task.layout.world_size, "127.0.0.1", port, store=store)
    family = load(FAMILIES[task.model.family].sharded)
    engine_class = load(ENGINES[task.layout.engine].implementation)
    device.baseline_memory_bytes()  # loads what it counts as the baseline
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of the imports
    baseline = memory("VmRSS")
    engine = engine_class(task)
    built = memory("VmRSS")
    generator = np.random.default_rng(rank // (task.layout.tensor * task.layout.pipeline))
    shape = (case.micro_batch, case.sequence_length + 1)
    for _ in range(STEPS):
        rows = [generator.integers(0, task.model.vocab_size, shape) for _ in range(case.micro_batches)]
        result = engine.train_step([family.collate(row) for row in rows], 1e-4)
        assert np.isfinite(result.loss)
    peak = memory("VmHWM")
    sender.send({"rank": rank, "baseline": baseline, "built": built - baseline, "peak": peak - baseline})
    device.disconnect()


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


if __name__ == "__main__":
    main()
