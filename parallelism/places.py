"""Files that several machines share: on a file system, or in an object store of which each machine holds copies.

:func:`mirror` says that a folder of this process is a copy of an object store's. From then on, below that folder, what
the others shall see has to be shared (:func:`share`) once it is whole, and what they have shared has to be asked for
(:func:`need`) before it is opened; everything else here looks at the store itself. Below any other folder all of this
is what it is on a file system, and sharing and asking do nothing. Torch-free.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallelism.objects import PATIENCE_SECONDS, ObjectTree, Stored
from parallelism.private import private_folder

LAST = ("manifest.json",)
"""Stored behind all other files of a folder: with it, they count."""

_trees: dict[Path, ObjectTree] = {}


def mirror(root: Path, tree: ObjectTree) -> None:
    """From now on, ``root`` is this machine's copy of what lies in the store.

    Recorded paths begin with it, so that it has to be the same on all machines that share the store.
    """
    _trees[root] = tree


def store_of(path: str | Path) -> tuple[ObjectTree, str] | None:
    """The object store that holds ``path``, and its key there; None on a file system."""
    found = _of(Path(path))
    return (found[1], found[2]) if found else None


def address(path: str | Path) -> str:
    """What :func:`at` finds the same path by in another process: itself, or ``URL#PATH``."""
    found = store_of(path)
    return f"{found[0].url}/{found[1]}".rstrip("/") + f"#{path}" if found else str(path)


def at(address: str, patience_seconds: float = PATIENCE_SECONDS) -> Path:
    """The path at an :func:`address`. Raises ``ValueError`` for a store whose client is not installed."""
    url, _, path = address.partition("#")
    if "://" not in url:
        return Path(address)
    if not is_mirrored(path):
        mirror(Path(path), ObjectTree(url, patience_seconds))
    return Path(path)


def url(path: str | Path) -> str:
    """Where people find a path: itself, or its address in the store."""
    return address(path).partition("#")[0]


def is_mirrored(path: str | Path) -> bool:
    """Whether the truth about ``path`` is in an object store."""
    return _of(Path(path)) is not None


def need(path: str | Path) -> Path:
    """Have this machine's copy of a file, or of all below a folder, as it is in the store, if it is there.

    Processes of one machine take turns, so that each file is fetched once.
    """
    path = Path(path)
    found = _of(path)
    if found is None:
        return path
    root, tree, key = found
    single = tree.stored(key)
    wanted = {path: single} if single else {path / name: stored for name, stored in tree.below(key).items()}
    if all(_is_current(copy, stored) for copy, stored in wanted.items()):
        return path
    with _turn(root, key):
        for copy, stored in wanted.items():
            if not _is_current(copy, stored):
                _fetch(tree, copy.relative_to(root).as_posix(), copy, stored)
    return path


def share(path: str | Path, *, keep: bool = True) -> None:
    """Let the others see a file, or all below a folder. Without ``keep``, the copy here is deleted."""
    path = Path(path)
    found = _of(path)
    if found is None:
        return
    root, tree, _ = found
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (file.name in LAST, file)):
        stored = tree.upload(file, file.relative_to(root).as_posix())
        if keep:
            os.utime(file, (stored.modified, stored.modified))
        else:
            file.unlink(missing_ok=True)


def share_content(path: Path) -> None:
    """Let the others see what is in a file now that others still write to. Raises ``OSError``."""
    found = _of(path)
    if found is not None:
        found[1].put(found[2], path.read_bytes())


def forget(path: str | Path) -> None:
    """Delete this machine's copy of a file or folder, if it is only a copy."""
    if _of(Path(path)) is not None:
        _delete(Path(path))


def leave(path: str | Path, *, except_for: tuple[str, ...] = ()) -> None:
    """Delete this machine's copy of a folder, but for the named entries in it; only a copy is deleted."""
    if _of(Path(path)) is None or not Path(path).is_dir():
        return
    for entry in Path(path).iterdir():
        if entry.name not in except_for:
            _delete(entry)
    with contextlib.suppress(OSError):  # something stays
        Path(path).rmdir()


def exists(path: str | Path) -> bool:
    """Whether there is such a file or folder."""
    found = _of(Path(path))
    return found[1].exists(found[2]) if found else Path(path).exists()


def read_bytes(path: str | Path) -> bytes:
    """A small file. Raises ``FileNotFoundError``."""
    found = _of(Path(path))
    if found is None:
        return Path(path).read_bytes()
    content = found[1].get(found[2])
    if content is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
    return content


def read_range(path: str | Path, start: int, count: int) -> bytes:
    """``count`` bytes of a file of the store from ``start`` on. Raises ``EOFError`` where it ends before."""
    found = _of(Path(path))
    assert found is not None, f"{path} is no file of an object store"
    content = found[1].read(found[2], start, start + count)
    if len(content) < count:
        raise EOFError(f"{path} ends {count - len(content)} bytes early")
    return content


def pieces(path: str | Path, start: int, end: int, piece_bytes: int) -> Iterator[bytes]:
    """The bytes [``start``, ``end``) of a file, a piece at a time; none of it is kept."""
    path = Path(path)
    if is_mirrored(path):
        for begin in range(start, end, piece_bytes):
            yield read_range(path, begin, min(piece_bytes, end - begin))
        return
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (piece := file.read(min(piece_bytes, end - start))):
            yield piece
            start += len(piece)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file: readers see the whole of it or nothing. Raises ``OSError``."""
    path = Path(path)
    found = _of(path)
    if found is not None:
        found[1].put(found[2], text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(draft, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def sizes(directory: str | Path) -> dict[str, int]:
    """Bytes of every file below a folder, by relative name, sorted."""
    directory = Path(directory)
    found = _of(directory)
    if found is not None:
        return {name: stored.bytes for name, stored in found[1].below(found[2]).items()}
    sizes_found = {}
    for folder, _, names in os.walk(directory):
        for path in (Path(folder, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # others delete there meanwhile
                sizes_found[path.relative_to(directory).as_posix()] = path.stat().st_size
    return dict(sorted(sizes_found.items()))


def folders(directory: str | Path) -> list[Path]:
    """The folders directly in a folder, sorted; none where it does not exist."""
    directory = Path(directory)
    found = _of(directory)
    if found is not None:
        return [directory / name for name in found[1].folders(found[2])]
    return sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []


def size(path: str | Path) -> int:
    """Bytes of a file. Raises ``FileNotFoundError``."""
    found = _of(Path(path))
    stored = found[1].stored(found[2]) if found else None
    if found and stored is None:
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
    return stored.bytes if stored else Path(path).stat().st_size


def modified(path: str | Path) -> float:
    """When a file was last written, in seconds since 1970; 0 where there is none."""
    path = Path(path)
    found = _of(path)
    if found is not None:
        stored = found[1].stored(found[2])
        return stored.modified if stored else 0.0
    return path.stat().st_mtime if path.exists() else 0.0


def remove(path: str | Path) -> None:
    """Delete a file, or a folder with all below it, for everybody. Raises ``OSError``."""
    path = Path(path)
    found = _of(path)
    if found is not None:
        found[1].remove(found[2])
    _delete(path)


def discard(path: str | Path) -> None:
    """As :func:`remove`, as far as it goes: what cannot be deleted, or is being deleted by others, is left."""
    with contextlib.suppress(OSError):
        remove(path)
    shutil.rmtree(path, ignore_errors=True)


def copy(source: Path, target: Path) -> None:
    """Make a file appear under a second name: by a hard link, or by a copy inside the store. Raises ``OSError``."""
    found, beside = _of(source), _of(target)
    if found is not None:
        assert beside is not None, f"{target} is not in the store of {source}"
        found[1].copy(found[2], beside[2])
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        target.unlink()
        os.link(source, target)
    except PermissionError:  # a file system without hard links
        shutil.copyfile(source, target)


def _of(path: Path) -> tuple[Path, ObjectTree, str] | None:
    """The mirrored folder above ``path``, its store, and the path's key there."""
    for root, tree in _trees.items():
        if path.is_relative_to(root):
            key = path.relative_to(root).as_posix()
            return root, tree, "" if key == "." else key
    return None


def _is_current(copy: Path, stored: Stored) -> bool:
    try:
        facts = copy.stat()
    except FileNotFoundError:
        return False
    return facts.st_size == stored.bytes and facts.st_mtime == stored.modified


def _fetch(tree: ObjectTree, key: str, copy: Path, stored: Stored) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    draft = copy.with_name(f".{copy.name}.{uuid.uuid4().hex}")
    try:
        tree.download(key, draft)
        os.utime(draft, (stored.modified, stored.modified))
        draft.replace(copy)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _turn(root: Path, key: str) -> Iterator[None]:
    """Only one process of this machine at a time fetches what lies at ``key``."""
    folder = private_folder(Path(tempfile.gettempdir()) / f"espalier-{os.getuid()}")
    name = hashlib.sha256(f"{root}\n{key}".encode()).hexdigest()[:24]
    with open(folder / f"fetch-{name[:2]}", "w", encoding="ascii") as lock:  # few files, which stay
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _delete(path: Path) -> None:
    """On this machine; what is not there is as good as deleted."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
