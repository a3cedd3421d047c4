"""Taking turns at a directory, so that processes that prepare the same data do not all do the work. Torch-free.

Nothing that is written depends on the turn being held: every writer has its own folder. A holder that was stopped
(SIGSTOP, a dead mount) therefore costs others a wait, never their data; and where a file system knows no locks, the
work is done twice.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "prepare.lock"
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.1


class Turn:
    """``held`` says whether this process holds the lock; a holder calls :meth:`alive` while it works."""

    def __init__(self, path: Path, held: bool) -> None:
        self.held = held
        self._path = path

    def alive(self) -> None:
        """Show those who wait that the work goes on."""
        os.utime(self._path)


@contextmanager
def take_turn(directory: Path, done: Callable[[], bool], patience: float) -> Iterator[Turn]:
    """Wait for the lock, for ``done`` to become true, or for a holder to show no life for ``patience`` seconds."""
    path = directory / LOCK
    with open(path, "a") as file:  # closing it releases the lock
        yield Turn(path, _wait(file.fileno(), done, patience))


def _wait(descriptor: int, done: Callable[[], bool], patience: float) -> bool:
    seen, seen_at = os.fstat(descriptor).st_mtime_ns, time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError:  # no locks on this file system
            return False
        if done():
            return False
        touched = os.fstat(descriptor).st_mtime_ns
        if touched != seen:
            seen, seen_at = touched, time.monotonic()
        if time.monotonic() - seen_at > patience:
            return False
        time.sleep(POLL_SECONDS)
