"""Webhooks: which there are, and the messages that wait to be delivered."""

import json
import secrets
from collections.abc import Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from services.store.database import Database
from services.store.tables import DeliveryRow, JobRow, WebhookRow

MOST_ATTEMPTS = 12
"""With the pauses between them: a little more than a day."""


class Webhooks:
    """The webhooks of one store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, owner: str, url: str) -> WebhookRow:
        """A webhook for all jobs of an owner, with a new secret."""
        with self._database.write() as session:
            row = WebhookRow(
                id=secrets.token_hex(6),
                owner=owner,
                url=url,
                secret=secrets.token_urlsafe(32),
                created=self._database.now(session),
            )
            session.add(row)
        return row

    def all(self) -> Sequence[WebhookRow]:
        """All of them, oldest first."""
        with self._database.read() as session:
            return session.scalars(select(WebhookRow).order_by(WebhookRow.created)).all()

    def remove(self, webhook_id: str) -> bool:
        """Whether there was one of that id."""
        with self._database.write() as session:
            session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_id == webhook_id))
            found = session.get(WebhookRow, webhook_id)
            if found is not None:
                session.delete(found)
            return found is not None

    def due(self, limit: int = 20) -> Sequence[tuple[DeliveryRow, WebhookRow]]:
        """Messages whose time has come, oldest first."""
        with self._database.read() as session:
            now = self._database.now(session)
            query = select(DeliveryRow, WebhookRow).join(WebhookRow, WebhookRow.id == DeliveryRow.webhook_id)
            query = query.where(DeliveryRow.due <= now).order_by(DeliveryRow.sequence).limit(limit)
            return [(delivery, webhook) for delivery, webhook in session.execute(query)]

    def settle(self, sequence: int, error: str | None) -> None:
        """A message was delivered, or (``error``) was not: then it is tried again later, a dozen times in all."""
        with self._database.write() as session:
            row = session.get(DeliveryRow, sequence)
            if row is None:
                return
            row.attempts, row.error = row.attempts + 1, error
            over = error is None or row.attempts >= MOST_ATTEMPTS
            row.due = None if over else self._database.now(session) + pause_seconds(row.attempts)

    def waiting(self) -> int:
        """Messages that are still to be delivered."""
        with self._database.read() as session:
            return session.execute(select(func.count()).where(DeliveryRow.due.is_not(None))).scalar_one()


def pause_seconds(attempts: int) -> float:
    """Until the next try: 5 s, 20 s, 80 s … at most six hours."""
    return min(21600.0, 5.0 * 4.0 ** (attempts - 1))


def announce(session: Session, row: JobRow, before: str, now: float) -> None:
    """Write one message for each of the owner's webhooks, in the transaction that changes the state."""
    for webhook_id in session.scalars(select(WebhookRow.id).where(WebhookRow.owner == row.owner)):
        body = {
            "type": "job.state_changed",
            "time": row.changed,
            "job": {"id": row.id, "name": row.name, "state": row.state, "state_before": before, "attempt": row.epoch},
        }
        session.add(DeliveryRow(webhook_id=webhook_id, body=json.dumps(body), attempts=0, due=now))
