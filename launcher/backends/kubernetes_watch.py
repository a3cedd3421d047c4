"""What all RayJobs of a namespace are like now, from one list and a watch, so that nobody asks for each. Torch-free."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from launcher.backends.base import BackendUnavailable
from launcher.backends.kubernetes_api import Document, Gone

log = logging.getLogger("espalier.kubernetes")

FIRST_SECONDS = 40.0
"""How long the first question waits for the first list."""
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0


class Source(Protocol):
    """Where lists and watches come from."""

    def ray_jobs(self, selector: str) -> tuple[list[Document], str]:
        """All objects, and the version of the list."""

    def watch(self, selector: str, version: str) -> Iterator[Document]:
        """What happens after a version."""


class Watched:
    """The objects by name. The thread begins with the first question, and ends with the process or :meth:`close`."""

    def __init__(self, source: Source, selector: str) -> None:
        self._source = source
        self._selector = selector
        self._objects: dict[str, Document] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._listed = threading.Event()
        self._ending = threading.Event()
        self._error: BackendUnavailable | None = None
        self._version = ""

    def get(self, name: str) -> Document | None:
        """The object as it was last seen. Raises ``BackendUnavailable`` while what happens is not heard of."""
        self._start()
        self._listed.wait(FIRST_SECONDS)
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._listed.is_set():
                raise BackendUnavailable("the Kubernetes API has not answered yet")
            return self._objects.get(name)

    def close(self) -> None:
        """Let the thread end at its next event."""
        self._ending.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="rayjobs", daemon=True)
                self._thread.start()

    def _follow(self) -> None:
        pause = SHORTEST_PAUSE_SECONDS
        while not self._ending.is_set():
            try:
                if not self._version:
                    self._list()
                for event in self._source.watch(self._selector, self._version):
                    self._take(event)
                    pause = SHORTEST_PAUSE_SECONDS
                    if self._ending.is_set():
                        return
            except Gone:
                self._version = ""
            except (BackendUnavailable, ValueError) as error:
                self._tell(error)
                self._version = ""  # what was missed meanwhile is in the list
                self._ending.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                self._ending.wait(0.05)  # a server that ends watches at once is not overrun

    def _list(self) -> None:
        items, self._version = self._source.ray_jobs(self._selector)
        with self._lock:
            self._objects = {item["metadata"]["name"]: item for item in items}
            self._error = None
        self._listed.set()

    def _take(self, event: Document) -> None:
        metadata: dict[str, Any] = event["object"]["metadata"]
        with self._lock:
            if event["type"] == "DELETED":
                self._objects.pop(metadata["name"], None)
            elif event["type"] != "BOOKMARK":
                self._objects[metadata["name"]] = event["object"]
        self._version = str(metadata["resourceVersion"])

    def _tell(self, error: BackendUnavailable | ValueError) -> None:
        log.warning("RayJobs are not heard of: %s", error)
        with self._lock:
            self._error = error if isinstance(error, BackendUnavailable) else BackendUnavailable(str(error))
        self._listed.set()


class Recently:
    """Remembers an answer for some seconds, for questions that are asked again and again."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._answers: dict[str, tuple[float, str]] = {}

    def get(self, name: str) -> str | None:
        """The answer, where it is recent."""
        asked, answer = self._answers.get(name, (-self._seconds, ""))
        return answer if time.monotonic() < asked + self._seconds else None

    def put(self, name: str, answer: str) -> str:
        """Remember it."""
        now = time.monotonic()
        self._answers = {key: one for key, one in self._answers.items() if now < one[0] + self._seconds}
        self._answers[name] = (now, answer)
        return answer
