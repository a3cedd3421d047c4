"""Services for tests: real processes on a home of their own, with a small job to run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.client import Client
from services.place import running_url

ROOT = Path(__file__).resolve().parents[2]
UP_SECONDS = 120


def command(*arguments: str | Path) -> list[str]:
    """The command line of ``espalier``, whatever PATH says."""
    return [sys.executable, "-m", "services.cli", *map(str, arguments)]


def text_files(folder: Path) -> str:
    """A pattern for a little text."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(20):
        words = " ".join(f"{'even' if i % 2 == 0 else 'odd'} number {i * number} follows {i}," for i in range(60))
        (folder / f"{number:02d}.txt").write_text(words, encoding="utf-8")
    return str(folder / "*.txt")


def tiny_job(text: str, **changes: Any) -> dict[str, Any]:
    """One small candidate, two variants."""
    return {
        "name": "tiny",
        "data": {"train": [text], "validation": 0.1, "tokenizer": {"kind": "bytes"}, "sequence_length": 64},
        "budget": {"tokens": 6_000},
        "candidates": [
            {
                "name": "small",
                "model": {"family": "gpt", "layers": 1, "hidden": 32, "heads": 2},
                "layout": {},
                "training": {"global_batch": 8, "micro_batch": 4},
            }
        ],
        "compression": {"prune": {"methods": ["magnitude"], "sparsity": [0.5]}},
        "evaluation": {"tokens": 1024},
        "execution": {"devices": 1},
    } | changes


@dataclass(frozen=True)
class Running:
    """A service that is up."""

    home: Path
    url: str
    process: subprocess.Popen[bytes]

    def client(self, key: str | None = None) -> Client:
        """A client of it."""
        return Client(self.url, key)


@contextmanager
def up(home: Path, *options: str) -> Iterator[Running]:
    """``espalier up`` on a home inside the block."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    with open(home / "up.log", "ab") as log:
        process = subprocess.Popen(
            command("up", "--home", home, "--port", "0", *options), stdout=log, stderr=log, cwd=ROOT, env=environment
        )
    try:
        until(lambda: running_url(home) or process.poll() is not None, UP_SECONDS)
        url = running_url(home)
        assert url, (home / "up.log").read_text()
        yield Running(home, url, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(condition: Callable[[], object], seconds: float = 200.0) -> None:
    """Wait for something. Raises ``TimeoutError``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)
