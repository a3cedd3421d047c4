"""safetensors files written and read one tensor at a time."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compression.container import TensorFile, TensorSpec, write

TENSORS = {
    "codes": torch.arange(7, dtype=torch.uint8),
    "scales": torch.tensor([[1.5], [0.25]], dtype=torch.float16),
    "weights": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.randn(3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "nothing": torch.empty(0, dtype=torch.uint8),
    "transposed": torch.arange(6.0).view(2, 3).t(),
}


def _write(path: Path) -> int:
    specs = {name: TensorSpec.of(tensor) for name, tensor in TENSORS.items()}
    return write(path, specs, TENSORS.__getitem__, {"made": "for a test"})


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    size = _write(tmp_path / "file.safetensors")
    assert size == (tmp_path / "file.safetensors").stat().st_size
    found = load_file(tmp_path / "file.safetensors")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == {"made": "for a test"}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "file.safetensors")
    file = TensorFile(tmp_path / "file.safetensors")
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor), name


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    _write(tmp_path / "first")
    specs = {name: TensorSpec.of(TENSORS[name]) for name in reversed(TENSORS)}
    write(tmp_path / "second", specs, TENSORS.__getitem__, {"made": "for a test"})
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file.safetensors"
    _write(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"file\.safetensors is truncated or no safetensors file"):
        TensorFile(path)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    _write(path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="it ends inside codes"):
        file.read("codes")


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    def read(name: str) -> torch.Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        write(tmp_path / "file", {"a": TensorSpec(torch.uint8, (4,))}, read, {})
    assert list(tmp_path.iterdir()) == []
