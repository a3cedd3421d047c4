"""What a rank has said of its steps, kept beside its log until the journal has it. Torch-free.

Steps reach the journal a few seconds late. Where coordinator and ranks die together meanwhile, the newest checkpoint
may hold steps that nobody has heard of; the next process group reads them here. Only the newest are kept.
"""

import json
import os
from pathlib import Path
from typing import Any

from parallelism import places

MOST_BYTES = 4 << 20
"""Some ten thousand steps; twice as much is on disk at most."""


class ToldSteps:
    """Written by the rank that reports."""

    def __init__(self, log: Path) -> None:
        self._path = _path(log)
        self._descriptor: int | None = None
        self._bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Keep one step; it survives this process, though not its machine. Raises ``OSError``."""
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._bytes += os.write(self._descriptor, f"{json.dumps(row)}\n".encode("ascii"))
        if self._bytes > MOST_BYTES:
            os.close(self._descriptor)
            self._descriptor, self._bytes = None, 0
            self._path.replace(_older(self._path))

    def share(self) -> None:
        """Let other machines see what was kept. Raises ``OSError``."""
        for path in (self._path, _older(self._path)):
            if path.exists():
                places.share_content(path)


def told_steps(log: Path, above: int, up_to: int) -> list[dict[str, Any]]:
    """The steps with numbers in (``above``, ``up_to``], in order; a line that was cut off counts for nothing."""
    rows: dict[int, dict[str, Any]] = {}
    for path in (_older(_path(log)), _path(log)):
        if places.exists(path):
            for line in places.need(path).read_text(encoding="ascii").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                rows[row["step"]] = row
    return [rows[step] for step in sorted(rows) if above < step <= up_to]


def forget_told(log: Path) -> None:
    """The journal has it all."""
    for path in (_path(log), _older(_path(log))):
        places.remove(path)


def _path(log: Path) -> Path:
    return log.with_suffix(".steps")


def _older(path: Path) -> Path:
    return path.with_suffix(".steps.older")
