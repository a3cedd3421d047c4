"""Checkpoints that the training engine wrote, at several layouts: streamed evaluation equals the engine's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compression import tasks
from compression.compact import CompactFile
from compression.evaluation import tally
from parallelism.budget import Progress
from parallelism.checkpoint_store import CheckpointStore, Metrics
from parallelism.layer_reader import CheckpointWeights
from parallelism.training import TrainTask
from tests.compression.test_tasks import GRID
from tests.parallelism.small_gpt import global_rows, micro_batches, small_task
from tests.ranks import run_ranks

STYLES = {
    "llama": {"layers": 3, "hidden": 48, "heads": 4, "kv_heads": 2, "rope_base": 500.0, "vocab_size": 256},
    "gpt2": {"style": "gpt2", "layers": 3, "hidden": 48, "heads": 4, "kv_heads": None, "vocab_size": 256},
}
STYLES["gpt2-tanh"] = STYLES["gpt2"] | {"activation": "gelu_tanh"}


def _train_and_save(task: TrainTask, root: Path) -> float:
    """Some steps, so that the weights are no longer what they began as; returns the held-out loss."""
    from parallelism import checkpoint
    from parallelism.registry import ENGINES, load

    torch.set_num_threads(1)
    engine: Any = load(ENGINES[task.layout.engine].implementation)(task)
    for step in range(8):
        engine.train_step(micro_batches(task, engine.data_rank, step), 5e-3)
    loss: float = engine.evaluate(micro_batches(task, engine.data_rank, 99))
    progress, store = Progress(step=3, samples=24, tokens=384), CheckpointStore(root)
    checkpoint.save(engine, progress, store.directory(0, 3))
    if torch.distributed.get_rank() == 0:
        store.commit(store.directory(0, 3), task, progress, Metrics())
    return loss


@pytest.mark.parametrize(
    ("style", "layout", "precision"),
    [
        ("llama", {}, "fp32"),
        ("llama", {"tensor": 2}, "fp32"),
        ("llama", {"tensor": 2}, "bf16"),
        ("gpt2-tanh", {"tensor": 2}, "fp32"),
        ("gpt2", {"pipeline": 2}, "fp32"),
    ],
)
def test_the_streamed_loss_is_the_engines(tmp_path: Path, style: str, layout: dict[str, int], precision: str) -> None:
    task = small_task(model={"ffn_hidden": None} | STYLES[style], layout=layout, training={"precision": precision})
    losses = run_ranks(_train_and_save, task.layout.world_size, task, tmp_path)
    weights = CheckpointWeights(CheckpointStore(tmp_path).directory(0, 3))
    rows = global_rows(task, 99)
    (total,) = tally([weights], lambda positions: rows[np.asarray(positions)], len(rows))
    # Bfloat16 engines compute in bfloat16, the streamed pass in float32 on the same weights.
    assert total.loss / total.tokens == pytest.approx(losses[0], abs=1e-5 if precision == "fp32" else 2e-2)
    assert losses[0] < 5.4  # it has learnt something: the loss of a uniform guess is ln 256 = 5.55


def test_a_real_checkpoint_goes_through_the_grid(tmp_path: Path) -> None:
    task = small_task(model=STYLES["llama"] | {"vocab_size": 250}, layout={"tensor": 2})
    run_ranks(_train_and_save, 2, task, tmp_path / "checkpoints")
    checkpoint, out = str(CheckpointStore(tmp_path / "checkpoints").directory(0, 3)), str(tmp_path / "out")
    recipes = [GRID[0], GRID[1], GRID[2]]
    for layer in range(task.model.layers):
        tasks.compress_layer(checkpoint, layer, recipes, out)
    tasks.compress_outer(checkpoint, recipes, out)
    files = [CompactFile(tasks.assemble(checkpoint, recipe, out).path) for recipe in recipes]
    rows = global_rows(task, 99)
    models = [CheckpointWeights(checkpoint), *files]
    exact, dense, half, most = (
        total.loss / total.tokens for total in tally(models, lambda positions: rows[np.asarray(positions)], len(rows))
    )
    assert dense == pytest.approx(exact, abs=3e-3)
    assert abs(dense - exact) < abs(half - exact) < abs(most - exact)
    assert files[1].tensor("embedding.tokens").shape == (250, 48)
