"""Signs of life: a process changes its log as long as it lives, so that others can tell afterwards how long it did."""

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

SIGN_SECONDS = 2.0
"""How often. Nothing is written, so that it also works on a full disk."""


def show_life(log: Path) -> None:
    """Touch ``log`` every :data:`SIGN_SECONDS`, in a thread that ends with the process, or when the log is deleted."""
    threading.Thread(target=_touch, args=(log,), name="signs of life", daemon=True).start()


def last_sign(logs: Iterable[Path]) -> float:
    """When any of the processes behind ``logs`` last gave a sign, in seconds since 1970; 0 without any log."""
    return max((log.stat().st_mtime for log in logs if log.exists()), default=0.0)


def _touch(log: Path) -> None:
    while True:
        now = time.time()  # this node's clock, as in the events, not the file server's
        try:
            os.utime(log, (now, now))
        except FileNotFoundError:
            return
        time.sleep(SIGN_SECONDS)
