"""What calibration holds on the disk: how much a layer takes, and how many layers lie there at once."""

import random
from pathlib import Path

import pytest

from compression.recipe import grid
from compression.results import LayerResult
from launcher.actors.pool import Task
from launcher.actors.session import Room
from launcher.context import JobContext
from launcher.control import Control
from launcher.planning.disk import calibration_disk
from launcher.spec import JobSpec
from launcher.stages.work import Dense, GridWork
from parallelism.models.gpt.config import GPTConfig
from tests.launcher.made import new_journal, spec_document

MODEL = GPTConfig(layers=8, hidden=64, heads=4, ffn_hidden=128, vocab_size=256)
GPTQ = {"quantize": {"methods": ["gptq"], "bits": [4]}}
SEQUENCES, LENGTH = 100, 64
HIDDEN_BYTES = SEQUENCES * LENGTH * 64 * 4
STATISTICS_BYTES = 4 * (3 * 64**2 + 128**2)
"""Of one layer and shard: H of what q, k and v read, of what o, gate and up, and down read."""


def _spec(compression: dict[str, object]) -> JobSpec:
    calibration = {"sequences": SEQUENCES, "statistics": compression.pop("statistics", "shared")}
    data = {"train": ["builtin:python-stdlib"], "sequence_length": LENGTH, "tokenizer": {"kind": "bytes"}}
    return JobSpec.model_validate(spec_document(data=data, compression=compression | {"calibration": calibration}))


@pytest.mark.parametrize(
    ("compression", "devices", "layers", "states"),
    [
        ({"prune": {"methods": ["magnitude"], "sparsity": [0.5]}}, 2, 0, 0),
        (GPTQ, 1, 2, 1),
        (GPTQ, 3, 4, 1),
        (GPTQ, 64, 8, 1),
        (GPTQ | {"structure": {"layers": [0.5]}}, 1, 8, 1),
        (GPTQ | {"statistics": "sequential"}, 1, 0, 1),
        ({"quantize": {"methods": ["gptq", "awq", "rtn"], "bits": [4]}, "statistics": "sequential"}, 1, 0, 2),
    ],
)
def test_what_calibration_takes(compression: dict[str, object], devices: int, layers: int, states: int) -> None:
    disk = calibration_disk(_spec(dict(compression)), MODEL, devices)
    shards = 4  # of 32 sequences
    assert disk.layers == layers
    assert disk.statistics_bytes == pytest.approx(layers * shards * STATISTICS_BYTES, rel=0.1)
    assert disk.hidden_bytes == 2 * states * HIDDEN_BYTES  # before a layer and behind it


def test_recovered_recipes_are_calibrated_after_the_grid() -> None:
    recover = {"budget_fraction": 0.1}
    methods = {"quantize": {"methods": ["gptq"], "bits": [8, 4, 3]}}
    alone, again = (calibration_disk(_spec(methods | extra), MODEL, 1) for extra in ({}, {"recover": recover}))
    assert again.bytes == 3 * alone.bytes  # side by side, and each by itself
    aware = {"recover": recover | {"quantization_aware": True}}  # rounded to nearest in the end
    assert calibration_disk(_spec(methods | aware), MODEL, 1) == alone


@pytest.fixture
def job(room: Room, tmp_path: Path) -> JobContext:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    return JobContext(journal, _spec(dict(GPTQ)), room, Control(journal), dict)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_statistics_of_few_layers_lie_there_at_once(job: JobContext, devices: int) -> None:
    """The graph of tasks, taken up in the pool's order by workers that end in any order."""
    dense = Dense("small", "nowhere", MODEL, "x")
    work = GridWork(job, "compress/small", dense, grid(job.spec.compression), "out")
    assert _most_layers(work, devices) <= calibration_disk(job.spec, MODEL, devices).layers == devices + 1


def _most_layers(work: GridWork, devices: int) -> int:
    chooser, waiting, running = random.Random(devices), list(work.first()), list[Task]()
    stored: set[int] = set()
    most = 0
    while waiting or running:
        while waiting and len(running) < devices:
            running.append(waiting.pop(0))
        stored |= {task.arguments["layer"] for task in running if task.function.endswith(":calibrate")}
        most = max(most, len(stored))
        task = running.pop(chooser.randrange(len(running)))
        layer = task.arguments.get("layer")
        if task.function.endswith(":compress_layer"):
            stored.remove(layer)
        if task.function.endswith(":assemble"):
            continue
        waiting = [*work.after(task, LayerResult(layer=layer, inputs="x", parts=[], seconds=0.0)), *waiting]
    assert not stored
    return most
