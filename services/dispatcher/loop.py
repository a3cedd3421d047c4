"""The reconcile loop over store, journals and back-ends. Several may run; the one with the lease acts. Torch-free."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from sqlalchemy.exc import SQLAlchemyError

from launcher.actors.versions import note_dispatch
from launcher.backends.base import Backend, BackendStatus, BackendUnavailable, Handle, Phase, make_backend
from launcher.backends.local import LocalBackend
from launcher.jobs import NO_TRACKING, rest_job
from launcher.processes import end_processes
from launcher.states import RESTING, JobState
from services.dispatcher.deliveries import Deliveries
from services.dispatcher.feeders import Feeders
from services.dispatcher.leader import Leader
from services.dispatcher.policy import (
    Action,
    HardStop,
    Holding,
    Intent,
    Nothing,
    Queue,
    Released,
    Seen,
    Settle,
    Submit,
    Waiting,
    next_action,
    take_turns,
)
from services.dispatcher.watch import Watched, hand_over, make_journal, sweep
from services.settings import COORDINATOR, Settings
from services.store.database import Database
from services.store.jobs import Account, JobStore, Observation, account_name
from services.store.leases import Lease, LeaseLost, Leases
from services.store.tables import JobRow
from services.store.webhooks import Webhooks

RESTING_POLL_SECONDS = 10.0
STOPPED = "stopped"
"""In a handle: this service ends the submission, so that its end is no wish of anybody else's."""
PICTURE_SECONDS = 1.0
"""How often the picture of a running job is written to the store; changes of state are written at once."""

log = logging.getLogger("espalier.dispatcher")


class Dispatcher:
    """Has the jobs of one store worked on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._home = settings.jobs_home()
        self._database = Database(settings.database_url)
        self._jobs = JobStore(self._database)
        self._leader = Leader(Leases(self._database), settings.lease_seconds)
        self._local = LocalBackend(settings.coordinator, outlive=True)
        self._backends: dict[str, Backend] = {"local": self._local}
        self._watched: dict[str, Watched] = {}
        self._written: dict[str, tuple[float, Observation]] = {}
        self._look_at: dict[str, float] = {}
        self._busy: dict[str, Future[None]] = {}
        self._threads = ThreadPoolExecutor(8, "job")
        self._feeders: Feeders | None = None
        self._deliveries: Deliveries | None = None

    def run(self, ending: Callable[[], str | None]) -> None:
        """Until ``ending`` says ``leave`` (jobs go on, and are taken up by the next dispatcher) or ``stop``."""
        self._leader.start()
        while (end := ending()) is None:
            lease = self._leader.lease()
            if lease:
                self._lead(lease)
            else:
                self._stand_by()
            time.sleep(self._settings.poll_seconds)
        if end == "stop":
            self._stop_all()
        self._stand_by(patience_seconds=60.0 if end == "stop" else 5.0)
        self._threads.shutdown()
        self._leader.close()
        self._database.close()

    def _lead(self, lease: Lease) -> None:
        """One turn; what goes wrong with the store or with one job is told and tried again."""
        try:
            if self._deliveries is None:
                self._begin_to_lead()
            self._turn(lease)
        except (LeaseLost, SQLAlchemyError) as error:
            log.warning("the store takes nothing: %s", str(error).partition("\n")[0])
            self._watched.clear()  # what was read and did not reach the store is read again

    def _begin_to_lead(self) -> None:
        log.info("leads as %s", self._leader.holder)
        sweep(self._home)
        self._deliveries = Deliveries(Webhooks(self._database))
        self._deliveries.start()
        if self._settings.mlflow != NO_TRACKING:
            self._feeders = Feeders(self._home, self._settings.mlflow)

    def _stand_by(self, patience_seconds: float = 5.0) -> None:
        """Nothing is remembered of the time as leader: others may have acted since."""
        if self._deliveries is None:
            return
        self._deliveries.close()
        if self._feeders:
            self._feeders.close(patience_seconds)
        self._deliveries = self._feeders = None
        self._local.keep_spare(False)
        self._watched.clear()
        self._written.clear()
        self._look_at.clear()

    def _turn(self, lease: Lease) -> None:
        """Look at every open job once, do what each needs, and let the next ones start."""
        self._reap()
        rows = self._jobs.at_work()
        waiting = [row for row in rows if row.id not in self._busy and self._tend(row, lease)]
        self._start_next(rows, waiting, lease)
        self._feed(rows, lease)
        self._keep_spare(rows)
        for job_id in set(self._watched) - {row.id for row in rows}:
            self._forget(job_id)

    def _reap(self) -> None:
        """Take the results of what was carried out; one job's trouble is told, and it is looked at again."""
        for job_id in [one for one, future in self._busy.items() if future.done()]:
            error = self._busy.pop(job_id).exception()
            if isinstance(error, LeaseLost):
                raise error
            if error is not None:
                self._trouble(job_id, error)

    def _trouble(self, job_id: str, error: BaseException) -> None:
        log.error("job %s: %s: %s", job_id, type(error).__name__, error, exc_info=error)
        self._look_at[job_id] = time.monotonic() + RESTING_POLL_SECONDS

    def _tend(self, row: JobRow, lease: Lease) -> bool:
        """Look at one job and do what it needs; whether it wants its turn."""
        if time.monotonic() < self._look_at.get(row.id, 0.0) and not _asks(row):
            return _queued(row) and row.id in self._watched
        try:
            action = self._decide(row, lease)
        except (OSError, ValueError) as error:
            self._trouble(row.id, error)
            self._explain(row, f"the dispatcher cannot look at it: {error}", lease)
            return False
        if isinstance(action, Nothing | Queue):
            if row.handle is None:
                self._look_at[row.id] = time.monotonic() + RESTING_POLL_SECONDS
            return isinstance(action, Queue)
        self._busy[row.id] = self._threads.submit(self._carry_out, row, action, lease)
        return False

    def _decide(self, row: JobRow, lease: Lease) -> Action:
        watched = self._watch(row)
        if row.handle == {} and time.time() >= row.not_before:
            self._find_again(row, watched, lease)
        # The back-end first: what a coordinator that has ended had to say is in the journal then.
        status = self._backend(watched).status(row.handle) if row.handle else None
        seen = self._observe(row, watched, lease)
        if status and row.handle and row.handle.get(STOPPED):
            status = replace(status, final=False)  # it was this service's doing
        if status and status.phase is Phase.WAITING:
            self._explain(row, status.reason, lease)
        if watched.journal.desired() != row.desired:
            hand_over(watched.journal, row)
        return next_action(_intent(row), _seen(watched, seen, status), time.time(), self._settings.grace_seconds)

    def _explain(self, row: JobRow, why: str, lease: Lease) -> None:
        if row.waiting != why:
            self._jobs.explain({row.id: why}, lease)

    def _watch(self, row: JobRow) -> Watched:
        if row.id not in self._watched:
            if not self._home.journal(row.id).exists:
                make_journal(self._home, self._jobs.get(row.id, None, whole=True))
            self._watched[row.id] = Watched.open(self._home.journal(row.id))
        return self._watched[row.id]

    def _find_again(self, row: JobRow, watched: Watched, lease: Lease) -> None:
        """A dispatcher that was killed may have submitted and not written it down."""
        try:
            row.handle = self._backend(watched).find(watched.journal) or {}
        except (OSError, ValueError):
            return  # the submission that follows tells it
        if row.handle:
            self._jobs.note(row.id, lease, handle=row.handle)

    def _observe(self, row: JobRow, watched: Watched, lease: Lease) -> Observation:
        """Read the journal on, and write to the store what is new."""
        seen = watched.look(row.last_event)
        at, before = self._written.get(row.id, (0.0, None))
        now = time.monotonic()
        if seen.states or (seen != before and now >= at + PICTURE_SECONDS):
            self._jobs.observe(row.id, seen, lease)
            self._written[row.id] = (now, seen)
        return seen

    def _carry_out(self, row: JobRow, action: Action, lease: Lease) -> None:
        """Do what was decided; in a thread, because it may take seconds."""
        watched = self._watched[row.id]
        backend = self._backend(watched)
        if isinstance(action, HardStop):
            log.warning("job %s: its coordinator is ended by force: %s", row.id, action.why)
            self._stop(row, backend, 0.0, lease)
        elif isinstance(action, Released):
            end_processes(watched.view)
            self._jobs.note(row.id, lease, handle=None)
        elif isinstance(action, Settle):
            end_processes(watched.view)
            rest_job(watched.journal, action.state, self._told(row, action, watched))
            self._jobs.note(row.id, lease, handle=None)
        elif isinstance(action, Submit):
            if row.handle:
                log.warning("job %s: its coordinator has died; another one goes on", row.id)
                end_processes(watched.view)
                self._intend(row, watched, action, lease)
            elif time.time() >= action.not_before:
                self._submit(row, watched, lease)

    def _told(self, row: JobRow, action: Settle, watched: Watched) -> str | None:
        """Why the job rests, with the last words of a coordinator that was given up."""
        if action.state is not JobState.FAILED or not row.handle:
            return action.error
        last_words = self._backend(watched).logs(row.handle, watched.journal, lines=5)
        return f"{action.error}\n{last_words}".strip()

    def _intend(self, row: JobRow, watched: Watched, action: Submit, lease: Lease) -> None:
        """Write down that a coordinator is about to start: whoever leads next looks for it."""
        self._jobs.note(
            row.id,
            lease,
            handle={},
            handle_epoch=watched.view.epoch,
            handle_milestones=watched.view.milestones,
            fruitless=action.fruitless,
            not_before=action.not_before,
        )

    def _submit(self, row: JobRow, watched: Watched, lease: Lease) -> None:
        backend = self._backend(watched)
        hand_over(watched.journal, row)
        try:
            handle = backend.find(watched.journal)
            if handle is None:
                note_dispatch(watched.journal)
                handle = backend.submit(watched.journal)
        except BackendUnavailable as error:
            log.warning("job %s: %s", row.id, error)
            self._jobs.note(row.id, lease, not_before=time.time() + RESTING_POLL_SECONDS)
            self._jobs.explain({row.id: str(error)}, lease)
            return
        except ValueError as error:
            log.warning("job %s: its back-end refuses: %s", row.id, error)
            rest_job(watched.journal, JobState.FAILED, str(error))
            self._jobs.note(row.id, lease, handle=None)
            return
        try:
            self._jobs.note(row.id, lease, handle=handle, dispatched=time.time(), waiting=None, fed=False)
        except LeaseLost:
            self._withdraw(row, backend, handle)
            raise
        log.info("job %s: coordinator %s started", row.id, handle.get("pid", ""))

    def _withdraw(self, row: JobRow, backend: Backend, handle: Handle) -> None:
        """Whoever leads now finds a submission elsewhere as this process did; one that has another ends this."""
        kept = self._jobs.get(row.id, None).handle
        if kept != handle and (kept or backend is self._local):
            backend.stop(handle, 0.0)

    def _stop(self, row: JobRow, backend: Backend, grace_seconds: float, lease: Lease) -> None:
        """End a submission; that it is meant is known before, also to whoever leads next."""
        assert row.handle
        self._jobs.note(row.id, lease, handle={**row.handle, STOPPED: True})
        backend.stop(row.handle, grace_seconds)

    def _start_next(self, rows: list[JobRow], waiting: list[JobRow], lease: Lease) -> None:
        """Give the free devices to whose turn it is, and tell the others why they wait."""
        if not waiting:
            return
        accounts = self._jobs.accounts(waiting)
        holding = [Holding(account_name(row.owner, row.key_id), row.owner, row.devices) for row in rows if _holds(row)]
        turns = take_turns([self._in_line(row, accounts) for row in waiting], holding, self._settings.devices)
        by_id = {row.id: row for row in waiting}
        for job_id in turns.start:
            row, watched = by_id[job_id], self._watched[job_id]
            self._intend(row, watched, Submit(0.0, row.fruitless), lease)
            self._look_at.pop(job_id, None)
            try:
                self._submit(row, watched, lease)
            except (OSError, ValueError) as error:  # it is tried again, as after the loss of a coordinator
                self._trouble(job_id, error)
        changed = {job_id: why for job_id, why in turns.reasons.items() if by_id[job_id].waiting != why}
        if changed:
            self._jobs.explain(dict(changed), lease)

    def _in_line(self, row: JobRow, accounts: dict[str, Account]) -> Waiting:
        limits = self._settings.limits
        known = accounts.get(row.key_id or "") or Account(row.owner)
        hours = known.device_hours_per_month or limits.device_hours_per_month
        name = account_name(row.owner, row.key_id)
        return Waiting(
            row.id,
            name,
            row.owner,
            row.priority,
            row.sequence,
            row.devices,
            known.running_jobs or limits.running_jobs,
            None if hours is None else hours - self._jobs.used_hours(name),
        )

    def _feed(self, rows: list[JobRow], lease: Lease) -> None:
        if self._feeders is None:
            return
        active = {row.id for row in rows if _holds(row)}
        for job_id in self._feeders.tend(active, active | set(self._jobs.unfed())):
            self._jobs.note(job_id, lease, fed=True)

    def _keep_spare(self, rows: list[JobRow]) -> None:
        """While no job holds devices, the next one shall find its coordinator ready."""
        if self._settings.prestart and self._settings.coordinator == COORDINATOR:
            self._local.keep_spare(not any(_holds(row) for row in rows))

    def _backend(self, watched: Watched) -> Backend:
        name = watched.spec.execution.backend
        if name not in self._backends:
            self._backends[name] = make_backend(name)
        return self._backends[name]

    def _forget(self, job_id: str) -> None:
        for known in (self._watched, self._written, self._look_at):
            known.pop(job_id, None)

    def _stop_all(self) -> None:
        """Every running job writes its checkpoints and ends; what is wanted of it stays, so that it goes on later."""
        lease = self._leader.lease()
        if lease is None:
            return
        rows = [row for row in self._jobs.at_work() if row.handle]
        if rows:
            log.info("%s jobs write their checkpoints and end", len(rows))
        for future in [self._threads.submit(self._stop_one, row, lease) for row in rows]:
            future.result()
        for row in rows:
            lease = self._leader.lease()
            if lease:
                self._observe(self._jobs.get(row.id, None), self._watch(row), lease)
                self._jobs.note(row.id, lease, handle=None)

    def _stop_one(self, row: JobRow, lease: Lease) -> None:
        watched = self._watch(row)
        self._stop(row, self._backend(watched), self._settings.grace_seconds, lease)
        end_processes(self._home.journal(row.id).view())


def _queued(row: JobRow) -> bool:
    return row.handle is None and row.desired == "run" and JobState(row.state) is JobState.SUBMITTED


def _asks(row: JobRow) -> bool:
    """Whether its owner wants something of a job that nobody works on."""
    rests = JobState(row.state) in RESTING | {JobState.SUBMITTED}
    if row.handle is not None:
        return True
    return not rests or row.desired == "cancel" or (row.desired == "run" and row.resumed_epoch >= row.epoch > 0)


def _holds(row: JobRow) -> bool:
    return row.handle is not None


def _intent(row: JobRow) -> Intent:
    return Intent(
        row.desired,
        row.desired_at,
        row.resumed_epoch,
        row.handle is not None,
        row.handle_epoch,
        row.handle_milestones,
        row.fruitless,
        row.not_before,
    )


def _seen(watched: Watched, seen: Observation, status: BackendStatus | None) -> Seen:
    view = watched.view
    phase: Phase | None = status.phase if status else None
    return Seen(
        view.state,
        view.epoch,
        view.released,
        view.milestones,
        max(view.last_time, status.since if status else 0.0),
        phase,
        status.exit_code if status else None,
        status.reason if status else "",
        status.final if status else False,
    )
