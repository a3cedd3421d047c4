"""``python -m launcher.pod run STOP_FILE COMMAND …`` and ``… end STOP_FILE SECONDS``: a coordinator in a pod.

A file beside the stop file says that the coordinator lives. Whatever takes a pod away waits for that: ``end`` runs in
each pod before its end, asks the coordinator for its checkpoints and waits until it has ended. One that is left over
tells ``run`` that an earlier life of the same submission was cut off (the head's pod was lost): the submission ends
then, and the dispatcher decides. After a suspension, for which pods wait, there is none, and the job goes on.
Torch-free.
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.attend import ask_to_stop, attend
from launcher.policy import TEMPORARY_EXIT_CODE
from parallelism import places
from parallelism.objects import StoreAwayError

POLL_SECONDS = 1.0


def alive_file(stop_file: Path) -> Path:
    """Is there while the coordinator is."""
    return stop_file.with_name(f"{stop_file.name}.alive")


def run(stop_file: Path, command: Sequence[str]) -> int:
    """The command's exit code, as :func:`attend` has it; ``TEMPORARY_EXIT_CODE`` after a life that was cut off."""
    alive = alive_file(stop_file)
    if places.exists(alive):
        places.remove(alive)
        print("an earlier life of this submission was cut off: whoever submitted it decides", file=sys.stderr)
        return TEMPORARY_EXIT_CODE
    places.remove(stop_file)
    places.write_text(alive, "")
    try:
        return attend(command, stop_file)
    finally:
        places.remove(alive)


def end(stop_file: Path, seconds: float) -> None:
    """Ask the coordinator, if it lives, to checkpoint and end, and wait for that."""
    alive, deadline = alive_file(stop_file), time.monotonic() + seconds
    if places.exists(alive) and not places.exists(stop_file):
        ask_to_stop(stop_file)
    while places.exists(alive) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def main(arguments: Sequence[str]) -> int:
    """Entry point of the process."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to all processes; the coordinator hears of it by the file
    verb, address, *rest = arguments
    try:
        if verb == "run":
            return run(places.at(address), rest)
        (seconds,) = map(float, rest)
        end(places.at(address, seconds), seconds)
    except StoreAwayError as error:
        print(error, file=sys.stderr)
        return TEMPORARY_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
