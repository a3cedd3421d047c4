"""The process that feeds MLflow from a job's journal: ``python -m launcher.tracking.process JOURNAL_DIR --uri URI``.

The journal is the truth and MLflow a picture of it. What the process does lies in :mod:`launcher.tracking.feed`; here
is when it does it, and when it gives up. Torch-free.
"""

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from launcher.journal import Journal, open_journal
from launcher.life import show_life
from launcher.tracking.feed import Feeder, TrackedJob
from launcher.tracking.store import (
    UI_PORT,
    TrackingRefusedError,
    TrackingUnavailableError,
    artifacts_beside,
    connect,
    default_uri,
    page_url,
)
from parallelism import places

__all__ = [
    "EXIT_BUSY",
    "EXIT_DONE",
    "EXIT_REFUSED",
    "EXIT_UNREACHABLE",
    "UI_PORT",
    "FeederProcess",
    "artifacts_beside",
    "default_uri",
    "follow",
    "page_url",
]

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
EXIT_DONE, EXIT_UNREACHABLE, EXIT_BUSY, EXIT_REFUSED = 0, 3, 4, 5


class FeederProcess:
    """The feeder of one job as a child process; it also ends by itself when its parent dies."""

    def __init__(self, journal: Journal, home: Path, uri: str | None = None, once: bool = False) -> None:
        """``uri``: an MLflow server or store; by default the one of the home. ``once``: it feeds what there is."""
        command = [sys.executable, "-m", "launcher.tracking.process", journal.location]
        command += ["--uri", uri or default_uri(home), "--parent", str(os.getpid()), *(["--once"] if once else [])]
        self._once = once
        with open(journal.log_path("tracking"), "ab") as log:
            # In a session of its own: Ctrl-C is meant for the job, whose end the feeder still has to write down.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def ended(self) -> bool:
        """Whether the process has ended, by itself or by a fault."""
        return self._process.poll() is not None

    def close(self, timeout_seconds: float = 60.0) -> int:
        """Let it write what is left, for a limited time. Returns its exit code: 0 when everything was written."""
        if not self._once:  # it would not live to hear it
            self._process.terminate()
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Leaving:
    """Whether the feeder was asked to end: by a signal, or by the death of the process that started it."""

    def __init__(self, parent: int | None = None) -> None:
        """``parent``: the process that started this one; it may have died before it could be asked for."""
        self._asked = threading.Event()
        self._parent = os.getppid() if parent is None else parent

    def ask(self, *_: object) -> None:
        """A signal handler."""
        self._asked.set()

    def asked(self) -> bool:
        """True from the first request on."""
        return self._asked.is_set() or os.getppid() != self._parent

    def wait(self, seconds: float) -> None:
        """Pause; a request ends the pause, and later pauses are short."""
        if self._asked.is_set():
            time.sleep(min(seconds, 0.5))
        else:
            self._asked.wait(seconds)


def follow(feeder: Feeder, leaving: Leaving, poll_seconds: float, patience_seconds: float) -> int:
    """Feed until the feeder has to leave; from then on wait at most ``patience_seconds`` for a dead server.

    Returns an exit code. What is left unfed, the next feeder feeds.
    """
    failures = 0
    give_up_at: float | None = None
    while True:
        last_round = leaving.asked()  # asked before feeding, so that nothing written until then is missed
        try:
            feeder.feed()
        except TrackingUnavailableError as error:
            feeder.forget()
            if not failures:
                _say(f"MLflow does not answer; nothing is lost, the feeder tries again: {error}")
            if last_round and give_up_at is None:
                give_up_at = time.monotonic() + patience_seconds
            if give_up_at is not None and time.monotonic() >= give_up_at:
                _say(f"MLflow stays away; feed the rest later with: espalier track {feeder.job_id}")
                return EXIT_UNREACHABLE
            leaving.wait(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1
        except TrackingRefusedError as error:
            _say(f"MLflow refuses the job: {error}")
            return EXIT_REFUSED
        else:
            if last_round:
                return EXIT_DONE
            if failures:
                _say("MLflow answers again")
            failures = 0
            leaving.wait(poll_seconds)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the feeder's process. Returns its exit code."""
    options = _parse(arguments)
    journal = open_journal(options.journal)
    journal.tracking_dir.mkdir(parents=True, exist_ok=True)
    leaving = Leaving(options.parent)
    if options.once:
        leaving.ask()
    signal.signal(signal.SIGTERM, leaving.ask)
    signal.signal(signal.SIGINT, leaving.ask)
    if places.is_mirrored(journal.directory):
        show_life(journal.log_path("tracking"))
    with open(journal.tracking_dir / "lock", "w", encoding="utf-8") as lock:
        if not _acquire(lock, leaving):
            _say(f"another feeder is at work on job {journal.job_id}")
            return EXIT_BUSY
        feeder = Feeder(TrackedJob(journal), connect(options.uri), journal.tracking_dir, options.uri)
        return follow(feeder, leaving, options.poll, options.patience)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.tracking.process", description="Feed MLflow from a job's journal."
    )
    parser.add_argument("journal", help="a job's directory, or its address in an object store")
    parser.add_argument("--uri", required=True, help="an MLflow tracking server or store")
    parser.add_argument("--once", action="store_true", help="feed what there is and end")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this is not the parent process any more")
    parser.add_argument("--poll", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--patience", type=float, default=20.0, metavar="SECONDS", help="for a dead server, at the end")
    return parser.parse_args(arguments)


def _acquire(lock: IO[str], leaving: Leaving) -> bool:
    """Be the only feeder of the job; one that is about to leave is waited for."""
    for _ in range(25):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            leaving.wait(0.2)
    return False


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
