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

import ray

from launcher.backends.spare import READY, Claim, read_claim
from launcher.coordinator import Options, coordinate
from launcher.journal import Journal
from launcher.session import OWN, RayStartError, Room, ray_session
from launcher.workers import CONNECT, HOST_STORE, TRAIN, send_output_to
from parallelism.registry import load

POLL_SECONDS = 0.05
MODULES = (TRAIN, CONNECT, HOST_STORE, "parallelism.engines.megatron:MegatronEngine", "compression.tasks:evaluate")


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
            warm_up(room)
            (given.folder / READY).touch()
            claim = wait_for_job(given.folder, given.keeper)
            if claim is None:
                return 0
            send_output_to(Journal(claim.journal).log_path("coordinator"))
            return coordinate(Options(claim.journal, OWN), STAGES, room=replace(room, devices=claim.devices))
    except RayStartError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


def warm_up(room: Room) -> None:
    """Have as many workers as a job uses at first import what ranks need; Ray gives them to the job's actors."""
    warm = ray.remote(num_cpus=0)(import_all)
    ray.get([warm.remote(MODULES) for _ in range(room.devices + 1)])


def import_all(names: Sequence[str]) -> None:
    """Import the modules of these dotted names."""
    for name in names:
        load(name)


def wait_for_job(folder: Path, keeper: int) -> Claim | None:
    """The job that this process is given; None when the keeper has ended without giving one."""
    while (claim := read_claim(folder)) is None:
        if os.getppid() != keeper:
            return read_claim(folder)
        time.sleep(POLL_SECONDS)
    return claim


if __name__ == "__main__":
    sys.exit(main())
