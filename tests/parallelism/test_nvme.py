"""The optimizer on a disk (offload: nvme): the same bits as in memory, and what is refused where that cannot be."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from parallelism.engines import nvme
from parallelism.training import TrainTask
from tests.parallelism.resuming import digest
from tests.parallelism.small_gpt import make_engine, small_task, train
from tests.ranks import RankFailed, run_ranks

pytestmark = pytest.mark.timeout(1800)  # the first test that asks for the operator waits until it is compiled

ODD = {"layers": 1, "hidden": 520, "heads": 10, "kv_heads": 10, "ffn_hidden": 1038, "vocab_size": 601}
"""Partitions of more than 1 MiB, which go to the disk, of sizes that no alignment divides; and small ones."""


@pytest.fixture(scope="module")
def operator() -> None:
    """DeepSpeed's I/O operator, compiled once for this user and host (minutes)."""
    command = [sys.executable, "-m", "parallelism.engines.nvme"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if finished.returncode == 2:
        pytest.skip(finished.stderr.splitlines()[-1])
    assert finished.returncode == 0, finished.stderr


def odd_task(offload: str, directory: Path, precision: str, **layout: Any) -> TrainTask:
    place = {"offload": offload, "offload_dir": str(directory)} if offload == "nvme" else {"offload": offload}
    layout = {"engine": "deepspeed", "zero_stage": 3, **layout, **place}
    return small_task(layout=layout, training={"precision": precision}, model=ODD)


def train_stop_and_resume(tasks: dict[str, TrainTask], directory: Path) -> dict[str, dict[str, Any]]:
    """Eight steps with a checkpoint in the middle, written beside the training; then the last four from it."""
    from parallelism import checkpoint
    from parallelism.budget import Progress

    results = {}
    for name, task in tasks.items():
        engine, saver = make_engine(task), checkpoint.AsyncSaver()
        before = train(engine, task, 0, 4)
        saver.start(engine, Progress(step=4), directory / name)
        after = train(engine, task, 4, 8)
        saver.wait()
        fresh = make_engine(task.model_copy(update={"seed": task.seed + 1}))
        resumed = train(fresh, task, checkpoint.load(fresh, directory / name).step, 8)
        swapped = sum(path.stat().st_size for path in directory.glob("swap/**/*.swp"))
        results[name] = {
            "run": (before, after, digest(engine)),
            "undisturbed": (after, digest(engine)),
            "resumed": (resumed, digest(fresh)),
            "swapped": swapped,
        }
    return results


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("world_size", "cases"),
    [(1, [("fp32", {})]), (2, [("fp32", {"data": 2}), ("bf16", {"data": 2}), ("fp32", {"tensor": 2})])],
)
def test_the_disk_gives_the_bits_that_memory_gives(
    operator: None, world_size: int, cases: list[tuple[str, dict[str, int]]], tmp_path: Path
) -> None:
    tasks = {
        f"{offload} {index}": odd_task(offload, tmp_path / "swap", precision, **layout)
        for index, (precision, layout) in enumerate(cases)
        for offload in ("cpu", "nvme")
    }
    for results in run_ranks(train_stop_and_resume, world_size, tasks, tmp_path):
        for index, case in enumerate(cases):
            memory, disk = (results[f"{offload} {index}"] for offload in ("cpu", "nvme"))
            assert disk["swapped"] > 2**22
            assert disk["run"] == memory["run"], f"{case}: losses, norms, weights, main weights and moments"
            assert disk["resumed"] == disk["undisturbed"], case
    assert list((tmp_path / "swap").iterdir()) == [], "what was swapped is removed with the process"


@pytest.mark.compiler
def test_a_full_disk_is_said_on_all_ranks(operator: None, tmp_path: Path) -> None:
    task = odd_task("nvme", tmp_path, "fp32", data=2)
    with pytest.raises(RankFailed, match=r"ValueError: layout\.offload_dir .*GiB are free.*layout\.offload: cpu"):
        run_ranks(make_on_a_full_disk, 2, task)


def make_on_a_full_disk(task: TrainTask) -> None:
    if torch.distributed.get_rank() == 1:
        shutil.disk_usage = lambda _: SimpleNamespace(free=2**20)
    make_engine(task)


class FakeBuilder:
    """Stands for DeepSpeed's builder of the I/O operator."""

    name = "async_io"

    def __init__(self, *, compatible: bool = True, failure: Exception | None = None) -> None:
        self._compatible = compatible
        self._failure = failure

    def is_compatible(self) -> bool:
        return self._compatible

    def load(self, *, verbose: bool) -> str:
        directory = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        assert not list(directory.glob("*/lock")), "torch would wait for it for ever"
        if self._failure:
            raise self._failure
        return str(directory)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads the operator with a given builder, on a host that has a compiler and ninja."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)

    def load(builder: FakeBuilder) -> Any:
        modules = {
            "deepspeed.ops.op_builder": SimpleNamespace(AsyncIOBuilder=lambda: builder),
            "deepspeed.git_version_info": SimpleNamespace(installed_ops={"async_io": False}),
        }
        with monkeypatch.context() as patched:
            patched.setattr(nvme.importlib, "import_module", modules.__getitem__)
            return nvme.load_operator()

    return load


def test_the_lock_of_a_killed_build_is_removed(build: Any, tmp_path: Path) -> None:
    directory = Path(build(FakeBuilder()))
    assert directory.is_relative_to(tmp_path)
    (directory / "async_io").mkdir()
    (directory / "async_io" / "lock").touch()
    assert build(FakeBuilder()) == str(directory)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path), "as it was before"


def test_what_is_missing_to_compile_is_named(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"layout\.offload nvme: .*libaio-dev.*layout\.offload: cpu"):
        build(FakeBuilder(compatible=False))
    with pytest.raises(ValueError, match=r"could not be compiled in .*: error 42; .*layout\.offload: cpu"):
        build(FakeBuilder(failure=RuntimeError("error 42")))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    with pytest.raises(ValueError, match=r"lacks a C\+\+ compiler \(g\+\+\) and ninja; install"):
        build(FakeBuilder())


class FakeHandle:
    """An I/O handle that moves what ``spoil`` lets through."""

    def __init__(self, spoil: str) -> None:
        self._spoil = spoil

    def new_cpu_locked_tensor(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(elements)

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None: ...

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        if self._spoil == "open":
            return -1
        Path(path).write_bytes(tensor.numpy().tobytes()[: 1000 if self._spoil == "write" else None])
        return 0

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        if self._spoil != "read":
            tensor.copy_(torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.float32))
        return 0

    def wait(self) -> int:
        return 1


@pytest.mark.parametrize("spoil", ["", "open", "write", "read"])
def test_a_directory_where_direct_io_fails_silently_is_refused(spoil: str, tmp_path: Path) -> None:
    operator = SimpleNamespace(aio_handle=lambda **_: FakeHandle(spoil))
    if not spoil:
        nvme._check_direct_io(tmp_path, operator)
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(ValueError, match=r"layout\.offload_dir .*direct I/O aligned to 1024 bytes.*offload: cpu"):
        nvme._check_direct_io(tmp_path, operator)


def test_memory_that_cannot_be_locked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nvme._check_lock(4096)
    monkeypatch.setattr(nvme, "_can_lock", lambda size: False)
    with pytest.raises(ValueError, match=r"layout\.offload nvme: 8 MiB of memory.*ulimit -l.*offload: cpu"):
        nvme._check_lock(2**23)


def test_a_swap_directory_ends_with_its_owner_and_abandoned_ones_with_the_next(tmp_path: Path) -> None:
    abandoned, living = (tmp_path / f"espalier-swap-{name}" for name in ("abandoned", "living"))
    for path in (abandoned, living):
        path.mkdir()
        (path / "state").touch()
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    directory = nvme.SwapDirectory(tmp_path)
    assert directory.path.is_dir()
    assert not abandoned.exists()
    assert (living / "state").exists()
    os.close(handle)
    mine = directory.path
    del directory
    assert not mine.exists()


def test_blocks_are_reserved_before_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = nvme._mapped(tmp_path, 1000)
    assert tensor.shape == (1000,)
    assert not tensor.any()
    assert list(tmp_path.iterdir()) == [], "the file has no name: it ends with the tensor"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no space left"):
        nvme._mapped(tmp_path, 1000)
