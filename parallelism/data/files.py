"""The files behind a job's paths, globs, fsspec URLs and built-in corpora. Torch-free."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import zstandard
from fsspec.spec import AbstractBufferedFile

from parallelism.data.config import BUILTIN_PREFIX, DataConfig
from parallelism.data.errors import DataError

ALLOWED_PROTOCOLS = ("file", "memory", "s3", "gs", "az", "abfs")
"""What a spec may read from. http(s) is left out: a spec could use it to reach hosts inside the cluster's network."""

COMPRESSION_FACTOR = 4
"""Bytes of text per byte of a compressed file, for estimates only."""

COMPRESSED = (".gz", ".zst")
ZSTD_READ_BYTES = 1 << 16
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """One input file. ``name`` is what the user recognises, ``size`` the stored bytes, ``field`` who asked for it."""

    name: str
    size: int
    field: str
    filesystem: Any
    path: str
    builtin: bool = False

    @property
    def text_bytes(self) -> int:
        """Bytes of text: exact for plain files, an estimate for compressed ones."""
        return self.size * (COMPRESSION_FACTOR if self.name.lower().endswith(COMPRESSED) else 1)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file's bytes, decompressed by suffix. Raises :class:`DataError` for what cannot be read to its end."""
        try:
            with self.filesystem.open(self.path, "rb") as stored, _decompressed(stored, self.name) as stream:
                yield stream
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            problem = (
                f"cannot be read to its end: {error or type(error).__name__}; is it damaged, cut off or protected?"
            )
            raise DataError(self.field, self.name, problem) from error


def _decompressed(stored: BinaryIO, name: str) -> BinaryIO:
    suffix = name.lower()
    if suffix.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stored))
    if suffix.endswith(".zst"):
        return io.BufferedReader(_ZstdFrames(stored), READ_BYTES)
    if isinstance(stored, AbstractBufferedFile):  # of an object store: its own readline takes no size
        return io.BufferedReader(stored, READ_BYTES)
    return stored


class _ZstdFrames(io.RawIOBase):
    """Zstandard frames one after the other, read as one stream.

    The library's own ``stream_reader`` takes a file that was cut off for one that ends there.
    """

    def __init__(self, stored: BinaryIO) -> None:
        self._stored = stored
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._rest = b""
        self._text = memoryview(b"")  # slicing it copies nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text and self._decompress_more():
            pass
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _decompress_more(self) -> bool:
        """Take in the next piece of the file; False at its end."""
        data = self._rest or self._stored.read(ZSTD_READ_BYTES)
        if not data:
            if self._frame is not None:
                raise EOFError("the file ends inside a Zstandard frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._text = memoryview(self._frame.decompress(data))
        self._rest = b""
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return True


def find_files(patterns: Sequence[str], field: str) -> list[SourceFile]:
    """Every file behind the patterns: patterns in the order given, the matches of one sorted, each file once.

    Raises :class:`DataError` for missing files, patterns without a match, folders and protocols not allowed.
    """
    found: dict[tuple[str, str], SourceFile] = {}
    for number, pattern in enumerate(patterns):
        for file in _matches(pattern, f"{field}.{number}"):
            found.setdefault((str(file.filesystem.protocol), file.path), file)
    return list(found.values())


def _matches(pattern: str, field: str) -> list[SourceFile]:
    if pattern.startswith(BUILTIN_PREFIX):
        return _builtin_files(pattern, field)
    filesystem, path = _filesystem(pattern, field)
    try:
        entries = _entries(filesystem, path)
    except OSError as error:
        raise DataError(field, pattern, f"cannot be read: {error or type(error).__name__}") from error
    if not entries:
        problem = "matches no file" if _is_glob(path) else "there is no such file"
        raise DataError(field, pattern, f"{problem}; relative paths start at {os.getcwd()}")
    files = [entry for entry in entries if entry["type"] != "directory"]
    if not files:
        raise DataError(field, pattern, f"is a folder; name its files, for example {pattern.rstrip('/')}/*")
    prefix = pattern.partition("://")[0] + "://" if "://" in pattern else ""
    return [_source_file(filesystem, entry, prefix, field) for entry in files]


def _source_file(filesystem: Any, entry: dict[str, Any], prefix: str, field: str) -> SourceFile:
    path = str(entry["name"])
    name = path if not prefix or path.startswith(prefix) else prefix + path.lstrip("/")
    # Some stores do not tell a size; zero then only weakens the estimates.
    return SourceFile(name, int(entry.get("size") or 0), field, filesystem, path)


def _entries(filesystem: Any, path: str) -> list[dict[str, Any]]:
    """What stands at a literal path, else what the glob matches, sorted by name."""
    try:
        return [filesystem.info(path)]
    except FileNotFoundError:
        if not _is_glob(path):
            return []
    found = filesystem.glob(path, detail=True)
    return [found[name] for name in sorted(found)]


def _is_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def protocol_of(pattern: str) -> str:
    """``s3`` of ``s3://bucket/key``; ``file`` of a plain path."""
    return pattern.partition("://")[0] if "://" in pattern else "file"


def _filesystem(pattern: str, field: str) -> tuple[Any, str]:
    """The fsspec file system of a URL or path, and the path inside it."""
    protocol = protocol_of(pattern)
    if protocol not in ALLOWED_PROTOCOLS or "::" in pattern:
        allowed = ", ".join(ALLOWED_PROTOCOLS)
        raise DataError(field, pattern, f"protocol not allowed; use a path or one of {allowed}, without chaining (::)")
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except ImportError as error:
        raise DataError(field, pattern, f"needs a package that is not installed here: {error}") from error
    return filesystem, path


def _builtin_files(pattern: str, field: str) -> list[SourceFile]:
    assert pattern == f"{BUILTIN_PREFIX}python-stdlib", "DataConfig refuses other names"
    filesystem = fsspec.filesystem("file")
    root = Path(os.__file__).parent
    files = [
        SourceFile(str(path), path.stat().st_size, field, filesystem, str(path), builtin=True)
        for path in python_stdlib(root)
    ]
    if not files:
        raise DataError(
            field, pattern, f"this Python came without its library's sources in {root}; name your own files"
        )
    return files


LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings"}
)


def python_stdlib(root: Path) -> list[Path]:
    """The ``.py`` files of Python's standard library under ``root``, sorted by path below it.

    Left out, so that the corpus is the same text on every machine with the same Python, and text that people wrote:
    installed packages; the library's own tests (19 MB, absent where a distribution strips them); generated files
    (the code tables in ``encodings``, and the ``config-*`` and ``_sysconfigdata*`` files of one particular build).
    """
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS and not name.startswith("config-")]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def absolute(config: DataConfig, base: Path) -> DataConfig:
    """The same config with relative local paths taken from ``base``, so that it means the same in any process."""

    def anchored(pattern: str) -> str:
        if pattern.startswith(BUILTIN_PREFIX) or "://" in pattern:
            return pattern
        return os.path.join(base.absolute(), os.path.expanduser(pattern))

    changes: dict[str, Any] = {"train": [anchored(pattern) for pattern in config.train]}
    if isinstance(config.validation, list):
        changes["validation"] = [anchored(pattern) for pattern in config.validation]
    if config.tokenizer.path:
        changes["tokenizer"] = config.tokenizer.model_copy(update={"path": anchored(config.tokenizer.path)})
    return config.model_copy(update=changes)
