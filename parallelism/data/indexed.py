"""Megatron-core's indexed dataset: tokens in ``.bin``, documents in ``.idx``. Torch-free, memory bounded.

The format of ``megatron.core.datasets.indexed_dataset`` (version 1, little-endian): ``.bin`` is all tokens in a row;
``.idx`` is ``MMIDIDX\\0\\0``, uint64 1, uint8 code of the token type, uint64 sequences, uint64 documents + 1, then
int32 [sequences] lengths, int64 [sequences] offsets in bytes, int64 [documents + 1] first sequence of each document.
Here every document is one sequence.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPE_CODES: dict[type[np.integer], int] = {np.uint16: 8, np.int32: 4}
HEADER = struct.Struct("<9sQBQQ")
CHUNK = 1 << 20
"""Documents whose index entries are held in memory at once."""


class IndexedWriter:
    """Writes ``PREFIX.bin`` as documents come and ``PREFIX.idx`` at the end; a context manager that closes both.

    ``documents`` and ``tokens`` count what was written; ``sha256`` is that of the ``.bin`` file.
    """

    def __init__(self, prefix: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
        self.documents = 0
        self.tokens = 0
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = TYPE_CODES[dtype]
        self._hash = hashlib.sha256()
        self._files = ExitStack()
        self._bin = self._files.enter_context(open(bin_path(prefix), "wb"))
        self._lengths = self._files.enter_context(open(self._lengths_path, "wb+"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def _lengths_path(self) -> Path:
        return self._prefix.with_name(self._prefix.name + ".lengths")

    @property
    def sha256(self) -> str:
        """Hash of the tokens written so far."""
        return self._hash.hexdigest()

    def add(self, documents: list[np.ndarray]) -> None:
        """Append documents, each an integer array [tokens]."""
        if not documents:
            return
        tokens = np.concatenate(documents).astype(self._dtype, copy=False)
        self._hash.update(tokens.data)
        self._bin.write(tokens.data)
        self._lengths.write(np.array([len(document) for document in documents], "<i4").data)
        self.documents += len(documents)
        self.tokens += len(tokens)

    def finish(self) -> None:
        """Write the index and force both files to the disk."""
        with open(idx_path(self._prefix), "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, self.documents, self.documents + 1))
            self._copy_lengths(index)
            self._write_offsets(index)
            for start in range(0, self.documents + 1, CHUNK):
                index.write(np.arange(start, min(start + CHUNK, self.documents + 1), dtype="<i8").data)
            _to_disk(index)
        _to_disk(self._bin)
        self._files.close()
        self._lengths_path.unlink()

    def _length_chunks(self) -> Iterator[np.ndarray]:
        self._lengths.seek(0)
        while part := self._lengths.read(4 * CHUNK):
            yield np.frombuffer(part, "<i4")

    def _copy_lengths(self, index: BinaryIO) -> None:
        for lengths in self._length_chunks():
            index.write(lengths.data)

    def _write_offsets(self, index: BinaryIO) -> None:
        offset = 0
        for lengths in self._length_chunks():
            ends = offset + np.cumsum(lengths.astype(np.int64)) * self._dtype.itemsize
            index.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").data)
            offset = int(ends[-1])


def open_tokens(prefix: Path) -> np.ndarray:
    """All tokens of an indexed dataset in a row, mapped into memory read-only."""
    with open(idx_path(prefix), "rb") as index:
        magic, version, code, _, _ = HEADER.unpack(index.read(HEADER.size))
    if magic != MAGIC or version != VERSION or code not in TYPE_CODES.values():
        raise ValueError(f"{idx_path(prefix)} is not an index that espalier wrote; prepare the data again")
    dtype = next(dtype for dtype, known in TYPE_CODES.items() if known == code)
    return np.memmap(bin_path(prefix), np.dtype(dtype).newbyteorder("<"), mode="r")


def bin_path(prefix: Path) -> Path:
    """Where the tokens stand."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Where the index stands."""
    return prefix.with_name(prefix.name + ".idx")


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
