"""``python -m launcher.attend JOURNAL SUBMISSION COMMAND …``: a command elsewhere, stopped through a shared file.

Whoever cannot send it signals creates the file: the command is asked to end, once. With :data:`NOW` in the file it is
ended. What it prints goes on in the job's log. Torch-free.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from launcher.environment import end_with_parent
from launcher.journal import Journal, open_journal
from launcher.policy import TEMPORARY_EXIT_CODE
from parallelism import places
from parallelism.objects import StoreAwayError

POLL_SECONDS = 0.5
NOW = "now"
LAST_BYTES = 2000


def stop_file(journal: Journal, submission: str) -> Path:
    """Where one submission of a job is asked to end."""
    return journal.cluster_dir / f"stop.{submission}"


def ask_to_stop(file: Path, *, now: bool = False) -> None:
    """Create the file."""
    places.write_text(file, NOW if now else "")


def attend(command: Sequence[str], file: Path, watch: Callable[[], bool] = lambda: True) -> int:
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
            asks = _asked(file)
            if asks == NOW or not watch():
                _signal(child, signal.SIGKILL)
            elif asks is not None and not asked:
                asked = True
                _signal(child, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    code = child.returncode
    return code if code >= 0 else 128 - code


def attend_logged(journal: Journal, run: Callable[[], int]) -> int:
    """The exit code of what ``run`` runs, all of whose output goes on in the coordinator's log.

    In an object store, the log is shared once more at the end. Where the command failed, the end of the log is also
    printed to where this process's output went before, for those who see that alone.
    """
    log = journal.log_path("coordinator")
    try:
        with _output_to(places.need(log)):
            code = run()
    except StoreAwayError as error:
        print(error, file=sys.stderr)
        return TEMPORARY_EXIT_CODE
    with contextlib.suppress(OSError):  # the next attempt's are more interesting
        places.share_content(log)
    if code and log.exists():
        print(log.read_bytes()[-LAST_BYTES:].decode(errors="replace"), file=sys.stderr)
    return code


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Whatever this process and its children print goes to the end of ``log`` inside the block."""
    kept = [os.dup(number) for number in (1, 2)]
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        for number in (1, 2):
            os.dup2(target, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, before in zip((1, 2), kept, strict=True):
            os.dup2(before, number)
        for number in (target, *kept):
            os.close(number)


def _leave_it_to_the_command(number: int, frame: FrameType | None) -> None:
    """A handler and not SIG_IGN, which the command would inherit."""


def _asked(file: Path) -> str | None:
    try:
        return places.read_bytes(file).decode().strip()
    except FileNotFoundError:
        return None


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(number)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process."""
    location, submission, *command = arguments
    journal = open_journal(location)
    return attend_logged(journal, lambda: attend(command, stop_file(journal, submission)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
