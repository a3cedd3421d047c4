"""Where the service that is up on a home answers. Imports nothing heavy: every command asks."""

import json
from pathlib import Path

from launcher.journal import is_process

FOLDER, LOCK, PLACE = "service", "lock", "running.json"


class ServiceError(RuntimeError):
    """The service cannot be brought up, or is not there."""


def running_url(home: Path) -> str | None:
    """The address of the service that is up on a home, if one is."""
    try:
        place = json.loads((home.expanduser().absolute() / FOLDER / PLACE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return str(place["url"]) if is_process(place["pid"], place["created"]) else None
