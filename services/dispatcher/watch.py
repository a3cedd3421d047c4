"""One job as the dispatcher follows it: its journal, read on from where it was left. Torch-free."""

import shutil
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from launcher.jobs import Home
from launcher.journal import Journal
from launcher.planning.plan import DOCUMENT, LAYOUTS
from launcher.spec import JobSpec
from launcher.states import JobState
from launcher.view import JobView
from services.observed import device_seconds, progress, summarize
from services.progress import Pace
from services.store.jobs import Change, Observation
from services.store.records import RECORD
from services.store.tables import JobRow

STAGING = ".new"


@dataclass
class Watched:
    """A journal, folded as far as it was read."""

    journal: Journal
    spec: JobSpec
    view: JobView = field(default_factory=JobView)
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def open(cls, journal: Journal) -> "Watched":
        """Begin to follow a job."""
        return cls(journal, journal.spec())

    def look(self, after: int) -> Observation:
        """What the journal says now; the states are those of events with a number above ``after``."""
        states: list[Change] = []
        for event in self.journal.events(self.view.last_event):
            self.view.apply(event)
            if event["kind"] == "state" and event["number"] > after:
                states.append(Change(event["number"], event["time"], JobState(event["state"])))
        summary = summarize(self.view, self.spec, self.pace, time.monotonic())
        return Observation(
            last_event=self.view.last_event,
            epoch=self.view.epoch,
            states=states,
            error=self.view.error,
            waiting=self.view.waiting,
            progress=progress(self.view, summary),
            device_seconds=device_seconds(self.view),
            summary=summary,
        )


def make_journal(home: Home, row: JobRow) -> Journal:
    """Write an accepted job down, whole or not at all; what is there already stays as it is.

    ``row`` has its spec and its plan loaded.
    """
    journal = home.journal(row.id)
    if journal.exists:
        return journal
    spec, documents = JobSpec.model_validate(row.spec), {DOCUMENT: row.plan, RECORD: record_of(row)}
    if home.journals is not None:  # nothing is renamed there; what is half written is completed
        return journal.create(spec, row.id, documents)
    staged = Journal(home.jobs_dir / STAGING / f"{row.id}-{uuid.uuid4().hex[:8]}").create(spec, row.id, documents)
    try:
        staged.directory.rename(journal.directory)
    except OSError:
        shutil.rmtree(staged.directory, ignore_errors=True)
        if not journal.exists:  # another dispatcher was faster otherwise
            raise
    return journal


def sweep(home: Home) -> None:
    """Remove what a dispatcher that was killed had not finished writing down."""
    shutil.rmtree(home.jobs_dir / STAGING, ignore_errors=True)


def record_of(row: JobRow) -> dict[str, Any]:
    """What only the store knows of a job otherwise."""
    names = ("owner", "key_id", "request_hash", "idempotency_key", "priority", "created", "devices")
    return {name: getattr(row, name) for name in names}


def hand_over(journal: Journal, row: JobRow) -> None:
    """Tell the journal what the owner changed since: before the next coordinator starts."""
    if row.layouts:
        journal.write_document(LAYOUTS, row.layouts)
    if journal.desired() != row.desired:
        journal.set_desired(wish_of(row))


def wish_of(row: JobRow) -> Any:
    """The desired state, in the journal's words."""
    return row.desired
