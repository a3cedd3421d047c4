"""Job stores for tests: a SQLite file, and a PostgreSQL server of the machine, started for the tests alone."""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

PLACES = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", "/usr/local/pgsql/bin")


def postgres_folder() -> Path | None:
    """Where the server's programs are; None where it is not installed."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    folders = [path for place in PLACES for path in sorted(Path("/").glob(place[1:])) if (path / "initdb").exists()]
    return folders[-1] if folders else None


@contextmanager
def postgres_server() -> Iterator[str]:
    """The address of a fresh server, reached by a socket alone; it ends with the block."""
    programs = postgres_folder()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="esp-pg-", dir="/tmp"))
    # The server refuses to run as root: then another user has to own it.
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    data = folder / "data"
    _run([str(programs / "initdb"), "-D", str(data), "-U", "espalier", "-A", "trust", "-E", "UTF8", "--no-sync"], user)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    log = ["-l", str(folder / "log")]
    _run([str(programs / "pg_ctl"), "-D", str(data), "-w", "-o", options, *log, "start"], user)
    try:
        yield f"postgresql://espalier@/postgres?host={folder}"
    finally:
        _run([str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop"], user)
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server: str) -> str:
    """The address of an empty database on a server."""
    name = f"jobs_{uuid.uuid4().hex[:10]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.replace("/postgres?", f"/{name}?")


def _run(command: list[str], user: str | None) -> None:
    subprocess.run(
        command,
        user=user,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=60,
        env={"LC_ALL": "C"},
    )
