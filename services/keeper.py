"""``python -m services.keeper PID COMMAND …``: runs a command that ends with its keeper, whatever ends the keeper.

For programs that cannot look after that themselves. Imports nothing heavy: one of these stands beside each of them.
When it is killed itself, the command is told to end by the kernel (on Linux).
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType

from launcher.environment import end_with_parent

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 10.0


def main() -> int:
    """Entry point of the process; returns the command's exit code."""
    keeper, command = int(sys.argv[1]), sys.argv[2:]
    ending = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        ending = True

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent(signal.SIGTERM))
    while child.poll() is None and not ending and os.getppid() == keeper:
        time.sleep(POLL_SECONDS)
    _end_group(child)
    return child.wait()


def _end_group(child: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then make it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    if _signalled(child.pid, signal.SIGTERM):
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    _signalled(child.pid, signal.SIGKILL)


def _signalled(group: int, number: signal.Signals) -> bool:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
