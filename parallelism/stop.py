"""Asking a running trainer to stop. Torch-free."""

from typing import Literal

StopReason = Literal["signal", "pause", "cancel"]
REASONS: tuple[StopReason, ...] = ("signal", "pause", "cancel")
"""From weak to strong: of several requests the strongest is reported."""


class StopRequest:
    """A request that another thread or a signal handler leaves for the training loop, which looks once per step."""

    def __init__(self) -> None:
        # A set and no lock: adding is atomic, and a signal handler may interrupt the very thread that held a lock.
        self._reasons: set[StopReason] = set()

    def request(self, reason: StopReason) -> None:
        """Checkpoint and return after the current step. Callable from any thread and any number of times."""
        self._reasons.add(reason)

    @property
    def reason(self) -> StopReason | None:
        """The strongest reason given so far."""
        return max(self._reasons.copy(), key=REASONS.index, default=None)
