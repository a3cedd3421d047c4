"""``python -m launcher.attend STOP_FILE COMMAND …``: a command elsewhere that is stopped through a shared file.

Whoever cannot send it signals creates the file: the command is asked to end, once. With :data:`NOW` in the file it is
ended. Torch-free.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from launcher.environment import end_with_parent
from launcher.policy import TEMPORARY_EXIT_CODE
from parallelism import places
from parallelism.objects import StoreAwayError

POLL_SECONDS = 0.5
NOW = "now"


def ask_to_stop(stop_file: Path, *, now: bool = False) -> None:
    """Create the file."""
    places.write_text(stop_file, NOW if now else "")


def attend(command: Sequence[str], stop_file: Path, watch: Callable[[], bool] = lambda: True) -> int:
    """Run a command to its end; its exit code as a shell has it (128 + the signal that ended it).

    SIGTERM to this process does nothing: batch systems send it to all processes, and twice it means something else to a
    coordinator. When ``watch`` returns false, what the command needs is gone, and so is the command. It also ends with
    this process, whatever ends that.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=end_with_parent())
    before = signal.signal(signal.SIGTERM, _leave_it_to_the_command)
    asked = False
    try:
        while child.poll() is None:
            time.sleep(POLL_SECONDS)
            asks = _asked(stop_file)
            if asks == NOW or not watch():
                _signal(child, signal.SIGKILL)
            elif asks is not None and not asked:
                asked = True
                _signal(child, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    code = child.returncode
    return code if code >= 0 else 128 - code


def _leave_it_to_the_command(number: int, frame: FrameType | None) -> None:
    """A handler and not SIG_IGN, which the command would inherit."""


def _asked(stop_file: Path) -> str | None:
    try:
        return places.read_bytes(stop_file).decode().strip()
    except FileNotFoundError:
        return None


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def main() -> int:
    """Entry point of the process."""
    try:
        return attend(sys.argv[2:], places.at(sys.argv[1]))
    except StoreAwayError as error:
        print(error, file=sys.stderr)
        return TEMPORARY_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
