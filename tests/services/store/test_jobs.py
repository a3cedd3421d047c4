"""The job store on SQLite and on PostgreSQL: what is accepted, who is refused, what a state may become."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from launcher.states import FINAL, TRANSITIONS, IllegalTransition, JobState
from services.store.database import Database, StoreError
from services.store.jobs import (
    WISHES,
    Account,
    Change,
    Conflict,
    Filter,
    JobStore,
    KeyReused,
    NewJob,
    Observation,
    QuotaExceeded,
    UnknownJob,
    VersionChanged,
    Wish,
    refuse_wish,
)
from services.store.keys import KeyStore
from services.store.leases import DISPATCHER, Lease, LeaseLost, Leases
from services.store.tables import Base, JobRow
from services.store.webhooks import Webhooks

ANNA = Account("anna")


def new(number: int, **changes: Any) -> NewJob:
    fields = {"spec": {"a": 1}, "plan": {}, "request_hash": "x", "devices": 1} | changes
    return NewJob(id=f"job-{number:04d}", name=fields.pop("name", "job"), **fields)


def lease_of(database: Database) -> Lease:
    lease = Leases(database).take(DISPATCHER, "me", 60.0)
    assert lease is not None
    return lease


def observed(number: int, *states: JobState, **picture: Any) -> Observation:
    changes = [Change(number + index, 1000.0 + index, state) for index, state in enumerate(states)]
    return Observation(last_event=number + len(states), epoch=1, states=changes, **picture)


def test_migrations_make_the_tables_that_the_code_has(database: Database) -> None:
    with database.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert difference == []
    current, head = database.revisions()
    assert current == head
    database.migrate()  # again changes nothing


def test_another_database_is_refused_in_words() -> None:
    with pytest.raises(StoreError, match="mysql is not supported: use sqlite or postgresql"):
        Database("mysql://host/name")
    with pytest.raises(StoreError, match="not an address"):
        Database("jobs.db")


def test_same_idempotency_key_is_one_job_however_many_ask_at_once(database: Database) -> None:
    store = JobStore(database)
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda number: store.submit(new(number, idempotency_key="k"), ANNA), range(50)))
    assert len({row.id for row, _ in made}) == 1
    assert sum(created for _, created in made) == 1
    with pytest.raises(KeyReused, match="another request"):
        store.submit(new(99, idempotency_key="k", request_hash="y"), ANNA)
    # Another owner's key of the same name is another key.
    assert store.submit(new(100, idempotency_key="k", request_hash="y"), Account("berta"))[1]


def test_list_is_paged_filtered_and_shows_one_owner_only(database: Database) -> None:
    store = JobStore(database)
    for number in range(7):
        store.submit(new(number, name="odd" if number % 2 else "even"), Account("anna" if number < 5 else "berta"))
    first = store.page(Filter("anna"), 3)
    assert [row.id for row in first] == ["job-0004", "job-0003", "job-0002"]
    assert [row.id for row in store.page(Filter("anna"), 3, first[-1].sequence)] == ["job-0001", "job-0000"]
    assert [row.id for row in store.page(Filter("anna", name="odd"), 9)] == ["job-0003", "job-0001"]
    assert len(store.page(Filter(states=("submitted",)), 99)) == 7
    assert store.page(Filter(states=("running", "failed")), 99) == []
    with pytest.raises(UnknownJob):
        store.get("job-0006", "anna")
    assert store.get("job-0006", None).owner == "berta"


def test_every_change_of_state_is_held_against_the_table(database: Database) -> None:
    """All pairs of states, each on a job of its own."""
    store, lease = JobStore(database), lease_of(database)
    pairs = {f"{before}-{after}": (before, after) for before in JobState for after in JobState}
    with database.write() as session:
        for name, (before, _) in pairs.items():
            times = {"created": 1.0, "changed": 1.0, "desired_at": 1.0}
            facts = {"owner": "anna", "name": "job", "spec": {}, "plan": {}, "request_hash": "x"}
            session.add(JobRow(id=name, state=before.value, **facts, **times))
    for name, (before, after) in pairs.items():
        if after not in TRANSITIONS[before]:
            with pytest.raises(IllegalTransition):
                store.observe(name, observed(1, after), lease)
        elif before in (JobState.SUBMITTED, JobState.RUNNING):
            store.observe(name, observed(1, after), lease)
    for row in store.page(Filter(), 200):
        before, after = pairs[row.id]
        moved = after in TRANSITIONS[before] and before in (JobState.SUBMITTED, JobState.RUNNING)
        assert row.state == (after if moved else before), row.id


def test_states_that_were_taken_over_before_are_not_taken_over_again(database: Database) -> None:
    store, lease = JobStore(database), lease_of(database)
    store.submit(new(1), ANNA)
    seen = observed(1, JobState.STARTING, JobState.RUNNING)
    for _ in range(2):
        row = store.observe("job-0001", seen, lease)
        assert (row.state, row.last_event, row.changed) == ("running", 3, 1001.0)


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("wish", WISHES)
def test_what_may_be_asked_in_which_state(state: JobState, wish: str) -> None:
    queued = state is JobState.SUBMITTED and wish == "run"
    if state in WISHES[wish] or queued:
        refuse_wish(state, "run", wish)
    else:
        with pytest.raises(Conflict, match=f"a job that is {state} cannot be asked to"):
            refuse_wish(state, "run", wish)
    if state not in FINAL and wish != "cancel":
        with pytest.raises(Conflict, match="is being cancelled"):
            refuse_wish(state, "cancel", wish)


def test_wishes_and_versions(database: Database) -> None:
    store = JobStore(database)
    row, _ = store.submit(new(1), ANNA)
    assert store.ask(row.id, "anna", Wish("pause"), row.version).desired == "pause"
    with pytest.raises(VersionChanged):
        store.ask(row.id, "anna", Wish("run"), row.version)
    with pytest.raises(UnknownJob):
        store.ask(row.id, "berta", Wish("cancel"))
    assert store.ask(row.id, "anna", Wish("run", {"small": {"tensor": 2}}, {"p": 1}, 2)).layouts == {
        "small": {"tensor": 2}
    }
    assert store.get(row.id, "anna", whole=True).plan == {"p": 1}


def test_only_finished_records_are_deleted(database: Database) -> None:
    store, lease = JobStore(database), lease_of(database)
    store.submit(new(1), ANNA)
    with pytest.raises(Conflict, match="is submitted: cancel it first"):
        store.delete("job-0001", "anna")
    store.observe("job-0001", observed(1, JobState.CANCELLED), lease)
    store.note("job-0001", lease, handle={"pid": 1})
    with pytest.raises(Conflict):
        store.delete("job-0001", "anna")
    store.note("job-0001", lease, handle=None)
    store.delete("job-0001", "anna")
    with pytest.raises(UnknownJob):
        store.get("job-0001", None)


def test_quotas_of_a_key(database: Database) -> None:
    store, lease = JobStore(database), lease_of(database)
    key, _ = KeyStore(database).create("k", "anna", "submitter", queued_jobs=2, device_hours_per_month=1.0)
    account = Account("anna", key.id, queued_jobs=2, device_hours_per_month=1.0)
    store.submit(new(1), account)
    store.submit(new(2), account)
    with pytest.raises(QuotaExceeded, match="2 jobs wait already, and the quota is 2"):
        store.submit(new(3), account)
    store.submit(new(4), ANNA)  # another account of the same owner
    store.observe("job-0001", observed(1, JobState.STARTING, device_seconds=1800.0), lease)
    store.observe("job-0001", observed(2, device_seconds=4000.0), lease)
    assert store.used_hours(account.name) == pytest.approx(4000 / 3600)
    with pytest.raises(QuotaExceeded, match=r"1\.1 device-hours are used this month"):
        store.submit(new(5), account)


def test_two_never_lead_and_who_led_before_changes_nothing(database: Database) -> None:
    leases, store = Leases(database), JobStore(database)
    store.submit(new(1), ANNA)
    first = leases.take(DISPATCHER, "one", 0.5)
    assert first is not None
    assert leases.take(DISPATCHER, "two", 60.0) is None
    renewed = leases.take(DISPATCHER, "one", 0.5)
    assert renewed == first
    with database.write() as session:
        session.execute(text("UPDATE leases SET expires = 1"))
    second = leases.take(DISPATCHER, "two", 60.0)
    assert second is not None
    assert second.token == first.token + 1
    for act in (
        lambda: store.note("job-0001", first, handle={}),
        lambda: store.explain({"job-0001": "x"}, first),
        lambda: store.observe("job-0001", observed(1, JobState.STARTING), first),
    ):
        with pytest.raises(LeaseLost):
            act()
    assert store.get("job-0001", None).state == "submitted"
    leases.give_up(first)  # not its own any more
    assert leases.leader(DISPATCHER) is not None
    leases.give_up(second)
    assert leases.leader(DISPATCHER) is None


def test_many_who_want_to_lead_at_once_get_one_leader(database: Database) -> None:
    leases = Leases(database)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: leases.take(DISPATCHER, f"d{number}", 60.0), range(8)))
    assert sum(lease is not None for lease in found) == 1


def test_keys_are_kept_hashed_expire_and_are_revoked(database: Database) -> None:
    keys = KeyStore(database)
    assert not keys.any()
    row, token = keys.create("laptop", "anna", "submitter", days=1)
    found = keys.find(token)
    assert found is not None
    assert (found.owner, found.role) == ("anna", "submitter")
    with database.read() as session:
        stored = str(session.execute(text("SELECT * FROM keys")).one())
    assert token.split("_", 2)[2] not in stored  # the secret may have underscores of its own
    for wrong in (
        "",
        "esp",
        token[:-1],
        token + "x",
        token.replace("esp", "xyz", 1),
        f"esp_{row.id}_",
        "esp_none_x",
        "x" * 500,
    ):
        assert keys.find(wrong) is None, wrong
    with database.write() as session:
        session.execute(text("UPDATE keys SET expires = 1"))
    assert keys.find(token) is None
    other, token = keys.create("server", "anna", "admin")
    assert keys.find(token) is not None
    assert keys.revoke(other.id)
    assert not keys.revoke(other.id)
    assert keys.find(token) is None
    assert keys.any()
    with pytest.raises(ValueError, match="use one of reader, submitter, admin"):
        keys.create("x", "x", "root")


def test_a_change_of_state_and_its_message_are_one_transaction(database: Database) -> None:
    store, webhooks, lease = JobStore(database), Webhooks(database), lease_of(database)
    hook = webhooks.add("anna", "http://127.0.0.1:9/")
    webhooks.add("berta", "http://127.0.0.1:9/")
    store.submit(new(1), ANNA)
    store.observe("job-0001", observed(1, JobState.STARTING, JobState.RUNNING), lease)
    due = webhooks.due()
    assert [webhook.id for _, webhook in due] == [hook.id, hook.id]
    assert '"state": "running", "state_before": "starting"' in due[1][0].body
    webhooks.settle(due[0][0].sequence, None)
    webhooks.settle(due[1][0].sequence, "status 500")
    assert webhooks.due() == []
    assert webhooks.waiting() == 1  # tried again later
    assert webhooks.remove(hook.id)
    assert webhooks.waiting() == 0
