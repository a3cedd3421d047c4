"""Small real tasks for tests of the pool."""

import os
import signal
import time
from pathlib import Path


def echo(value: int) -> int:
    """The value."""
    return value


def sleep(seconds: float) -> tuple[float, float]:
    """When it began and when it ended."""
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def die_the_first_times(folder: str, times: int) -> int:
    """Kill this process, until that has happened ``times`` times; then the number of deaths."""
    deaths = len(list(Path(folder).glob("death-*")))
    if deaths < times:
        (Path(folder) / f"death-{deaths}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return deaths


def refuse() -> None:
    """Fail as for a user's mistake."""
    raise ValueError("field x is 9: use 3")
