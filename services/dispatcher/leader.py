"""Leading: a lease of the store, renewed by a thread of its own, so that slow work does not lose it."""

import logging
import os
import secrets
import socket
import threading
import time

from sqlalchemy.exc import SQLAlchemyError

from services.store.leases import DISPATCHER, Lease, Leases

log = logging.getLogger("espalier.dispatcher")


class Leader:
    """Takes the lease when it is free and keeps it while its process lives."""

    def __init__(self, leases: Leases, seconds: float) -> None:
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._leases = leases
        self._seconds = seconds
        self._lease: Lease | None = None
        self._valid_until = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def start(self) -> None:
        """Begin to try."""
        self._thread.start()

    def lease(self) -> Lease | None:
        """The lease while it surely holds: by this machine's clock it ends before others may take it."""
        return self._lease if time.monotonic() < self._valid_until else None

    def close(self) -> None:
        """Let somebody else lead at once."""
        self._ending.set()
        self._thread.join(self._seconds)
        lease, self._lease = self._lease, None
        if lease:
            self._leases.give_up(lease)

    def _keep(self) -> None:
        while not self._ending.is_set():
            asked = time.monotonic()
            try:
                lease = self._leases.take(DISPATCHER, self.holder, self._seconds)
            except SQLAlchemyError as error:
                log.warning("the job store does not answer: %s", str(error).partition("\n")[0])
                lease = None
            if lease is None:
                self._lease = None
            else:
                # Counted from before the question: whatever the answer took is on the safe side.
                self._valid_until = asked + 0.8 * self._seconds
                self._lease = lease
            self._ending.wait(self._seconds / 4)
