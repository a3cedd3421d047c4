"""The compression stage on a real Ray cluster: a model that exists, the whole grid, workers killed in between."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from launcher.actors.session import Room
from launcher.context import JobContext
from launcher.control import Control, Stopped
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.stages.compress import compress, compressed, dense_candidates, variant_files
from launcher.stages.planning import plan
from launcher.stages.prepare import prepare
from launcher.states import JobState
from tests.compression import made
from tests.launcher.fingerprint import tensors_checksum

pytestmark = pytest.mark.campaign

CONFIG = made.LLAMA.model_copy(update={"vocab_size": 257})
GRID = {
    "structure": {"layers": [0.34]},
    "prune": {"methods": ["magnitude"], "sparsity": [0.5], "scope": "global"},
    "quantize": {"methods": ["awq", "rtn"], "bits": [4], "average_bits": [3.5], "group_size": 16},
    "combine": True,
    "calibration": {"sequences": 40},
}

Make = Callable[..., JobContext]


@pytest.fixture(scope="module")
def make(room: Room, tmp_path_factory: pytest.TempPathFactory) -> Make:
    folder = tmp_path_factory.mktemp("jobs")
    checkpoint = made.write_checkpoint(folder / "checkpoint", CONFIG, made.weights(CONFIG), tensor=2)
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i} grows and is cut {i * i} times" for i in range(2000)))

    def one(name: str, **compression: Any) -> JobContext:
        document = {
            "name": "given",
            "data": {
                "train": [str(text)],
                "validation": 0.1,
                "documents": "line",
                "tokenizer": {"kind": "bytes"},
                "sequence_length": 24,
            },
            "candidates": [{"name": "given", "source": str(checkpoint)}],
            "compression": GRID | compression,
        }
        journal = Journal(folder / name).create(JobSpec.model_validate(document))
        return _context(journal, room)

    return one


@dataclass(frozen=True)
class Calm:
    """The grid in peace."""

    journal: Journal
    checksums: dict[str, str]


@pytest.fixture(scope="module")
def calm(make: Make) -> Calm:
    job = make("calm")
    return Calm(job.journal, _run(job))


def _context(journal: Journal, room: Room) -> JobContext:
    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    journal.set_state(JobState.RUNNING)
    spec = journal.spec()
    generous = spec.model_copy(update={"execution": spec.execution.model_copy(update={"max_restarts": 50})})
    return JobContext(journal, generous, room, Control(journal, poll_seconds=0.05), dict)


def _run(job: JobContext) -> dict[str, str]:
    """Variant's name → checksum of its tensors; the header also tells the whole grid."""
    prepare(job)
    plan(job)
    compress(job)
    job.pool.close()
    (candidate,) = dense_candidates(job)
    return {file.name: tensors_checksum(file.path) for file in variant_files(compressed(job, candidate))}


def _kill_workers(job: JobContext, times: int, stop: threading.Event) -> list[int]:
    """Kill random workers at random moments while the stage runs; the pids."""
    generator, killed = random.Random(5), []
    reader = Journal(job.journal.directory)
    while len(killed) < times and not stop.wait(generator.uniform(0.05, 0.6)):
        workers = [event["pid"] for event in reader.view().processes.values() if event["role"] == "worker"]
        if reader.view().active_stage == "compress" and workers:
            pid = generator.choice(workers)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(pid)
    return killed


@pytest.mark.timeout(600)
def test_killed_workers_change_no_byte_and_cost_a_task_each(make: Make, calm: Calm) -> None:
    assert len(calm.checksums) == 1 + 1 + 1 + 4 + 2 * 4  # dense, layers, pruning, widths, every pair
    assert not (calm.journal.candidate_dir("given") / "statistics").exists()
    stormy, stop = make("stormy"), threading.Event()
    folder = stormy.journal.candidate_dir("given")
    unfinished = folder / "layers" / "00001" / ".dense.safetensors.of-a-killed-writer"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.extend(_kill_workers(stormy, 5, stop)))
    killer.start()
    try:
        assert _run(stormy) == calm.checksums
    finally:
        stop.set()
        killer.join()
    restarts = [event for event in stormy.journal.events() if event["kind"] == "task_restart"]
    assert not [path for path in folder.rglob(".*") if path.is_file()]
    assert killed
    assert len(restarts) <= len(killed)
    layers = [event["layer"] for event in stormy.journal.events() if event["kind"] == "layer_compressed"]
    assert sorted(layers, key=str) == sorted([None, *range(CONFIG.layers)], key=str)


@pytest.mark.timeout(600)
def test_a_second_attempt_does_not_compress_committed_layers_again(make: Make, room: Room, calm: Calm) -> None:
    first = make("first")
    prepare(first)
    plan(first)
    deadline = time.monotonic() + 120
    done = threading.Event()

    def interrupt() -> None:
        reader = Journal(first.journal.directory)
        while time.monotonic() < deadline and not done.wait(0.02):
            if any(event["kind"] == "layer_compressed" and event["layer"] == 1 for event in reader.events()):
                first.journal.set_desired("pause")
                return

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        with pytest.raises(Stopped, match="pause"):
            compress(first)
    finally:
        done.set()
        watcher.join()
        first.pool.close()
    folder = first.journal.candidate_dir("given") / "layers" / "00001"
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert times
    journal = Journal(first.journal.directory)
    journal.set_desired("run")
    second = _context(journal, room)
    assert _run(second) == calm.checksums
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.timeout(600)
def test_sequential_statistics_make_a_chain_of_every_recipe_that_needs_them(make: Make, calm: Calm) -> None:
    shared = calm.checksums
    chained = _run(make("chained", calibration={"sequences": 40, "statistics": "sequential"}))
    assert set(chained) == set(shared)
    same = {name for name in shared if shared[name] == chained[name]}
    assert {"dense", "rtn-w4g16"} <= same  # these need no statistics
    assert "awq-w4g16" not in same
