"""Signs of life: a process changes its log as long as it lives, so that others can tell afterwards how long it did.

Where the log lies in an object store, the process also puts its copy there, every few seconds.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from parallelism import places

SIGN_SECONDS = 2.0
"""How often. Nothing is written, so that it also works on a full disk."""
STORE_SECONDS = 10.0
"""How often at least, in an object store."""


def show_life(log: Path) -> None:
    """Touch ``log`` every :data:`SIGN_SECONDS`, in a thread that ends with the process, or when the log is deleted."""
    threading.Thread(target=_touch, args=(log,), name="signs of life", daemon=True).start()


def last_sign(logs: Iterable[Path]) -> float:
    """When any of the processes behind ``logs`` last gave a sign, in seconds since 1970; 0 without any log."""
    return max(map(places.modified, logs), default=0.0)


def _touch(log: Path) -> None:
    stored_bytes, stored_at = -1, 0.0
    while True:
        now = time.time()  # this node's clock, as in the events, not the file server's
        try:
            os.utime(log, (now, now))
            size = log.stat().st_size
        except FileNotFoundError:
            return
        if places.is_mirrored(log) and (size != stored_bytes or now > stored_at + STORE_SECONDS):
            with contextlib.suppress(OSError):  # the next one may come through
                places.share_content(log)
                stored_bytes, stored_at = size, now
        time.sleep(SIGN_SECONDS)
