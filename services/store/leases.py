"""Who leads. A lease is taken for seconds, renewed while its holder lives, and fenced by a token that only grows."""

from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from services.store.database import Database
from services.store.tables import LeaseRow

DISPATCHER = "dispatcher"
"""The lease of the dispatcher that leads."""


class LeaseLost(RuntimeError):
    """Somebody else leads by now: nothing more may be changed."""


@dataclass(frozen=True)
class Lease:
    """The right to lead, as long as nobody has a higher token."""

    name: str
    holder: str
    token: int


class Leases:
    """The leases of one store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, name: str, holder: str, seconds: float) -> Lease | None:
        """The lease if it is free, has run out, or is this holder's already (then it is renewed); otherwise None."""
        try:
            with self._database.write() as session:
                now = self._database.now(session)
                row = session.get(LeaseRow, name, with_for_update=True)
                if row is None:
                    row = LeaseRow(name=name, holder=holder, token=1, expires=now + seconds)
                    session.add(row)
                elif row.holder == holder and row.expires >= now:
                    row.expires = now + seconds
                elif row.expires < now:
                    row.holder, row.token, row.expires = holder, row.token + 1, now + seconds
                else:
                    return None
                return Lease(name, holder, row.token)
        except IntegrityError:  # the first two to lead met
            return None

    def give_up(self, lease: Lease) -> None:
        """Let somebody else lead at once."""
        with self._database.write() as session:
            row = session.get(LeaseRow, lease.name, with_for_update=True)
            if row is not None and row.token == lease.token:
                row.expires = 0.0

    def leader(self, name: str) -> tuple[str, float] | None:
        """Who leads, and for how many more seconds without a renewal; None where nobody does."""
        with self._database.read() as session:
            row, now = session.get(LeaseRow, name), self._database.now(session)
            return (row.holder, row.expires - now) if row is not None and row.expires > now else None


def require(session: Session, lease: Lease, now: float) -> None:
    """Raise :class:`LeaseLost` unless the lease holds, and keep it so until the transaction ends."""
    row = session.get(LeaseRow, lease.name, with_for_update={"read": True})
    if row is None or row.token != lease.token or row.expires < now:
        raise LeaseLost(f"{lease.holder} does not lead any more")
