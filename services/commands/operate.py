"""Commands of those who run a service: up, keys, webhooks, reindex, backup.

What works with the job store is imported by the commands that do: loading SQLAlchemy takes a second.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from services.commands import serve
from services.commands.terminal import (
    DEFAULT_HOME,
    HomeOption,
    JsonOption,
    TrackingOption,
    home_at,
    print_json,
    stderr,
    stdout,
)
from services.settings import load_settings
from services.store.roles import ROLES

if TYPE_CHECKING:
    from services.store.database import Database

DatabaseOption = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="The job store. [default: SQLite in the home]")
]

keys = typer.Typer(help="API keys: who may use the service.", no_args_is_help=True)
webhooks = typer.Typer(help="Webhooks: where changes of state are told.", no_args_is_help=True)


def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the API. [default: 8700, or a free one]")] = None,
    database: DatabaseOption = None,
    tracking: TrackingOption = None,
    prestart: Annotated[
        bool | None, typer.Option("--prestart", help="Keep Ray and warm workers ready for the next job.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Serve the REST API, run its jobs and show MLflow, all on this machine, until Ctrl-C."""
    from services.up import bring_up

    given = {"host": host, "port": port, "database": database, "mlflow": tracking, "prestart": prestart}
    settings = load_settings(home, **given)
    bring_up(settings, port, lambda line: stderr.print(line, markup=False))


def reindex_command(
    database: DatabaseOption = None, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Rebuild what the job store says of jobs from their journals, also after it was lost. With the service down."""
    from services.reindex import reindex

    with _store(home, database) as store:
        rebuilt = reindex(store, home_at(home))
    if as_json:
        print_json(vars(rebuilt))
        return
    stdout.print(f"{len(rebuilt.brought_up_to_date)} jobs brought up to date, {len(rebuilt.found_again)} found again")


def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="A new file.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Copy the job store (SQLite) into a file, also while the service is up."""
    from services.reindex import back_up

    back_up(load_settings(home).database_url, target)
    stderr.print(
        f"the job store is in {target}; the journals are copied as files: {home_at(home).jobs_dir}", markup=False
    )


@contextmanager
def _store(home: Path, database: str | None) -> "Iterator[Database]":
    """The job store of a home, with its tables up to date."""
    from services.store.database import Database

    found = Database(load_settings(home, database=database).database_url)
    found.migrate()
    try:
        yield found
    finally:
        found.close()


@keys.command(name="create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for, to tell it from others.")],
    role: Annotated[str, typer.Option(help=f"One of {', '.join(ROLES)}.")] = "submitter",
    owner: Annotated[str | None, typer.Option(help="Whose jobs it sees. [default: its name]")] = None,
    days: Annotated[float | None, typer.Option(min=0.0, help="Until it expires. [default: never]")] = None,
    running: Annotated[int | None, typer.Option(min=1, help="Jobs at once.")] = None,
    queued: Annotated[int | None, typer.Option(min=1, help="Jobs in the queue.")] = None,
    hours: Annotated[float | None, typer.Option(min=0.0, help="Device-hours a month.")] = None,
    priority: Annotated[int, typer.Option(min=-10, max=10, help="Highest priority it may ask for.")] = 0,
    database: DatabaseOption = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, once: what is kept of it only tells whether one that is shown is right."""
    from services.store.keys import KeyStore

    known = next((one for one in ROLES if one == role), None)
    if known is None:
        raise ValueError(f"role {role!r} is unknown: use one of {', '.join(ROLES)}")
    with _store(home, database) as store:
        row, token = KeyStore(store).create(
            name,
            owner or name,
            known,
            days,
            running_jobs=running,
            queued_jobs=queued,
            device_hours_per_month=hours,
            highest_priority=priority,
        )
    if as_json:
        print_json({"id": row.id, "name": row.name, "owner": row.owner, "role": row.role, "key": token})
    else:
        stderr.print(f"key {row.id} of {row.owner}, {row.role}; it is not shown again:", markup=False)
        stdout.print(token, markup=False)


@keys.command(name="list")
def list_keys(database: DatabaseOption = None, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List all keys, without what makes them keys."""
    from services.store.keys import KeyStore

    with _store(home, database) as store:
        rows = KeyStore(store).all()
    fields = ("id", "name", "owner", "role", "created", "expires", "revoked")
    documents = [{field: getattr(row, field) for field in fields} for row in rows]
    if as_json:
        print_json(documents)
        return
    table = Table(*fields, box=None, padding=(0, 1), show_edge=False, header_style="bold")
    for document in documents:
        table.add_row(*(_cell(value) for value in document.values()))
    stdout.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    return "" if value is None else str(value)


@keys.command(name="revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="A key's id.")],
    database: DatabaseOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """End a key at once."""
    from services.store.keys import KeyStore

    with _store(home, database) as store:
        if not KeyStore(store).revoke(key):
            raise ValueError(f"key {key!r} is unknown, or was revoked before: espalier keys list names them")
    stderr.print(f"key {key} is revoked")


@webhooks.command(name="add")
def add_webhook(
    url: Annotated[str, typer.Argument(help="Where to send: https://…")],
    owner: Annotated[str, typer.Option(help="Whose jobs are told.")] = "local",
    database: DatabaseOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Tell the changes of state of an owner's jobs; the secret that signs the messages is shown once."""
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url!r}: write https://HOST/PATH")
    from services.store.webhooks import Webhooks

    with _store(home, database) as store:
        row = Webhooks(store).add(owner, url)
    stderr.print(f"webhook {row.id} for the jobs of {owner}; its secret:", markup=False)
    stdout.print(row.secret, markup=False)


@webhooks.command(name="list")
def list_webhooks(database: DatabaseOption = None, home: HomeOption = DEFAULT_HOME) -> None:
    """List all webhooks."""
    from services.store.webhooks import Webhooks

    with _store(home, database) as store:
        for row in Webhooks(store).all():
            stdout.print(f"{row.id}  {row.owner}  {row.url}", markup=False)


@webhooks.command(name="remove")
def remove_webhook(
    webhook: Annotated[str, typer.Argument(help="A webhook's id.")],
    database: DatabaseOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """End a webhook, with the messages that wait for it."""
    from services.store.webhooks import Webhooks

    with _store(home, database) as store:
        if not Webhooks(store).remove(webhook):
            raise ValueError(f"webhook {webhook!r} is unknown: espalier webhooks list names them")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command()(up)
    app.command(name="reindex")(reindex_command)
    app.command()(backup)
    keys.command(name="token")(serve.print_token)
    app.add_typer(keys, name="keys")
    app.add_typer(webhooks, name="webhooks")
    serve.register(app)
