"""What every route needs: the settings, the home, and the stores; made once for an app, never a global."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from fastapi import Request

from launcher.jobs import Home
from launcher.journal import Journal
from services.api.tokens import Tokens
from services.settings import Settings
from services.store.database import Database
from services.store.jobs import JobStore
from services.store.keys import KeyStore
from services.store.leases import Leases
from services.store.webhooks import Webhooks

MOST_OPEN = 64


class OpenJournals:
    """Journals that were read lately: the next look reads only what is new."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = Lock()
        self._open: OrderedDict[str, tuple[Journal, Lock]] = OrderedDict()

    @contextmanager
    def get(self, job_id: str) -> Iterator[Journal]:
        """The journal, for this thread alone inside the block."""
        with self._lock:
            entry = self._open.pop(job_id, None) or (self._home.journal(job_id), Lock())
            self._open[job_id] = entry
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        journal, mine = entry
        with mine:
            yield journal


@dataclass(frozen=True)
class Service:
    """One service."""

    settings: Settings
    home: Home
    database: Database
    jobs: JobStore
    keys: KeyStore
    leases: Leases
    webhooks: Webhooks
    tokens: Tokens | None
    journals: OpenJournals

    @classmethod
    def open(cls, settings: Settings) -> "Service":
        """Connect to the store. Raises ``StoreError`` and, for the settings of tokens, ``ValueError``."""
        database = Database(settings.database_url)
        return cls(
            settings,
            settings.jobs_home(),
            database,
            JobStore(database),
            KeyStore(database),
            Leases(database),
            Webhooks(database),
            Tokens(settings.oidc) if settings.oidc else None,
            OpenJournals(settings.jobs_home()),
        )

    def journal(self, job_id: str) -> Journal | None:
        """A job's journal; None while the dispatcher has not made it."""
        journal = self.home.journal(job_id)
        return journal if journal.exists else None

    @contextmanager
    def opened(self, job_id: str) -> Iterator[Journal | None]:
        """As :meth:`journal`, for reading all of it: what was read before is not read again."""
        if not self.home.journal(job_id).exists:
            yield None
            return
        with self.journals.get(job_id) as journal:
            yield journal


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    service: Service = request.app.state.service
    return service
