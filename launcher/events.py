"""The numbered events of a job: an append-only log in which every attempt fences out the ones before it. Torch-free.

Event ``n`` is one object, created exclusively, and only after event ``n - 1`` exists. Creating it is therefore a
compare-and-swap on the whole history: a writer that loses the race for a number reads what took its place. An attempt
claims its epoch by appending ``attempt_started``; when the writer of an older epoch next appends, it meets that event
and is refused. So whatever stands in the log was true when it was written, and a zombie can add nothing.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from launcher.storage import Storage

Event = dict[str, Any]
"""``{number, time, epoch, kind, ...}``; the time is in seconds since 1970."""

ATTEMPT_STARTED = "attempt_started"
RESERVED = ("number", "time", "epoch", "kind")


class StaleEpochError(RuntimeError):
    """A newer attempt has claimed the job: this process has to end without touching anything more."""


class EventLog:
    """The log under ``events/``; ``segments/`` holds copies of full thousands, so that few reads suffice."""

    SEGMENT = 1000

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._checked = 0  # this writer has seen every event up to here, and none of a newer epoch
        self.epoch = 0

    def append(self, kind: str, fields: Mapping[str, Any]) -> Event:
        """Write the next event under this log's epoch. Raises :class:`StaleEpochError` when a newer epoch has begun."""
        with self._lock:
            while True:
                for event in self.read(self._checked):
                    if event["epoch"] > self.epoch:
                        raise StaleEpochError(
                            f"epoch {self.epoch} has ended: epoch {event['epoch']} began with event {event['number']}"
                        )
                    self._checked = event["number"]
                created = self._create(kind, fields, self.epoch)
                if created:
                    return created

    def claim_epoch(self, fields: Mapping[str, Any]) -> int:
        """Begin a new attempt with the next epoch, which ends the right of all older ones to write."""
        with self._lock:
            latest = self.epoch
            while True:
                for event in self.read(self._checked):
                    latest, self._checked = max(latest, event["epoch"]), event["number"]
                if self._create(ATTEMPT_STARTED, fields, latest + 1):
                    self.epoch = latest + 1
                    return self.epoch

    def read(self, after: int = 0) -> Iterator[Event]:
        """Every event with a number above ``after``, in order, up to the last one that exists now."""
        number = after + 1
        while segment := self._segment_of(number):
            yield from segment[(number - 1) % self.SEGMENT :]
            number = segment[-1]["number"] + 1
        while (content := self._storage.get(_key(number))) is not None:
            yield json.loads(content)
            number += 1

    def last_number(self) -> int:
        """The number of the last event, 0 for an empty log; found in logarithmic time, as there are no gaps."""
        low, step = self._checked, 1
        while self._storage.exists(_key(low + step)):
            low, step = low + step, step * 2
        high = low + step  # low exists (or is 0), high does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._storage.exists(_key(middle)) else (low, middle)
        return low

    def _create(self, kind: str, fields: Mapping[str, Any], epoch: int) -> Event | None:
        """The event right after the last one that was checked, or None where that number is taken by now."""
        clash = [name for name in RESERVED if name in fields]
        assert not clash, f"event {kind} brings reserved fields {clash}"
        number = self._checked + 1
        event = {"number": number, "time": time.time(), "epoch": epoch, "kind": kind, **_jsonable(dict(fields))}
        if not self._storage.put_exclusive(_key(number), json.dumps(event).encode()):
            return None
        self._checked = number
        if number % self.SEGMENT == 0:
            with contextlib.suppress(OSError):  # the event stands; without its segment it is only read more slowly
                self._pack(number)
        return event

    def _pack(self, last: int) -> None:
        first = last - self.SEGMENT + 1
        lines = [self._storage.get(_key(number)) for number in range(first, last + 1)]
        assert None not in lines
        self._storage.put(_segment_key(last), b"\n".join(line for line in lines if line is not None))

    def _segment_of(self, number: int) -> list[Event]:
        """The packed thousand that holds event ``number``, or nothing where it is not packed."""
        content = self._storage.get(_segment_key(-(-number // self.SEGMENT) * self.SEGMENT))
        return [json.loads(line) for line in content.split(b"\n")] if content else []


def _jsonable(value: Any) -> Any:
    """The same with numbers that JSON has no word for written as text (a diverged loss is worth reporting)."""
    if isinstance(value, dict):
        return {name: _jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _key(number: int) -> str:
    return f"events/{number:08d}.json"


def _segment_key(last: int) -> str:
    return f"segments/{last:08d}.jsonl"
