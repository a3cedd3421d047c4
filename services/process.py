"""What the service's processes have in common: where their settings are, whose children they are, how they log."""

import argparse
import logging
import sys
from pathlib import Path

from services.settings import Settings


def parse(module: str) -> tuple[Settings, int | None]:
    """The settings, and the process that this one does not outlive."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("settings", type=Path, metavar="SETTINGS", help="what `espalier up` has written")
    parser.add_argument("--keeper", type=int, metavar="PID", help="end when this parent process is gone")
    given = parser.parse_args()
    return Settings.read(given.settings), given.keeper


def say_in_log() -> None:
    """One line for each thing that is worth one, on stderr. Requests and what they carried are none of them."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx2", "httpcore2", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
