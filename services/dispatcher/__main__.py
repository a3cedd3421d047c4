"""The dispatcher's process: ``python -m services.dispatcher SETTINGS [--keeper PID]``.

SIGTERM, or the end of its keeper, and it leaves: jobs go on, and the next dispatcher takes them up. SIGINT, and every
running job writes its checkpoints and ends first.
"""

import os
import signal
import sys
from types import FrameType

from services.dispatcher.loop import Dispatcher
from services.process import parse, say_in_log
from services.settings import Settings


class Ending:
    """Whether, and how, to end."""

    def __init__(self, keeper: int | None) -> None:
        self._keeper = keeper
        self._asked: str | None = None
        signal.signal(signal.SIGTERM, self._heard)
        signal.signal(signal.SIGINT, self._heard)

    def __call__(self) -> str | None:
        """``stop``, ``leave`` or None."""
        if self._asked is None and self._keeper is not None and os.getppid() != self._keeper:
            return "leave"
        return self._asked

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self._asked = "stop" if number == signal.SIGINT else self._asked or "leave"


def main() -> int:
    """Entry point of the process."""
    run_dispatcher(*parse("services.dispatcher"))
    return 0


def run_dispatcher(settings: Settings, keeper: int | None = None) -> None:
    """Dispatch until SIGTERM or SIGINT, or until the parent process ``keeper`` has ended."""
    say_in_log()
    Dispatcher(settings).run(Ending(keeper))


if __name__ == "__main__":
    sys.exit(main())
