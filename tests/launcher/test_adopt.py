"""Checkpoints handed from one process group to the next."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import adopt
from launcher.adopt import adopt_newest, remove_older_roots
from parallelism.budget import Budget, Progress
from parallelism.checkpoint_store import CheckpointInfo, CheckpointStore, Metrics
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.training import TrainingConfig, TrainTask


def _write(root: Path, step: int, epoch: int = 1, text: str = "weights") -> Path:
    task = TrainTask(
        name="a",
        seed=1,
        model=GPTConfig(layers=1, hidden=16, heads=2),
        layout=Layout(),
        training=TrainingConfig(),
        budget=Budget(tokens=1),
        data_dir="",
        sequence_length=8,
        checkpoint_dir=str(root),
        epoch=epoch,
    )
    store = CheckpointStore(root)
    directory = store.directory(epoch, step)
    store.prepare(directory)
    (directory / "part").mkdir()
    (directory / "part" / "0.distcp").write_text(f"{text} {step}")
    store.commit(directory, task, Progress(step=step), Metrics())
    return directory


def test_the_newest_complete_checkpoint_is_adopted_by_links(tmp_path: Path) -> None:
    old, new = tmp_path / "e0001-g01", tmp_path / "e0001-g02"
    _write(old, 10)
    source = _write(old, 20)
    unfinished = _write(old, 30)
    (unfinished / "manifest.json").unlink()
    info = adopt_newest(old, new)
    assert info is not None
    assert (info.step, info.path) == (20, new / source.name)
    assert os.stat(source / "part" / "0.distcp").st_nlink == 2
    assert [one.step for one in CheckpointStore(new).complete()] == [20]


def test_what_the_old_group_still_does_is_out_of_sight(tmp_path: Path) -> None:
    old, new = tmp_path / "e0001-g01", tmp_path / "e0002-g01"
    _write(old, 20)
    info = adopt_newest(old, new)
    assert info is not None
    late = _write(old, 30, text="late")
    CheckpointStore(old).keep_newest(1)  # deletes step 20 over there
    assert [one.step for one in CheckpointStore(new).complete()] == [20]
    assert (info.path / "part" / "0.distcp").read_text() == "weights 20"
    remove_older_roots(tmp_path, new)
    assert not late.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["e0002-g01"]


def test_roots_of_newer_groups_are_left_alone(tmp_path: Path) -> None:
    for name in ("e0001-g09", "e0002-g01", "e0002-g02", "e0003-g01"):
        _write(tmp_path / name, 10)
    remove_older_roots(tmp_path, tmp_path / "e0002-g02")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0002-g02", "e0003-g01"]


def test_without_a_checkpoint_training_begins_at_nothing(tmp_path: Path) -> None:
    assert adopt_newest(None, tmp_path / "a") is None
    assert adopt_newest(tmp_path / "never", tmp_path / "b") is None
    assert (tmp_path / "b").is_dir()


def test_a_checkpoint_deleted_meanwhile_is_passed_over_for_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tmp_path / "e0001-g01", tmp_path / "e0002-g01"
    first = _write(old, 20)
    real = adopt.link_checkpoint

    def racing(source: Path, target: Path) -> None:
        if source == first:
            _write(old, 30)
            shutil.rmtree(first)  # the old group's retention, just now
        real(source, target)

    monkeypatch.setattr(adopt, "link_checkpoint", racing)
    info = adopt_newest(old, new)
    assert info is not None
    assert info.step == 30
    assert [path.name for path in new.iterdir()] == [info.path.name]


def test_a_checkpoint_deleted_while_it_is_looked_at_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "old", 10)
    going = _write(tmp_path / "old", 20)
    walk = os.walk

    def racing(directory: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for row in walk(directory):
            if directory == going:
                shutil.rmtree(going, ignore_errors=True)  # behind whoever has listed the files
            yield row

    monkeypatch.setattr(os, "walk", racing)
    assert [info.step for info in CheckpointStore(tmp_path / "old").complete()] == [10]


def test_files_are_copied_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    _write(tmp_path / "old", 20)
    monkeypatch.setattr(os, "link", refuse)
    info = adopt_newest(tmp_path / "old", tmp_path / "new")
    assert info is not None
    assert os.stat(info.path / "part" / "0.distcp").st_nlink == 1


def test_a_damaged_checkpoint_is_not_adopted(tmp_path: Path) -> None:
    _write(tmp_path / "old", 10)
    damaged = _write(tmp_path / "old", 20)
    (damaged / "part" / "0.distcp").write_text("cut")
    info = adopt_newest(tmp_path / "old", tmp_path / "new")
    assert isinstance(info, CheckpointInfo)
    assert info.step == 10
