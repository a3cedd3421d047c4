"""A coordinator in a pod: ``python -m launcher.pod run JOURNAL SUBMISSION COMMAND …``.

A file beside the stop file says that it lives. Whatever takes a pod away waits for that: in each pod, ``end JOURNAL
SUBMISSION SECONDS`` runs before its end, asks the coordinator for its checkpoints and waits until it has ended. A file
that is left over tells ``run`` that an earlier life of the same submission was cut off (the head's pod was lost): the
submission ends then, and the dispatcher decides. After a suspension, for which pods wait, there is none, and the job
goes on. Torch-free.
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.attend import ask_to_stop, attend, attend_logged, stop_file
from launcher.journal import open_journal
from launcher.policy import TEMPORARY_EXIT_CODE
from parallelism import places
from parallelism.objects import StoreAwayError

POLL_SECONDS = 1.0


def alive_file(stop: Path) -> Path:
    """Is there while the coordinator is."""
    return stop.with_name(f"{stop.name}.alive")


def run(stop: Path, command: Sequence[str]) -> int:
    """The command's exit code, as :func:`attend` has it; ``TEMPORARY_EXIT_CODE`` after a life that was cut off."""
    alive = alive_file(stop)
    if places.exists(alive):
        places.remove(alive)
        print("an earlier life of this submission was cut off: whoever submitted it decides", file=sys.stderr)
        return TEMPORARY_EXIT_CODE
    places.remove(stop)
    places.write_text(alive, "")
    try:
        return attend(command, stop)
    finally:
        places.remove(alive)


def end(stop: Path, seconds: float) -> None:
    """Ask the coordinator, if it lives, to checkpoint and end, and wait for that."""
    alive, deadline = alive_file(stop), time.monotonic() + seconds
    if places.exists(alive) and not places.exists(stop):
        ask_to_stop(stop)
    while places.exists(alive) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to all processes; the coordinator hears of it by the file
    verb, location, submission, *rest = arguments
    journal = open_journal(location)
    stop = stop_file(journal, submission)
    if verb == "run":
        return attend_logged(journal, lambda: run(stop, rest))
    (seconds,) = map(float, rest)
    try:
        end(stop, seconds)
    except StoreAwayError as error:
        print(error, file=sys.stderr)
        return TEMPORARY_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
