"""Sends what waits for webhooks, signed as the Standard Webhooks specification has it; tried again until it arrives."""

import base64
import hashlib
import hmac
import logging
import threading
import time

import httpx2

from services.store.tables import DeliveryRow, WebhookRow
from services.store.webhooks import Webhooks

POLL_SECONDS, TIMEOUT_SECONDS = 1.0, 10.0
USER_AGENT = "espalier-webhooks/1"

log = logging.getLogger("espalier.dispatcher")


def signature(secret: str, message_id: str, timestamp: int, body: str) -> str:
    """``v1,`` and the HMAC-SHA256 of id, time and body, in base64: who knows the secret can tell that it is ours."""
    signed = f"{message_id}.{timestamp}.{body}".encode()
    return "v1," + base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()


class Deliveries:
    """A thread that sends while its process leads."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks
        self._client = httpx2.Client(timeout=TIMEOUT_SECONDS, follow_redirects=False, trust_env=False)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def close(self) -> None:
        """End after the message that is being sent."""
        self._ending.set()
        self._thread.join(2 * TIMEOUT_SECONDS)
        self._client.close()

    def _run(self) -> None:
        while not self._ending.wait(POLL_SECONDS):
            self.send_due()

    def send_due(self) -> None:
        """One try for every message whose time has come."""
        for delivery, webhook in self._webhooks.due():
            if self._ending.is_set():
                return
            error = self._send(delivery, webhook)
            if error:
                log.warning("webhook %s does not take message %s: %s", webhook.id, delivery.sequence, error)
            self._webhooks.settle(delivery.sequence, error)

    def _send(self, delivery: DeliveryRow, webhook: WebhookRow) -> str | None:
        """What went wrong, or None. The same message keeps its id however often it is sent."""
        message_id, timestamp = f"msg_{delivery.sequence}", int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": USER_AGENT,
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(webhook.secret, message_id, timestamp, delivery.body),
        }
        try:
            answer = self._client.post(webhook.url, content=delivery.body, headers=headers)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            return type(error).__name__
        return None if answer.is_success else f"status {answer.status_code}"
