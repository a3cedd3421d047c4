"""A folder of an object store, through fsspec: whole objects, exclusive creation, patience with a store that is away.

Everything else that a file system has (locks, links, half-written files) an object store lacks. Torch-free.
"""

import contextlib
import errno
import functools
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec

PATIENCE_SECONDS = 600.0
"""How long a store that does not answer is waited for."""
LONGEST_WAIT_SECONDS = 5.0

FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Answers, and not trouble on the way to one."""

_T = TypeVar("_T")


class StoreAwayError(OSError):
    """The object store has not answered in time."""


@dataclass(frozen=True)
class Stored:
    """What the store says of one object; ``modified`` in seconds since 1970, by the store's clock."""

    bytes: int
    modified: float


class ObjectTree:
    """The objects whose addresses begin with ``url``, such as ``s3://bucket/jobs/demo-3fa9c1``.

    Keys are relative to it. Every method raises :class:`StoreAwayError` when the store has not answered for
    ``patience_seconds``, ``PermissionError`` where it refuses, ``FileNotFoundError`` for what is not there.
    """

    def __init__(self, url: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.url = url.rstrip("/")
        self._patience_seconds = patience_seconds
        try:
            # Listings that were true a moment ago are worth nothing where others write.
            self._files, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise ValueError(f"{url}: {error}; install espalier-service[objects]") from error
        self._root = str(root).rstrip("/")

    def create(self, key: str, content: bytes) -> bool:
        """Create an object; False, and nothing changed, where there is one already (``If-None-Match: *``)."""
        return self._patiently(self._create, key, content)

    def _create(self, key: str, content: bytes) -> bool:
        try:
            self._files.pipe_file(self._path(key), content, mode="create")
        except OSError as error:
            refused = isinstance(error, FileExistsError) or error.errno == errno.EINVAL
            if not refused:
                raise
            found = self._get(key)
            if found is None:
                raise
            # A try whose answer was lost may have created it; no two writers write the same bytes.
            return found == content
        return True

    def check(self) -> None:
        """Raise ``ValueError`` for a store that creates what is there already, or refuses; leaves nothing behind."""
        key = f".probe-{uuid.uuid4().hex}"
        try:
            self._files.pipe_file(self._path(key), b"1", mode="create")
            if self._create(key, b"2"):
                raise ValueError(
                    f"{self.url}: the store ignores If-None-Match on PUT, so that two coordinators could write one "
                    "job's journal: use a store that honours it"
                )
        except FINAL as error:
            raise ValueError(f"{self.url} cannot be written to: {type(error).__name__}: {error}") from error
        except _troubles() as error:
            text = f"{self.url} does not answer: {type(error).__name__}: {error}"
            raise (ValueError(text) if _is_our_fault(error) else StoreAwayError(text)) from error
        finally:
            with contextlib.suppress(*_troubles()):
                self._files.rm(self._path(key))

    def put(self, key: str, content: bytes) -> None:
        """Create or replace an object."""
        self._patiently(self._files.pipe_file, self._path(key), content)

    def get(self, key: str) -> bytes | None:
        """An object, or None where there is none."""
        return self._patiently(self._get, key)

    def _get(self, key: str) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(self._path(key))
        except FileNotFoundError:
            return None
        return content

    def read(self, key: str, start: int, end: int | None = None) -> bytes:
        """The bytes of an object in [``start``, ``end``)."""
        content: bytes = self._patiently(self._files.cat_file, self._path(key), start=start, end=end)
        return content

    def exists(self, key: str) -> bool:
        """Whether there is such an object, or any below it; a folder without objects is nothing."""
        return self.stored(key) is not None or bool(self.below(key))

    def stored(self, key: str) -> Stored | None:
        """What is known of an object; None where there is none."""
        try:
            row = self._patiently(self._files.info, self._path(key))
        except FileNotFoundError:
            return None
        return _stored(row) if row["type"] == "file" else None

    def below(self, key: str) -> dict[str, Stored]:
        """Every object below ``key/``, by its name relative to that."""
        path = self._path(key)
        rows = self._patiently(self._files.find, path, detail=True)
        return {
            name.removeprefix(f"{path}/"): _stored(row)
            for name, row in sorted(rows.items())
            if name.startswith(f"{path}/") and row["type"] == "file" and not name.endswith("/")
        }

    def folders(self, key: str) -> list[str]:
        """Names directly below ``key/`` that have objects below them, sorted."""
        path = self._path(key)
        try:
            rows = self._patiently(self._files.ls, path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [str(row["name"]).rstrip("/") for row in rows if row["type"] == "directory"]
        return sorted(name.removeprefix(f"{path}/") for name in names if name != path)

    def remove(self, key: str) -> None:
        """Delete an object, or everything below ``key/``; what is not there is as good as deleted."""
        try:
            self._patiently(self._files.rm, self._path(key), recursive=True)
        except FileNotFoundError:
            return

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store."""
        self._patiently(self._files.cp_file, self._path(source), self._path(target))

    def upload(self, path: Path, key: str) -> Stored:
        """Store a file; it appears whole or not at all. Raises ``OSError`` where less arrived."""
        self._patiently(self._files.put_file, str(path), self._path(key))
        found = self.stored(key)
        if found is None or found.bytes != path.stat().st_size:
            raise OSError(errno.EIO, "not all of a file was stored", f"{self.url}/{key}")
        return found

    def download(self, key: str, path: Path) -> None:
        """Write an object into a new file."""
        self._patiently(self._files.get_file, self._path(key), str(path))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _patiently(self, action: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
        """Try until the store answers, saying once that it does not."""
        deadline, wait = time.monotonic() + self._patience_seconds, 0.1
        told = False
        while True:
            try:
                return action(*arguments, **options)
            except FINAL:
                raise
            except _troubles() as error:
                if _is_our_fault(error):
                    raise
                if time.monotonic() > deadline:
                    text = f"the object store does not answer: {type(error).__name__}: {error}"
                    raise StoreAwayError(errno.EIO, text, self.url) from error
                if not told:
                    print(f"waiting for {self.url}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    told = True
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def _is_our_fault(error: BaseException) -> bool:
    """Whether asking again is of no use: the request itself is wrong, or there are no credentials."""
    wrong = ("ParamValidationError", "NoCredentialsError", "PartialCredentialsError")
    return (isinstance(error, OSError) and error.errno == errno.EINVAL) or type(error).__name__ in wrong


def _stored(row: dict[str, Any]) -> Stored:
    modified = row.get("LastModified") or row.get("mtime") or row.get("created") or 0.0
    seconds = modified.timestamp() if isinstance(modified, datetime) else float(modified)
    return Stored(int(row["size"]), float(int(seconds)))


@functools.cache
def _troubles() -> tuple[type[BaseException], ...]:
    """What goes wrong on the way to a store, in the words of the libraries that are installed."""
    found: list[type[BaseException]] = [OSError]
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return tuple(found)
    return (*found, BotoCoreError, ClientError)
