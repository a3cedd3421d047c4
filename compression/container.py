"""safetensors files, written and read one tensor at a time.

The format: eight bytes with the header's length, a JSON header (name → dtype, shape, byte range; ``__metadata__``),
then the tensors without gaps. The library's own writer wants all tensors in memory, its reader maps the whole file;
here neither grows with the number of layers.
"""

import hashlib
import json
import math
import os
import struct
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallelism import places
from parallelism.layer_reader import read_range

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class TensorSpec:
    """What the header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """The spec of an existing tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> int:
    """Write ``path`` under a unique name, then rename it; returns its bytes.

    ``read`` is called once for each name; only one tensor is held at a time. Wider types come first, so that every
    tensor is aligned for readers that map the file. Raises ``OSError``.
    """
    # Sorted by name within a width: the file does not depend on the order in which tensors were made.
    names = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(draft, "wb") as file:
            file.write(_header(names, specs, metadata))
            for name in names:
                file.write(_raw(read(name), specs[name], name))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return size


class TensorFile:
    """The header of a safetensors file, and its tensors on demand; nothing is kept open or mapped.

    Raises ``ValueError`` for a file that is truncated or no safetensors file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = places.need(path)
        header, self._start = self._read_header()
        self.metadata: dict[str, str] = header.pop(_METADATA, {})
        try:
            self.specs = {name: TensorSpec(_DTYPES[row["dtype"]], tuple(row["shape"])) for name, row in header.items()}
            self._offsets = {name: int(row["data_offsets"][0]) for name, row in header.items()}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._damaged(f"the header lacks or misnames {error}") from error
        self.bytes = self.path.stat().st_size
        expected = self._start + sum(spec.bytes for spec in self.specs.values())
        if self.bytes != expected:
            raise self._damaged(f"{self.bytes} bytes long, {expected} expected")
        for name, spec in self.specs.items():
            if not 0 <= self._offsets[name] <= self._offsets[name] + spec.bytes <= self.bytes - self._start:
                raise self._damaged(f"{name} lies outside of it")

    @property
    def header_digest(self) -> str:
        """Hash of names, types, shapes and places of all tensors, and of the metadata."""
        rows = [(name, str(spec), self._offsets[name]) for name, spec in sorted(self.specs.items())]
        return hashlib.sha256(repr((rows, sorted(self.metadata.items()))).encode()).hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        spec = self.specs[name]
        try:
            data = read_range(self.path, self._start + self._offsets[name], spec.bytes)
        except EOFError as error:
            raise self._damaged(f"it ends inside {name}") from error
        if not data:
            return torch.empty(spec.shape, dtype=spec.dtype)
        return torch.frombuffer(data, dtype=spec.dtype).view(spec.shape)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        with open(self.path, "rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise self._damaged("it is shorter than its header")
            (length,) = struct.unpack("<Q", prefix)
            text = file.read(length) if length <= _LARGEST_HEADER else b""
        try:
            header = json.loads(text)
        except ValueError as error:
            raise self._damaged("its header is cut off or no JSON") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is no JSON object")
        return header, 8 + length

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is truncated or no safetensors file ({why}): write it again")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(names: list[str], specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name in names:
        spec = specs[name]
        span = [offset, offset + spec.bytes]
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": span}
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _raw(tensor: Tensor, spec: TensorSpec, name: str) -> Any:
    """The tensor's bytes as a buffer, without a copy."""
    assert TensorSpec.of(tensor) == spec, f"{name}: {TensorSpec.of(tensor)} instead of {spec}"
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
