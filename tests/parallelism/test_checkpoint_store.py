"""Checkpoints on disk: complete or not, order, retention."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest

from parallelism import checkpoint_files
from parallelism.budget import Budget, Progress
from parallelism.checkpoint_store import MANIFEST, CheckpointStore, Metrics, read_info, read_model
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.training import TrainingConfig, TrainTask

MODEL = GPTConfig(layers=2, hidden=16, heads=2, style="gpt2", vocab_size=300, tied_embeddings=False)


def task(root, epoch=1):
    return TrainTask(
        name="one",
        seed=11,
        model=MODEL,
        layout=Layout(tensor=2),
        training=TrainingConfig(global_batch=8, micro_batch=4, learning_rate=1e-3, precision="fp32"),
        budget=Budget(tokens=1e6),
        data_dir="data",
        sequence_length=32,
        checkpoint_dir=str(root),
        epoch=epoch,
    )


def progress(step):
    return Progress(step, step * 8, step * 256, step * 1e6)


def written(store, epoch, step, content=b"weights"):
    directory = store.directory(epoch, step)
    store.prepare(directory)
    (directory / "part").mkdir()
    (directory / "part" / "0.distcp").write_bytes(content)
    (directory / "common.pt").write_bytes(b"12")
    return directory


def committed(store, epoch, step):
    return store.commit(written(store, epoch, step), task(store.root, epoch), progress(step), Metrics(train_loss=2.5))


def test_the_names_and_the_format_are_megatron_cores():
    from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    assert (checkpoint_files.COMMON, checkpoint_files.COMPLETE) == (COMMON_STATE_FNAME, CONFIG_FNAME)
    assert asdict(CheckpointingConfig("torch_dist")) == checkpoint_files.FORMAT


def test_what_is_committed_reads_back(tmp_path):
    store = CheckpointStore(tmp_path / "deep" / "root")
    committed(store, 3, 40)
    (info,) = store.complete()
    assert info.path == tmp_path / "deep" / "root" / "e0003-s00000040"
    assert (info.step, info.epoch, info.progress) == (40, 3, progress(40))
    assert info.model == MODEL
    assert type(info.model) is GPTConfig
    assert info.layout == Layout(tensor=2)
    assert info.training.learning_rate == 1e-3
    assert (info.seed, info.sequence_length) == (11, 32)
    assert info.metrics.train_loss == 2.5
    assert info.files == {"common.pt": 2, "part/0.distcp": 7}
    assert info.bytes == 9
    assert store.newest() == info


def test_a_directory_without_a_manifest_does_not_count(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.complete() == []
    directory = written(store, 1, 10)
    assert store.complete() == []
    assert store.newest() is None
    with pytest.raises(ValueError, match=r"not a complete checkpoint.*name a directory"):
        read_info(directory)


@pytest.mark.parametrize("damage", ["shorter", "missing", "longer", "manifest"])
def test_a_damaged_checkpoint_does_not_count(tmp_path, damage):
    store = CheckpointStore(tmp_path)
    good, bad = committed(store, 1, 10), committed(store, 1, 20)
    file = bad.path / "part" / "0.distcp"
    if damage == "shorter":
        file.write_bytes(b"weigh")
    elif damage == "longer":
        file.write_bytes(b"weights and more")
    elif damage == "missing":
        file.unlink()
    else:
        (bad.path / MANIFEST).write_text("{", encoding="utf-8")
    assert store.complete() == [good]
    with pytest.raises(ValueError, match=r"damaged.*part/0\.distcp|not a checkpoint's manifest"):
        read_info(bad.path)


def test_order_is_by_epoch_then_step(tmp_path):
    """A stale epoch that still writes does not get ahead of its successor, however far it runs."""
    store = CheckpointStore(tmp_path)
    for epoch, step in ((2, 70), (1, 60), (1, 99), (2, 80)):
        committed(store, epoch, step)
    assert [(info.epoch, info.step) for info in store.complete()] == [(1, 60), (1, 99), (2, 70), (2, 80)]
    store.keep_newest(1)
    assert [(info.epoch, info.step) for info in store.complete()] == [(2, 80)]


def test_steps_and_epochs_sort_as_numbers_beyond_the_padding(tmp_path):
    store = CheckpointStore(tmp_path)
    for epoch, step in ((1, 100_000_000), (1, 99_999_999), (10_000, 5)):
        committed(store, epoch, step)
    assert [info.step for info in store.complete()] == [99_999_999, 100_000_000, 5]


def test_retention_keeps_the_newest_and_touches_nothing_else(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30, 40):
        committed(store, 1, step)
    unfinished = written(store, 1, 50)
    (tmp_path / "notes").mkdir()
    store.keep_newest(2)
    assert [info.step for info in store.complete()] == [30, 40]
    assert unfinished.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "e0001-s00000030", "e0001-s00000040", "e0001-s00000050", "notes",
    ]  # fmt: skip
    store.keep_newest(5)
    assert len(store.complete()) == 2


def test_leftovers_are_removed_up_to_an_epoch(tmp_path):
    store = CheckpointStore(tmp_path)
    committed(store, 1, 10)
    leftovers = [written(store, epoch, step) for epoch, step in ((1, 20), (2, 30), (3, 40))]
    store.remove_incomplete(epoch=2)
    assert [path.exists() for path in leftovers] == [False, False, True]
    assert [info.step for info in store.complete()] == [10]


def test_preparing_a_directory_again_empties_it(tmp_path):
    """A second run of the same epoch may reach a step that the first had completed; nothing of the first stays."""
    store = CheckpointStore(tmp_path)
    directory = committed(store, 1, 10).path
    (directory / "extra.distcp").write_bytes(b"old")
    store.prepare(directory)
    assert list(directory.iterdir()) == []
    assert store.complete() == []


def test_a_manifest_of_a_later_version_with_more_fields_is_read(tmp_path):
    store = CheckpointStore(tmp_path)
    info = committed(store, 1, 10)
    document = json.loads((info.path / MANIFEST).read_text(encoding="utf-8"))
    (info.path / MANIFEST).write_text(json.dumps(document | {"colour": "green"}), encoding="utf-8")
    assert store.complete() == [info]


def test_an_unknown_family_is_named_with_what_there_is():
    with pytest.raises(ValueError, match=r"model\.family 'rnn' is unknown: available are .*gpt"):
        read_model({"family": "rnn", "layers": 2})


def test_the_store_never_imports_torch():
    code = (
        "import sys; import parallelism.checkpoint_store, parallelism.result, parallelism.stop, parallelism.schedule;"
    )
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
