"""The few operations that a journal needs of a store, on a file system and in an object store. Torch-free."""

import errno
import os
import uuid
from pathlib import Path
from typing import Protocol

from parallelism.objects import ObjectTree


class Storage(Protocol):
    """Objects under keys such as ``events/00000001.json``. A reader never sees half an object."""

    def put_exclusive(self, key: str, content: bytes) -> bool:
        """Create the object; False, and nothing changed, where it exists already."""

    def put(self, key: str, content: bytes) -> None:
        """Create or replace the object."""

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""


class LocalStorage:
    """A directory of a local or shared POSIX file system.

    An object is written under a unique name in ``.partial`` and then linked or renamed to its key, both of which are
    atomic on local file systems and on NFS. ``durable`` adds fsync, so that an object survives a power failure once the
    call returns.
    """

    PARTIAL = ".partial"

    def __init__(self, root: Path, durable: bool = True) -> None:
        self.root = root
        self.durable = durable

    def put_exclusive(self, key: str, content: bytes) -> bool:
        target, partial = self._target(key), self._write_partial(content)
        try:
            os.link(partial, target)
        except FileExistsError:
            # NFS may repeat a link that has worked already and then report that it exists.
            if partial.stat().st_nlink < 2:
                return False
        finally:
            partial.unlink()
        self._sync_directory(target.parent)
        return True

    def put(self, key: str, content: bytes) -> None:
        target, partial = self._target(key), self._write_partial(content)
        os.replace(partial, target)
        self._sync_directory(target.parent)

    def get(self, key: str) -> bytes | None:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return (self.root / key).exists()

    def _target(self, key: str) -> Path:
        """Where an object belongs; its folder is made, but not the root: one that has gone is not made again."""
        target = self.root / key
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the job's directory is gone", str(self.root))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _write_partial(self, content: bytes) -> Path:
        partial = self._target(f"{self.PARTIAL}/{uuid.uuid4().hex}")
        try:
            with open(partial, "xb") as file:
                file.write(content)
                if self.durable:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError:  # the disk may be full
            partial.unlink(missing_ok=True)
            raise
        return partial

    def _sync_directory(self, directory: Path) -> None:
        if not self.durable:
            return
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ObjectStorage:
    """The objects below ``prefix`` in an object store, which has to honour ``If-None-Match: *``."""

    def __init__(self, tree: ObjectTree, prefix: str = "") -> None:
        self._tree = tree
        self._prefix = f"{prefix}/" if prefix else ""

    def put_exclusive(self, key: str, content: bytes) -> bool:
        return self._tree.create(f"{self._prefix}{key}", content)

    def put(self, key: str, content: bytes) -> None:
        self._tree.put(f"{self._prefix}{key}", content)

    def get(self, key: str) -> bytes | None:
        return self._tree.get(f"{self._prefix}{key}")

    def exists(self, key: str) -> bool:
        return self._tree.exists(f"{self._prefix}{key}")
