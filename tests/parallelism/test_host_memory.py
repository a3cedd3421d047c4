"""Free memory within the limits of control groups, of both versions, as files of the kernel state them."""

from pathlib import Path

import psutil
import pytest

from parallelism import host_memory
from parallelism.host_memory import available_memory, group_headroom

NO_LIMIT_1 = str(2**63 - 4096)
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} {cached}\nshmem 7\n")


def test_the_limit_of_a_container_counts_less_what_is_used_and_cannot_be_taken_back(tmp_path: Path) -> None:
    group(tmp_path, VERSION_2, "1000000", used=600_000, cached=250_000)
    assert list(group_headroom(tmp_path, "0::/\n")) == [650_000]


def test_groups_above_ours_count(tmp_path: Path) -> None:
    """Slurm limits the job, not the task that runs in it."""
    for folder, limit, used in (("", NO_LIMIT_1, 9), ("slurm/job_7", "5000", 1000), ("slurm/job_7/task", "9000", 400)):
        group(tmp_path / "memory" / folder, VERSION_1, limit, used, cached=0)
    assert list(group_headroom(tmp_path, "3:cpu,cpuacct:/\n9:memory:/slurm/job_7/task\n0::/\n")) == [8600, 4000]


def test_a_container_that_is_told_a_path_outside_of_it(tmp_path: Path) -> None:
    group(tmp_path / "memory", VERSION_1, "5000", used=6000, cached=0)
    assert list(group_headroom(tmp_path, "9:memory:/docker/0a1b\n")) == [0]


@pytest.mark.parametrize("limit", ["max", str(2**60)])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    group(tmp_path, VERSION_2, limit, used=1, cached=0)
    assert list(group_headroom(tmp_path, "0::/\n")) == []
    assert list(group_headroom(tmp_path / "elsewhere", "0::/\n")) == []


def test_what_is_available_is_the_least_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "MOUNT", tmp_path)
    monkeypatch.setattr(host_memory, "MEMBERSHIP", tmp_path / "membership")
    total = psutil.virtual_memory().total
    assert 0 < available_memory() < total
    (tmp_path / "membership").write_text("0::/job\n")
    group(tmp_path / "job", VERSION_2, str(3 << 20), used=1 << 20, cached=0)
    assert available_memory() == 2 << 20
