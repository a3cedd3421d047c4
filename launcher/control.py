"""What the coordinator is asked to do: desired state, signals, and whether its keeper still lives. Torch-free."""

import os
import signal
import time
from types import FrameType

from launcher.journal import Journal
from parallelism.stop import REASONS, StopReason


class Stopped(RuntimeError):
    """Work was left off because somebody asked for it; everything that counts is written down."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(f"stopped: {reason}")
        self.reason: StopReason = reason


class Control:
    """Gathers the reasons to stop; the strongest of them counts and none is taken back."""

    def __init__(self, journal: Journal, keeper: int | None = None, poll_seconds: float = 1.0) -> None:
        """``keeper``: a process of this machine that the coordinator does not outlive."""
        self._journal = journal
        self._keeper = keeper
        self._poll_seconds = poll_seconds
        self._next_poll = 0.0
        self._reasons: set[StopReason] = set()
        self._signals = 0

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests to checkpoint and end. Call it in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def reason(self) -> StopReason | None:
        """Why to stop, or None. Looks into the journal about once a second."""
        now = time.monotonic()
        if now >= self._next_poll:
            self._next_poll = now + self._poll_seconds
            self._look()
        return max(self._reasons.copy(), key=REASONS.index, default=None)

    @property
    def impatient(self) -> bool:
        """Whether the signal came twice: end now, without a checkpoint."""
        return self._signals > 1

    def _look(self) -> None:
        desired = self._journal.desired()
        if desired != "run":
            self._reasons.add(desired)
        if self._keeper is not None and os.getppid() != self._keeper:
            self._reasons.add("signal")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._reasons.add("signal")
