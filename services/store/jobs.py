"""Jobs in the store: handing in, asking, observing. A change of state is one transaction, held against the table."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, undefer

from launcher.states import FINAL, RESTING, JobState, check_transition
from services.store.database import Database
from services.store.leases import Lease, require
from services.store.tables import JobRow, KeyRow, UsageRow
from services.store.webhooks import announce

OPEN = [state.value for state in JobState if state not in FINAL]
WORKED_ON = [state.value for state in JobState if state not in RESTING and state is not JobState.SUBMITTED]


class UnknownJob(LookupError):
    """There is no such job, or it is somebody else's."""


class Conflict(ValueError):
    """What is asked for does not go with the state that the job is in."""


class KeyReused(ValueError):
    """The idempotency key was used for another request."""


class QuotaExceeded(ValueError):
    """The account has used up what it may have."""


@dataclass(frozen=True)
class Account:
    """Whose jobs count together, and how far they may go (None: no limit)."""

    owner: str
    key_id: str | None = None
    running_jobs: int | None = None
    queued_jobs: int | None = None
    device_hours_per_month: float | None = None

    @property
    def name(self) -> str:
        """What usage is booked on."""
        return account_name(self.owner, self.key_id)


def account_name(owner: str, key_id: str | None) -> str:
    """A key's account, or that of an owner who needs none."""
    return f"key {key_id}" if key_id else f"owner {owner}"


@dataclass(frozen=True)
class NewJob:
    """A checked job that is handed in."""

    id: str
    name: str
    spec: dict[str, Any]
    plan: dict[str, Any]
    request_hash: str
    devices: int
    priority: int = 0
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Filter:
    """Which jobs a list holds; None: all."""

    owner: str | None = None
    states: tuple[str, ...] = ()
    name: str | None = None


@dataclass(frozen=True)
class Change:
    """An event by which a job came into a state."""

    number: int
    time: float
    state: JobState


@dataclass(frozen=True)
class Observation:
    """What a journal says of a job: the states it went through since the last look, oldest first, and the picture."""

    last_event: int
    epoch: int
    states: Sequence["Change"] = ()
    error: str | None = None
    waiting: str | None = None
    progress: float = 0.0
    device_seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)


class JobStore:
    """The jobs of one store. What it returns is detached: a picture of the row at that moment."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # What people ask

    def earlier(self, owner: str, idempotency_key: str, request_hash: str) -> JobRow | None:
        """The job that this request made before. Raises :class:`KeyReused`."""
        with self.database.read() as session:
            return _earlier(session, owner, idempotency_key, request_hash)

    def submit(self, new: NewJob, account: Account) -> tuple[JobRow, bool]:
        """The job's row, and whether it was made now. Raises :class:`KeyReused` and :class:`QuotaExceeded`."""
        try:
            with self.database.write() as session:
                earlier = new.idempotency_key and _earlier(
                    session, account.owner, new.idempotency_key, new.request_hash
                )
                if earlier:
                    return earlier, False
                _check_quota(session, account)
                now = self.database.now(session)
                row = JobRow(
                    **vars(new), owner=account.owner, key_id=account.key_id, created=now, changed=now, desired_at=now
                )
                session.add(row)
            return row, True
        except IntegrityError:
            if new.idempotency_key is None:
                raise
            # Somebody else's transaction with the same key was first.
            earlier = self.earlier(account.owner, new.idempotency_key, new.request_hash)
            assert earlier is not None, "the key is taken"
            return earlier, False

    def get(self, job_id: str, owner: str | None, whole: bool = False) -> JobRow:
        """One job; ``owner`` None sees all, ``whole`` reads spec and plan too. Raises :class:`UnknownJob`."""
        with self.database.read() as session:
            return _find(session, job_id, owner, whole)

    def peek(self, job_id: str) -> JobRow | None:
        """One job, whoever it belongs to; None where there is none."""
        with self.database.read() as session:
            return session.scalars(select(JobRow).where(JobRow.id == job_id)).one_or_none()

    def page(self, which: Filter, limit: int, before: int | None = None) -> list[JobRow]:
        """The newest jobs first, up to ``limit``, those with a ``sequence`` below ``before``."""
        query = select(JobRow).order_by(JobRow.sequence.desc()).limit(limit)
        if which.owner is not None:
            query = query.where(JobRow.owner == which.owner)
        if which.states:
            query = query.where(JobRow.state.in_(which.states))
        if which.name is not None:
            query = query.where(JobRow.name == which.name)
        if before is not None:
            query = query.where(JobRow.sequence < before)
        with self.database.read() as session:
            return list(session.scalars(query))

    def find(self, prefix: str, owner: str | None) -> list[str]:
        """Ids that begin with ``prefix``, the newest first, ten at most."""
        query = select(JobRow.id).where(JobRow.id.startswith(prefix, autoescape=True))
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        with self.database.read() as session:
            return list(session.scalars(query.order_by(JobRow.sequence.desc()).limit(10)))

    def ask(self, job_id: str, owner: str | None, wish: "Wish", version: int | None = None) -> JobRow:
        """Change what is wanted of a job. Raises :class:`UnknownJob`, :class:`Conflict` and :class:`VersionChanged`."""
        with self.database.write() as session:
            row = _find(session, job_id, owner, lock=True)
            if version is not None and row.version != version:
                raise VersionChanged(f"job {job_id} has changed since it was read: read it again")
            refuse_wish(JobState(row.state), row.desired, wish.desired)
            row.desired, row.desired_at = wish.desired, self.database.now(session)
            row.version += 1
            if wish.desired == "run":
                row.resumed_epoch, row.fruitless, row.not_before = row.epoch, 0, 0.0
                row.layouts = {**(row.layouts or {}), **wish.layouts} or None
                if wish.plan is not None:
                    row.plan, row.devices = wish.plan, wish.devices
            return row

    def delete(
        self, job_id: str, owner: str | None, version: int | None = None, before: Callable[[], None] = lambda: None
    ) -> JobRow:
        """Remove the record of a job that nobody works on any more. Raises what :meth:`ask` raises.

        ``before`` is called once nothing speaks against it; what it raises keeps the record.
        """
        with self.database.write() as session:
            row = _find(session, job_id, owner, lock=True)
            if version is not None and row.version != version:
                raise VersionChanged(f"job {job_id} has changed since it was read: read it again")
            if JobState(row.state) not in FINAL | {JobState.FAILED} or row.handle is not None:
                raise Conflict(f"job {job_id} is {row.state}: cancel it first, and wait until it is")
            before()
            session.delete(row)
            return row

    def counts(self, owner: str | None = None) -> dict[str, int]:
        """State → jobs in it; ``owner`` None: everybody's."""
        query = select(JobRow.state, func.count()).group_by(JobRow.state)
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        with self.database.read() as session:
            rows = session.execute(query).all()
        return {str(state): int(count) for state, count in rows}

    def load(self) -> tuple[int, float | None]:
        """Devices that jobs hold, and since when (seconds since 1970) the oldest queued job has been waiting."""
        held = select(func.coalesce(func.sum(JobRow.devices), 0)).where(JobRow.handle.is_not(None))
        queued = (JobRow.state == JobState.SUBMITTED.value, JobRow.desired == "run", JobRow.handle.is_(None))
        with self.database.read() as session:
            devices = session.execute(held).scalar_one()
            oldest = session.execute(select(func.min(JobRow.changed)).where(*queued)).scalar_one()
        return int(devices), None if oldest is None else float(oldest)

    # What the dispatcher does, under its lease

    def at_work(self) -> list[JobRow]:
        """Jobs that somebody may have to do something about, oldest first."""
        query = select(JobRow).where(or_(JobRow.state.in_(OPEN), JobRow.handle.is_not(None))).order_by(JobRow.sequence)
        with self.database.read() as session:
            return list(session.scalars(query))

    def unfed(self) -> list[str]:
        """Jobs that have an attempt and may have something to tell MLflow."""
        query = select(JobRow.id).where(JobRow.fed.is_(False), JobRow.epoch > 0).order_by(JobRow.sequence)
        with self.database.read() as session:
            return list(session.scalars(query))

    def observe(self, job_id: str, seen: Observation, lease: Lease) -> JobRow:
        """Take over what a journal says; one transaction for each state that the job went through.

        Raises ``IllegalTransition`` for a history that cannot be, and ``LeaseLost``.
        """
        for change in seen.states[:-1]:
            with self.database.write() as session:
                self._enter(session, job_id, lease, change)
        with self.database.write() as session:
            # The last state comes with its picture: nobody reads the one without the other.
            row = self._enter(session, job_id, lease, *seen.states[-1:])
            book(session, row, seen.device_seconds, self.database.now(session))
            picture = {
                "epoch": seen.epoch,
                "error": seen.error,
                "waiting": seen.waiting,
                "progress": seen.progress,
                "observed": seen.summary,
            }
            if any(getattr(row, name) != value for name, value in picture.items()):
                row.version += 1
            for name, value in picture.items():
                setattr(row, name, value)
            row.last_event, row.device_seconds = seen.last_event, seen.device_seconds
            return row

    def _enter(self, session: Session, job_id: str, lease: Lease, *changes: Change) -> JobRow:
        """The job's row, locked, in the state that it came into, unless that was taken over before."""
        now = self.database.now(session)
        require(session, lease, now)
        row = _find(session, job_id, None, lock=True)
        for change in changes:
            if change.number <= row.last_event:
                continue
            check_transition(JobState(row.state), change.state)
            before, row.state, row.changed, row.fed = row.state, change.state.value, change.time, False
            row.last_event = change.number
            row.version += 1
            announce(session, row, before, now)
        return row

    def note(self, job_id: str, lease: Lease, **fields: Any) -> None:
        """Change the dispatcher's own columns. Raises ``LeaseLost``."""
        with self.database.write() as session:
            require(session, lease, self.database.now(session))
            session.execute(update(JobRow).where(JobRow.id == job_id).values(**fields))

    def explain(self, reasons: dict[str, str | None], lease: Lease) -> None:
        """Why jobs wait. Raises ``LeaseLost``."""
        with self.database.write() as session:
            require(session, lease, self.database.now(session))
            for job_id, reason in reasons.items():
                values = {"waiting": reason, "version": JobRow.version + 1}
                session.execute(update(JobRow).where(JobRow.id == job_id).values(**values))

    def accounts(self, rows: Iterable[JobRow]) -> dict[str, Account]:
        """Key id → account, of the keys that these jobs came with."""
        ids = {row.key_id for row in rows if row.key_id}
        with self.database.read() as session:
            keys = session.scalars(select(KeyRow).where(KeyRow.id.in_(ids))).all() if ids else []
        return {key.id: account_of(key) for key in keys}

    def used_hours(self, account: str) -> float:
        """Device-hours of this month."""
        with self.database.read() as session:
            return _used_hours(session, account, self.database.now(session))


@dataclass(frozen=True)
class Wish:
    """What is wanted of a job from now on; ``layouts``, ``plan`` and ``devices`` when it goes on at another layout."""

    desired: str
    layouts: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] | None = None
    devices: int = 1


class VersionChanged(ValueError):
    """The job is not in the version any more that the request was made for."""


WISHES: dict[str, frozenset[JobState]] = {
    "cancel": frozenset(JobState) - FINAL,
    "pause": frozenset({JobState.SUBMITTED, JobState.STARTING, JobState.RUNNING, JobState.PAUSING}),
    "run": frozenset({JobState.PAUSING, JobState.PAUSED, JobState.INTERRUPTED, JobState.FAILED}),
}
"""What may be asked in which state; a job that waits in the queue may also be let go on."""


def refuse_wish(state: JobState, desired: str, wish: str) -> None:
    """Raise :class:`Conflict` where the table does not allow it. Asking for the same again is allowed."""
    waits = state is JobState.SUBMITTED and wish == "run"
    if (state in WISHES[wish] or waits) and not (desired == "cancel" and wish != "cancel"):
        return
    word = {"run": "resume"}.get(wish, wish)
    if desired == "cancel" and state not in FINAL:
        raise Conflict(f"the job is being cancelled: it cannot be asked to {word}")
    allowed = ", ".join(sorted(WISHES[wish]))
    raise Conflict(f"a job that is {state} cannot be asked to {word}; possible in: {allowed}")


def account_of(key: KeyRow) -> Account:
    """The account of a key."""
    return Account(key.owner, key.id, key.running_jobs, key.queued_jobs, key.device_hours_per_month)


def month_of(seconds: float) -> str:
    """``2026-11``, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m")


def book(session: Session, row: JobRow, device_seconds: float, now: float) -> None:
    """Charge what a job has burnt since the last look to its account's month."""
    burnt = device_seconds - row.device_seconds
    if burnt <= 0:
        return
    account, month = account_name(row.owner, row.key_id), month_of(now)
    usage = session.get(UsageRow, (account, month)) or UsageRow(account=account, month=month, device_seconds=0.0)
    usage.device_seconds += burnt
    session.add(usage)


def _find(session: Session, job_id: str, owner: str | None, whole: bool = False, lock: bool = False) -> JobRow:
    query = select(JobRow).where(JobRow.id == job_id)
    if owner is not None:
        query = query.where(JobRow.owner == owner)
    if whole:
        query = query.options(undefer(JobRow.spec), undefer(JobRow.plan))
    if lock:
        query = query.with_for_update()
    row = session.scalars(query).one_or_none()
    if row is None:
        raise UnknownJob(f"there is no job {job_id}")
    return row


def _earlier(session: Session, owner: str, key: str, request_hash: str) -> JobRow | None:
    row = session.scalars(select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == key)).one_or_none()
    if row is not None and row.request_hash != request_hash:
        raise KeyReused(f"the idempotency key was used for another request, which made job {row.id}")
    return row


def _check_quota(session: Session, account: Account) -> None:
    if account.key_id is not None:  # two requests of one key count one after the other
        session.scalars(select(KeyRow.id).where(KeyRow.id == account.key_id).with_for_update()).one_or_none()
    if account.queued_jobs is not None:
        query = select(func.count()).where(JobRow.owner == account.owner, JobRow.state == JobState.SUBMITTED.value)
        if account.key_id is not None:
            query = query.where(JobRow.key_id == account.key_id)
        queued = session.execute(query).scalar_one()
        if queued >= account.queued_jobs:
            raise QuotaExceeded(f"{queued} jobs wait already, and the quota is {account.queued_jobs}: let some start")
    if account.device_hours_per_month is not None:
        used = _used_hours(session, account.name, datetime.now(UTC).timestamp())
        if used >= account.device_hours_per_month:
            raise QuotaExceeded(
                f"{used:.1f} device-hours are used this month, and the quota is {account.device_hours_per_month:g}"
            )


def _used_hours(session: Session, account: str, now: float) -> float:
    usage = session.get(UsageRow, (account, month_of(now)))
    return usage.device_seconds / 3600 if usage else 0.0
