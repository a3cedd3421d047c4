"""Ends a rank that makes no progress: collectives whose peers are gone hang rather than fail."""

import faulthandler
import os
import threading
import time
from types import TracebackType

from parallelism.result import STALLED_EXIT_CODE, Report

LAST_WORDS_SECONDS = 5.0
"""How long the report of a stall may take before the process ends without it."""

START_UP_PATIENCE = 3.0
"""Until the first step, which loads, builds and compiles, this many times ``seconds`` may pass."""


class Watchdog:
    """A thread that ends this process with :data:`STALLED_EXIT_CODE` when ``seconds`` pass without a :meth:`beat`.

    Used as a context manager around everything that may hang. Before it ends the process it reports ``stalled`` and
    prints where every thread stands to stderr.
    """

    def __init__(self, seconds: float, rank: int, report: Report) -> None:
        self._seconds = seconds
        self._rank = rank
        self._report = report
        self._ended = threading.Event()
        self._patience = START_UP_PATIENCE
        self._last = (time.monotonic(), 0, "start-up")

    def beat(self, step: int, doing: str) -> None:
        """Progress was made: ``step`` steps are done, and ``doing`` comes next."""
        self._last = (time.monotonic(), step, doing)

    def stepped(self, step: int) -> None:
        """As :meth:`beat`, after an optimizer step."""
        self._patience = 1.0
        self.beat(step, "training")

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, name="stall-watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 10)):
            beat_at, step, doing = self._last
            if time.monotonic() - beat_at > self._seconds * self._patience:
                self._end_process(step, doing)

    def _end_process(self, step: int, doing: str) -> None:
        fields = {"step": step, "doing": doing, "seconds": self._seconds * self._patience, "rank": self._rank}
        # In a thread of its own, because whoever listens may hang as well.
        words = threading.Thread(target=self._report, args=("stalled", fields), daemon=True)
        words.start()
        faulthandler.dump_traceback()
        words.join(LAST_WORDS_SECONDS)
        os._exit(STALLED_EXIT_CODE)
