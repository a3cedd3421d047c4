"""The store from the journals: what is observed is rebuilt, and jobs that the store has lost come back. Torch-free."""

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import make_url

from launcher.jobs import Home, list_jobs
from launcher.journal import Journal
from services.observed import device_seconds, progress, summarize
from services.progress import Pace
from services.store.database import Database, StoreError
from services.store.leases import DISPATCHER, Leases
from services.store.records import FORGOTTEN, RECORD
from services.store.tables import JobRow

HOLDER, SECONDS = "reindex", 600.0


@dataclass(frozen=True)
class Rebuilt:
    """What was done: ids of jobs."""

    found_again: list[str]
    brought_up_to_date: list[str]


def reindex(database: Database, home: Home) -> Rebuilt:
    """Rebuild the observed state of every job of the service from its journal; what is wanted of known jobs stays.

    Jobs of ``espalier run`` in the same home are left alone: they are not the service's. Raises :class:`StoreError`
    while a dispatcher leads.
    """
    leases = Leases(database)
    lease = leases.take(DISPATCHER, HOLDER, SECONDS)
    if lease is None:
        raise StoreError("a dispatcher leads: end the service first, so that both do not write at once")
    rebuilt = Rebuilt([], [])
    try:
        for journal in list_jobs(home):
            record = journal.document(RECORD)
            if record is not None and journal.document(FORGOTTEN) is None:
                known = _rebuild(database, journal, record)
                (rebuilt.brought_up_to_date if known else rebuilt.found_again).append(journal.job_id)
    finally:
        leases.give_up(lease)
    return rebuilt


def _rebuild(database: Database, journal: Journal, record: dict[str, Any]) -> bool:
    """Whether the store knew the job."""
    view, spec = journal.view(), journal.spec()
    summary = summarize(view, spec, Pace(), time.monotonic())
    with database.write() as session:
        row = session.scalars(select(JobRow).where(JobRow.id == journal.job_id)).one_or_none()
        known = row is not None
        if row is None:
            row = JobRow(
                **record,
                id=journal.job_id,
                name=spec.name,
                spec=spec.model_dump(mode="json"),
                plan=journal.document("plan") or {},
                layouts=journal.document("layouts"),
                desired=journal.desired(),
                desired_at=database.now(session),
                version=0,
                # Somebody may be at work on it: the dispatcher looks.
                handle={} if journal.holder() else None,
                handle_epoch=view.epoch - 1,
            )
            session.add(row)
        row.state, row.changed, row.epoch = view.state.value, view.last_time, view.epoch
        row.last_event, row.error, row.waiting = view.last_event, view.error, view.waiting
        row.observed, row.progress, row.device_seconds = summary, progress(view, summary), device_seconds(view)
        row.version += 1
    return known


def back_up(database_url: str, target: Path) -> None:
    """Copy a SQLite store while it is used; what is copied is whole. Raises :class:`StoreError` for others."""
    parsed = make_url(database_url)
    if parsed.get_backend_name() != "sqlite":
        raise StoreError("only SQLite stores are copied by this command: use pg_dump for PostgreSQL")
    if target.exists():
        raise StoreError(f"{target} exists already: name another file")
    source = sqlite3.connect(f"file:{parsed.database}?mode=ro", uri=True)
    copy = sqlite3.connect(target)
    try:
        source.backup(copy)
    finally:
        copy.close()
        source.close()
