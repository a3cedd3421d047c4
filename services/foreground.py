"""One job in the foreground: its supervisor in a thread, the display and the signals in the main thread."""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from launcher.journal import Journal
from services.progress import Display

REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Work:
    """What keeps a job going, and what ends it; ``pause`` None: the journal is asked."""

    supervise: Callable[[], object]
    stop_hard: Callable[[], object]
    pause: Callable[[], object] | None = None


class Interrupts:
    """Counts SIGINT and SIGTERM while it listens: work goes on after the first, so they must not raise."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def listening(self) -> Iterator["Interrupts"]:
        """Replace the process's handlers inside the block. Main thread only."""
        before = {number: signal.signal(number, self._heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_in_foreground(
    journal: Journal,
    supervise: Callable[[], object],
    stop_hard: Callable[[], object],
    display: Display,
    pause: Callable[[], object] | None = None,
) -> bool:
    """Supervise a job until it rests; the first interrupt asks for checkpoints and a pause, the second ends it at once.

    Returns whether there was an interrupt; raises what ``supervise`` raises. ``journal`` is read beside the
    supervisor's own, so it must be another object; it is asked to pause, unless ``pause`` asks somebody else.
    """
    obeyed = 0
    with ThreadPoolExecutor(1, "supervisor") as threads, Interrupts().listening() as interrupts, display:
        supervision = threads.submit(supervise)
        while not wait([supervision], timeout=REFRESH_SECONDS).done:
            if interrupts.count > 0 and obeyed == 0:
                display.say("Pausing: every candidate writes a checkpoint first. Interrupt again to stop at once.")
                pause() if pause else journal.set_desired("pause")
                obeyed = 1
            if interrupts.count > 1 and obeyed == 1:
                display.say("Stopping at once; the last checkpoints stay.")
                stop_hard()
                obeyed = 2
            display.update(journal.view())
        display.update(journal.view())
    supervision.result()
    return obeyed > 0
