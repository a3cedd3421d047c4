"""API keys: made once and shown once; what is kept tells only whether one that is shown is the right one."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

from sqlalchemy import func, select

from services.store.database import Database
from services.store.roles import ROLES, Role
from services.store.tables import KeyRow

PREFIX = "esp"
LONGEST_TOKEN = 200
TOKEN = re.compile(rf"{PREFIX}_[0-9a-f]{{12}}_[A-Za-z0-9_-]{{43}}")
_NO_DIGEST = "0" * 64


class KeyStore:
    """The keys of one store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        name: str,
        owner: str,
        role: Role,
        days: float | None = None,
        running_jobs: int | None = None,
        queued_jobs: int | None = None,
        device_hours_per_month: float | None = None,
        highest_priority: int = 0,
    ) -> tuple[KeyRow, str]:
        """A new key and its token ``esp_ID_SECRET``, which is nowhere kept. Raises ``ValueError`` for another role."""
        if role not in ROLES:
            raise ValueError(f"role {role!r} is unknown: use one of {', '.join(ROLES)}")
        token = self.token()
        key_id, secret = _parts(token)
        with self._database.write() as session:
            now = self._database.now(session)
            row = KeyRow(
                id=key_id,
                name=name,
                owner=owner,
                role=role,
                digest=_digest(secret),
                created=now,
                expires=None if days is None else now + 86400.0 * days,
                running_jobs=running_jobs,
                queued_jobs=queued_jobs,
                device_hours_per_month=device_hours_per_month,
                highest_priority=highest_priority,
            )
            session.add(row)
        return row, token

    @staticmethod
    def token() -> str:
        """A new token that no store knows yet."""
        return f"{PREFIX}_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"

    def adopt(self, token: str, name: str, owner: str, role: Role) -> None:
        """Know a token that was made elsewhere, unless it is known (or was revoked) already.

        Raises ``ValueError`` where it has another form than :meth:`token` gives, or the id of another key.
        """
        if not TOKEN.fullmatch(token):
            raise ValueError(f"no key: it looks like {PREFIX}_, 12 hexadecimal digits, _, and 43 further characters")
        key_id, secret = _parts(token)
        with self._database.write() as session:
            row = session.get(KeyRow, key_id)
            if row is None:
                now = self._database.now(session)
                row = KeyRow(id=key_id, name=name, owner=owner, role=role, digest=_digest(secret), created=now)
                session.add(row)
            elif not hmac.compare_digest(row.digest, _digest(secret)):
                raise ValueError(f"key {key_id} is another one already")

    def find(self, token: str) -> KeyRow | None:
        """The key behind a token, if it is right, not expired and not revoked."""
        if len(token) > LONGEST_TOKEN:
            return None
        prefix = token.partition("_")[0]
        key_id, secret = _parts(token)
        with self._database.read() as session:
            row = session.get(KeyRow, key_id)
            now = self._database.now(session)
        # The same work whether there is such a key or not, and in constant time: the answer's delay tells nothing.
        right = hmac.compare_digest(_digest(secret), row.digest if row else _NO_DIGEST)
        if row is None or not right or prefix != PREFIX or row.revoked is not None:
            return None
        return row if row.expires is None or row.expires > now else None

    def revoke(self, key_id: str) -> bool:
        """End a key; whether there was one that had not been ended before."""
        with self._database.write() as session:
            row = session.get(KeyRow, key_id)
            if row is None or row.revoked is not None:
                return False
            row.revoked = self._database.now(session)
            return True

    def all(self) -> Sequence[KeyRow]:
        """All keys, oldest first."""
        with self._database.read() as session:
            return session.scalars(select(KeyRow).order_by(KeyRow.created)).all()

    def any(self) -> bool:
        """Whether there ever was a key: then nobody comes in without one, also when all have run out."""
        with self._database.read() as session:
            return session.execute(select(func.count()).select_from(KeyRow)).scalar_one() > 0


def _parts(token: str) -> tuple[str, str]:
    """A token's id and secret."""
    key_id, _, secret = token.partition("_")[2].partition("_")
    return key_id, secret


def _digest(secret: str) -> str:
    """SHA-256 does: a secret is 32 random bytes, so that there is no list of likely ones to try."""
    return hashlib.sha256(secret.encode()).hexdigest()
