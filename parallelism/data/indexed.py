"""Megatron-core's indexed dataset: tokens in ``.bin``, documents in ``.idx``. Torch-free, memory bounded.

The format of ``megatron.core.datasets.indexed_dataset`` (version 1, little-endian): ``.bin`` is all tokens in a row;
``.idx`` is ``MMIDIDX\\0\\0``, uint64 1, uint8 code of the token type, uint64 sequences, uint64 documents + 1, then
int32 [sequences] lengths, int64 [sequences] offsets in bytes, int64 [documents + 1] first sequence of each document.
Here every document is one sequence.
"""

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
TYPE_CODES: dict[type[np.integer], int] = {np.uint16: 8, np.int32: 4}
HEADER = struct.Struct("<9sQBQQ")
CHUNK = 1 << 20
"""Documents whose index entries are held in memory at once."""


@contextmanager
def writing(prefix: Path, dtype: type[np.uint16] | type[np.int32]) -> Iterator["IndexedWriter"]:
    """A writer of ``PREFIX.bin`` (as documents come) and ``PREFIX.idx`` (when it is told to finish)."""
    # The lengths wait on disk too: the index wants all of them before the first offset.
    with open(bin_path(prefix), "wb") as tokens, tempfile.TemporaryFile(dir=prefix.parent) as lengths:
        yield IndexedWriter(prefix, dtype, tokens, lengths)


class IndexedWriter:
    """What :func:`writing` yields. ``documents`` and ``tokens`` count what was written."""

    def __init__(
        self, prefix: Path, dtype: type[np.uint16] | type[np.int32], tokens: BinaryIO, lengths: BinaryIO
    ) -> None:
        self.documents = 0
        self.tokens = 0
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = TYPE_CODES[dtype]
        self._hash = hashlib.sha256()
        self._bin = tokens
        self._lengths = lengths

    @property
    def sha256(self) -> str:
        """Hash of the ``.bin`` file so far."""
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
