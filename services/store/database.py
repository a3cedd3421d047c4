"""Opening the job store: SQLite by default, PostgreSQL for real installations; transactions; migrations. Torch-free."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

MIGRATIONS = Path(__file__).parent / "migrations"
WRITING = "espalier_writing"
MIGRATING = 0x65737061
"""A lock of PostgreSQL: parts that start at the same moment do not change the tables at the same moment."""
BUSY_SECONDS = 30
POOL = 8

PATIENCE = "-c idle_in_transaction_session_timeout=10s -c lock_timeout=20s -c statement_timeout=60s"
"""A process that stands still in the middle of a transaction does not hold the others up for ever."""


class StoreError(ValueError):
    """A store that cannot be used as it is."""


class Database:
    """One job store, for many threads."""

    def __init__(self, url: str) -> None:
        """``url`` as SQLAlchemy writes it; SQLite or PostgreSQL. Raises :class:`StoreError`."""
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise StoreError("database: not an address; write sqlite:///PATH or postgresql://HOST/NAME") from error
        self.dialect = parsed.get_backend_name()
        if self.dialect == "sqlite":
            self._engine = _sqlite(str(parsed.database))
        elif self.dialect == "postgresql":
            psycopg = parsed.set(drivername="postgresql+psycopg")
            self._engine = create_engine(
                psycopg, pool_size=POOL, max_overflow=POOL, pool_pre_ping=True, connect_args={"options": PATIENCE}
            )
        else:
            raise StoreError(f"database: {self.dialect} is not supported: use sqlite or postgresql")
        self._writing = self._engine.execution_options(**{WRITING: True})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that changes nothing."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One transaction; committed at the end of the block, rolled back when it raises."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    def now(self, session: Session) -> float:
        """Seconds since 1970 by the clock that all who share the store agree on."""
        if self.dialect == "sqlite":
            return time.time()
        return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def migrate(self) -> None:
        """Bring the tables to the form that this version of the code expects."""
        with self._writing.begin() as connection:
            if self.dialect == "postgresql":  # SQLite's writers wait for each other anyway
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": MIGRATING})
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def revisions(self) -> tuple[str | None, str | None]:
        """The form that the tables have, and the one that they should have."""
        head = ScriptDirectory.from_config(_config()).get_current_head()
        with self._engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision(), head

    def connect(self) -> Connection:
        """A plain connection."""
        return self._engine.connect()

    def close(self) -> None:
        """Give all connections back."""
        self._engine.dispose()


def _sqlite(path: str) -> Engine:
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    engine = create_engine(
        f"sqlite:///{path}",
        pool_size=POOL,
        max_overflow=POOL,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy begins them, below
        # WAL: readers and a writer do not wait for each other. FULL: what was accepted survives a power failure.
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_SECONDS}000"):
            connection.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: one that reads first and writes then could meet another halfway.
        writing = connection.get_execution_options().get(WRITING)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config
