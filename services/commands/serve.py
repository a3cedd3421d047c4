"""``espalier serve``: one part of the service by itself, as containers and several machines have it.

All parts share the home (a volume) and the job store. Settings come from the home's ``service.yaml``; the password of
PostgreSQL from libpq's own file (``PGPASSFILE``), and the first administrator's key from a file, too: neither stands in
an environment or on a command line.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.commands.terminal import DEFAULT_HOME, HomeOption, TrackingOption, stdout
from services.place import ServiceError
from services.settings import Settings, load_settings

if TYPE_CHECKING:
    from services.store.database import Database

serve = typer.Typer(help="Run one part of the service by itself, as in a container.", no_args_is_help=True)

DatabaseOption = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="The job store. [default: SQLite in the home]")
]
KeyFileOption = Annotated[
    Path | None, typer.Option("--admin-key-file", help="Holds an administrator's key: espalier keys token makes one.")
]


@serve.command(name="api")
def serve_api(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port. [default: 8700]")] = None,
    admin_key_file: KeyFileOption = None,
    database: DatabaseOption = None,
    tracking: TrackingOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Answer the REST API and show the status page, until SIGTERM."""
    from services.api.__main__ import run_api
    from services.store.database import Database
    from services.up import check_guard

    settings = _served(load_settings(home, host=host, port=port, database=database, mlflow=tracking))
    database_ = Database(settings.database_url)
    database_.migrate()
    if admin_key_file is not None:
        adopt_key(database_, admin_key_file)
    check_guard(settings, database_)
    database_.close()
    run_api(settings)


@serve.command(name="dispatcher")
def serve_dispatcher(
    database: DatabaseOption = None, tracking: TrackingOption = None, home: HomeOption = DEFAULT_HOME
) -> None:
    """Start jobs and look after them, until SIGTERM; jobs go on without it. Several may run: one of them leads."""
    from services.dispatcher.__main__ import run_dispatcher
    from services.store.database import Database

    settings = _served(load_settings(home, database=database, mlflow=tracking))
    store = Database(settings.database_url)
    store.migrate()
    store.close()
    run_dispatcher(settings)


def adopt_key(database: "Database", path: Path) -> None:
    """Let the key in a file be an administrator's. Raises :class:`ServiceError` for a file that holds none."""
    from services.store.keys import KeyStore

    try:
        KeyStore(database).adopt(path.read_text(encoding="ascii").strip(), "deployment", "admin", "admin")
    except (OSError, ValueError) as error:
        raise ServiceError(f"--admin-key-file {path}: {error}; make one with: espalier keys token > {path}") from error


def print_token() -> None:
    """Make a key's text without keeping it anywhere: for the file that espalier serve api reads."""
    from services.store.keys import KeyStore

    stdout.print(KeyStore.token(), markup=False)


def _served(settings: Settings) -> Settings:
    """Where people see MLflow is known beforehand: nothing is served beside this part."""
    from services.up import check_journals

    settings.home.mkdir(parents=True, exist_ok=True)
    check_journals(settings)
    if settings.mlflow is not None and settings.mlflow.startswith("http") and settings.mlflow_url is None:
        return settings.model_copy(update={"mlflow_url": settings.mlflow})
    return settings


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(serve, name="serve")
