"""A coordinator that waits for its job: ``python -m launcher.spare FOLDER --keeper PID``. Torch-free.

:mod:`launcher.backends.spare` starts it and gives it the job.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher.actors.session import OWN, RayStartError, ray_session
from launcher.actors.workers import send_output_to
from launcher.backends.spare import READY, WARM, Claim, read_claim
from launcher.coordinator import Options, coordinate
from launcher.journal import open_journal

POLL_SECONDS = 0.05
WORKERS_SECONDS = 60.0
"""How long workers may take; a job then finds them cold."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the process."""
    from launcher.stages.line import STAGES

    parser = argparse.ArgumentParser(prog="python -m launcher.spare", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keeper", type=int, required=True, metavar="PID")
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args(arguments)
    try:
        with ray_session(OWN, given.devices, given.threads, given.folder) as room:
            await_workers(given.folder, room.devices)
            (given.folder / READY).touch()
            claim = wait_for_job(given.folder, given.keeper)
            if claim is None:
                return 0
            send_output_to(open_journal(claim.journal).log_path("coordinator"))
            return coordinate(Options(claim.journal, OWN), STAGES, room=replace(room, devices=claim.devices))
    except RayStartError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


def await_workers(folder: Path, count: int) -> None:
    """Wait until so many workers, which Ray starts by itself, have imported what they shall."""
    deadline = time.monotonic() + WORKERS_SECONDS
    while len(list(folder.glob(f"{WARM}*"))) < count and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def wait_for_job(folder: Path, keeper: int) -> Claim | None:
    """The job that this process is given; None when the keeper has ended without giving one."""
    while (claim := read_claim(folder)) is None:
        if os.getppid() != keeper:
            return read_claim(folder)
        time.sleep(POLL_SECONDS)
    return claim


if __name__ == "__main__":
    sys.exit(main())
