"""Writes one rank's part of a checkpoint in a process forked from it, whose memory is a snapshot (copy on write).

A forked process has only the thread that forked it, but every lock that any other thread held: it may wait for one of
them for ever. Before 3.12 Python itself does so at the fork, when a thread of Ray's is entering it at that moment
(CPython's issue 112275, once in some thousand forks). So a process that does not begin is replaced at once, while the
state is still the same; one that hangs later is noticed by doing nothing at all, says where it stands and is ended, and
whoever asked for it writes by itself then.
"""

import faulthandler
import gc
import logging
import os
import pickle
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO

import psutil
import torch
from torch.distributed.checkpoint.storage import WriteResult

from parallelism import device

Outcome = list[WriteResult] | str
"""What a rank wrote, or why it could not."""

LONGEST_SECONDS = 3600.0
"""How long writing may take."""
STILL_SECONDS = 60.0
"""How long the process may do nothing: neither compute nor read or write, nor wait for a disk."""
BEGIN_SECONDS, TRIES = 5.0, 3
"""Within what time a forked process begins on the busiest machine, and how many may fail to in a row."""
LAST_WORDS_SECONDS = 0.5
TELL = signal.SIGUSR1
"""Has the forked process print where it stands."""

_log = logging.getLogger(__name__)


class ForkedWriter:
    """A forked process that writes, after which what it wrote is shared; the process never outlives its parent.

    ``write`` is called there and ``share`` here, in a thread: both return what was written, or what went wrong. Raises
    ``OSError`` when no process can be forked.
    """

    def __init__(
        self,
        write: Callable[[], Outcome],
        share: Callable[[Outcome], Outcome],
        longest_seconds: float = LONGEST_SECONDS,
        still_seconds: float = STILL_SECONDS,
    ) -> None:
        self._share = share
        self._sharing: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._deadline = time.monotonic() + longest_seconds
        self._ended_because: str | None = None
        self._result: IO[bytes] = os.fdopen(os.memfd_create("checkpoint"), "w+b")
        self._status: int | None = None
        parent = os.getpid()
        self._pid = fork()
        if self._pid == 0:
            _write_in_child(write, self._result, parent)
        self._pulse = Pulse(self._pid, still_seconds)

    def ended(self) -> bool:
        """Whether all is done; a process that is past its time, or hangs, is killed."""
        if self._status is None:
            self._reap(os.WNOHANG)
        if self._status is None and time.monotonic() > self._deadline:
            self._end("was past its time")
        if self._status is None and self._pulse.stopped():
            os.kill(self._pid, TELL)
            time.sleep(LAST_WORDS_SECONDS)
            self._end(f"did nothing for {self._pulse.seconds:g} s")
        if self._status is not None and self._sharing is None:
            # Not in the forked process: whoever talks to the network needs threads, which do not exist there.
            self._sharing = threading.Thread(target=self._finish, name="checkpoint upload", daemon=True)
            self._sharing.start()
        return self._sharing is not None and not self._sharing.is_alive()

    def outcome(self) -> Outcome:
        """Wait for the process, and for what it wrote to be shared; return what it wrote."""
        while not self.ended():
            time.sleep(0.005)
        return self._outcome or "what was written could not be shared"

    def _finish(self) -> None:
        self._outcome = self._share(self._written())

    def _written(self) -> Outcome:
        self._result.seek(0)
        content = self._result.read()
        self._result.close()
        if self._status == 0 and content:
            outcome: Outcome = pickle.loads(content)
            return outcome
        if self._ended_because:
            return f"the writing process {self._ended_because} and was ended"
        return f"the writing process ended with status {self._status} (negative: by that signal)"

    def _end(self, reason: str) -> None:
        self._ended_because = reason
        self.kill()

    def kill(self) -> None:
        """End the process at once; an upload under way ends by itself, and counts for nothing."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)
            self._reap(0)

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self._pid, options)
        except ChildProcessError:  # something else in this process reaps children: the result says how it went
            self._status = 0
            return
        if pid:
            self._status = os.waitstatus_to_exitcode(status)


class Pulse:
    """Tells a process that hangs from one that is at work."""

    def __init__(self, pid: int, seconds: float) -> None:
        self.seconds = seconds
        self._process = psutil.Process(pid)
        self._signs: object = None
        self._changed_at = self._looked_at = time.monotonic()

    def stopped(self) -> bool:
        """Whether it has done nothing for so long. Looks now and then only, however often it is asked."""
        now = time.monotonic()
        if now < self._looked_at + self.seconds / 10:
            return False
        self._looked_at = now
        try:
            with self._process.oneshot():
                signs = (self._process.cpu_times(), self._process.io_counters())
                waits_for_disk = self._process.status() == psutil.STATUS_DISK_SLEEP
        except psutil.NoSuchProcess:
            return False
        if signs != self._signs or waits_for_disk:
            self._signs, self._changed_at = signs, now
        return now > self._changed_at + self.seconds


def fork() -> int:
    """As :func:`os.fork`, of a process that has begun when this returns. Raises ``OSError`` when several do not.

    In the child nothing is collected: that belongs to the parent, and may need its locks.
    """
    parent, collects = os.getpid(), gc.isenabled()
    gc.disable()
    try:
        for _ in range(TRIES):
            hears, says = os.pipe()
            pid = os.fork()
            os.close(says if pid else hears)
            if pid == 0:
                os.write(says, b"!")
                os.close(says)
                return 0
            if _has_begun(hears):
                return pid
            _log.warning("a forked process did not begin within %g s: forking again", BEGIN_SECONDS)
            os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # somebody else in this process reaps children
                os.waitpid(pid, 0)
    finally:
        if collects and os.getpid() == parent:
            gc.enable()
    raise ChildProcessError(f"{TRIES} forked processes in a row did not begin within {BEGIN_SECONDS:g} s")


def _has_begun(hears: int) -> bool:
    """Whether something comes out of a pipe in time, or its other end is closed; closes this one."""
    waiting = select.poll()  # unlike select.select() for any number of open files
    waiting.register(hears)
    try:
        return bool(waiting.poll(BEGIN_SECONDS * 1000))
    finally:
        os.close(hears)


def _write_in_child(write: Callable[[], Outcome], result: IO[bytes], parent: int) -> None:
    """The life of the forked process; it leaves without the clean-up that belongs to its parent."""
    code = 1
    try:
        device.die_with_parent(parent)
        # Stopping the training must not tear the checkpoint: the parent waits for it, or dies and takes it along.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        faulthandler.register(TELL)
        torch.set_num_threads(1)  # OpenMP's threads do not exist in a forked process
        pickle.dump(write(), result)
        result.flush()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)
