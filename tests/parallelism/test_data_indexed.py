"""The files are megatron-core's: its own reader finds every document, its own writer writes the same bytes."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from parallelism.data import indexed
from parallelism.data.indexed import bin_path, idx_path, open_tokens, writing


def documents(dtype: type) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    lengths = [1, 7, 1, 300, *draw.integers(1, 50, 500)]
    return [draw.integers(0, np.iinfo(dtype).max, length).astype(dtype) for length in lengths]


def write(prefix: Path, dtype: type, parts: list[np.ndarray]) -> str:
    with writing(prefix, dtype) as writer:
        writer.add(parts[:3])
        writer.add([])
        writer.add(parts[3:])
        writer.finish()
    assert (writer.documents, writer.tokens) == (len(parts), sum(map(len, parts)))
    return writer.sha256


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_megatron_reads_what_was_written(
    tmp_path: Path, dtype: type, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "CHUNK", chunk)
    parts = documents(dtype)
    write(tmp_path / "x", dtype, parts)
    read = IndexedDataset(str(tmp_path / "x"))
    assert len(read) == len(parts)
    assert read.document_indices.tolist() == list(range(len(parts) + 1))
    for index, part in enumerate(parts):
        assert read[index].dtype == dtype
        assert read[index].tolist() == part.tolist()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["x.bin", "x.idx"]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_bytes_are_those_of_megatrons_own_builder(tmp_path: Path, dtype: type) -> None:
    parts = documents(dtype)
    write(tmp_path / "ours", dtype, parts)
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=dtype)
    for part in parts:
        builder.add_document(torch.from_numpy(part.astype(np.int64)), [len(part)])
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()


def test_open_tokens_maps_all_documents_in_a_row(tmp_path: Path) -> None:
    parts = documents(np.uint16)
    write(tmp_path / "x", np.uint16, parts)
    tokens = open_tokens(tmp_path / "x")
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == np.concatenate(parts).tolist()
    assert not tokens.flags.writeable


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    digest = write(tmp_path / "x", np.int32, documents(np.int32))
    assert digest == hashlib.sha256((tmp_path / "x.bin").read_bytes()).hexdigest()


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", np.uint16, documents(np.uint16))
    idx_path(tmp_path / "x").write_bytes(b"something else entirely, of 34 bytes or more")
    with pytest.raises(ValueError, match="not an index"):
        open_tokens(tmp_path / "x")
