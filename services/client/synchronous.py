"""The client for code that waits."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx2

from launcher.events import Event
from services.api.documents import (
    FrontierDocument,
    Health,
    JobDocument,
    JobWithSpec,
    LogFile,
    MetricDocument,
    PresetDocument,
    VariantDocument,
)
from services.client import calls
from services.client.calls import Call, EventParser, ServiceError, ServiceUnreachable, Spec, StreamEnded
from services.client.files import Download

T = TypeVar("T")

TRIES, PAUSE_SECONDS = 4, 0.5
ALIVE_SECONDS = 45.0
"""A stream that says nothing for this long is dead: the server sends something every 15 s."""


class Client:
    """One service. Errors: :class:`ServiceError` for what it refuses, :class:`ServiceUnreachable`."""

    def __init__(self, url: str, key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._http = httpx2.Client(
            base_url=url, headers=calls.headers_of(key), timeout=timeout_seconds, trust_env=False
        )
        self.url = url

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the connections back."""
        self._http.close()

    def submit(self, spec: Spec, *, idempotency_key: str | None = None, priority: int = 0) -> JobDocument:
        """Hand a job in; sent again after a lost connection, it is still one job."""
        return self._send(calls.submit(spec, idempotency_key, priority))

    def plan(self, spec: Spec) -> dict[str, Any]:
        """What a job would take."""
        return self._send(calls.plan(spec))

    def jobs(
        self, *, states: Iterable[str] = (), name: str | None = None, owner: str | None = None, limit: int = 50
    ) -> Iterator[JobDocument]:
        """All jobs that fit, the newest first; ``limit`` at a time are fetched."""
        states, cursor = tuple(states), None
        while True:
            page = self._send(calls.jobs(states, name, owner, limit, cursor))
            yield from page.jobs
            cursor = page.next
            if cursor is None:
                return

    def job(self, job_id: str) -> JobWithSpec:
        """One job."""
        return self._send(calls.job(job_id))

    def cancel(self, job_id: str) -> JobDocument:
        """Ask it to write checkpoints and end for good."""
        return self._send(calls.ask(job_id, "cancel"))

    def pause(self, job_id: str) -> JobDocument:
        """Ask it to write checkpoints and pause."""
        return self._send(calls.ask(job_id, "pause"))

    def resume(self, job_id: str, layouts: dict[str, dict[str, Any]] | None = None) -> JobDocument:
        """Let it go on; ``layouts``: candidate → another layout."""
        return self._send(calls.ask(job_id, "resume", {"layouts": layouts or {}}))

    def delete(self, job_id: str) -> None:
        """Remove a finished job's record."""
        self._send(calls.delete(job_id))

    def result(self, job_id: str) -> dict[str, Any]:
        """What the job brought so far."""
        return self._send(calls.result(job_id))

    def frontier(self, job_id: str) -> FrontierDocument:
        """Quality against size."""
        return self._send(calls.frontier(job_id))

    def frontier_png(self, job_id: str) -> bytes:
        """The same as a picture."""
        return self._send(calls.frontier_file(job_id, "png"))

    def frontier_html(self, job_id: str) -> bytes:
        """The same as a page that stands alone."""
        return self._send(calls.frontier_file(job_id, "html"))

    def variant(self, job_id: str, name: str) -> VariantDocument:
        """One variant (``candidate/recipe``) and its files."""
        return self._send(calls.variant(job_id, name))

    def logs(self, job_id: str) -> list[LogFile]:
        """The logs there are."""
        return self._send(calls.logs(job_id)).logs

    def log(self, job_id: str, name: str = "coordinator", lines: int = 200) -> str:
        """The end of one."""
        return self._send(calls.log(job_id, name, lines))

    def metric(self, job_id: str, name: str, candidate: str | None = None, points: int = 1000) -> MetricDocument:
        """One metric against the step."""
        return self._send(calls.metric(job_id, name, candidate, points))

    def metrics(self, job_id: str) -> list[str]:
        """The metrics there are."""
        return self._send(calls.metrics(job_id)).metrics

    def presets(self) -> list[PresetDocument]:
        """Published models that a job may name."""
        return self._send(calls.presets())

    def ready(self) -> Health:
        """Whether jobs are accepted and dispatched; raises ``ServiceError`` (503) where not."""
        return self._send(calls.ready())

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """Every event up to now, in order."""
        while True:
            page = self._send(calls.events(job_id, after, 1000))
            yield from page.events
            after = page.next
            if not page.more:
                return

    def watch(self, job_id: str, after: int = 0) -> Iterator[Event | None]:
        """Every event as it is written, each once, through any number of lost connections; None while there is none.

        Ends when the job is over. Raises ``ServiceError``; a service that is away is waited for.
        """
        parser = EventParser(after)
        while True:
            try:
                for line in self._stream(job_id, parser.last_id):
                    event = parser.feed(line)
                    if event is not None or line.startswith(":"):
                        yield event
            except StreamEnded:
                return
            except httpx2.TransportError:
                yield None
            except ServiceError as error:
                if error.status < 500:  # a server on its way down, or up, is waited for
                    raise
                yield None
            parser.broken_off()
            time.sleep(PAUSE_SECONDS)

    def _stream(self, job_id: str, after: int) -> Iterator[str]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx2.Timeout(10.0, read=ALIVE_SECONDS)
        with self._http.stream("GET", calls.events_path(job_id), headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                raise calls.refusal(answer.status_code, answer.read())
            yield from answer.iter_lines()

    def follow_log(self, job_id: str, name: str = "coordinator", lines: int = 50) -> Iterator[str]:
        """The end of a log, and what is added to it until the job is over."""
        params = {"lines": lines, "follow": True}
        timeout = httpx2.Timeout(10.0, read=None)
        with self._http.stream("GET", calls.log_path(job_id, name), params=params, timeout=timeout) as answer:
            if not answer.is_success:
                raise calls.refusal(answer.status_code, answer.read())
            yield from answer.iter_text()

    def wait(self, job_id: str, timeout_seconds: float | None = None) -> JobWithSpec:
        """The job once nothing happens to it any more unless somebody asks for it. Raises ``TimeoutError``."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            job = self.job(job_id)
            if not job.active:
                return job
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {job.state} after {timeout_seconds:g} s")
            time.sleep(PAUSE_SECONDS)

    def download(self, job_id: str, name: str, target: Path) -> list[Path]:
        """All files of a variant into a folder; half-fetched ones go on where they stopped, and all are checked.

        Raises ``OSError`` for a file whose checksum is not the one that was announced.
        """
        written = []
        for file in self.variant(job_id, name).files:
            download = Download.of(file, target)
            if not download.done():
                with self._http.stream(
                    "GET", calls.file_path(job_id, name, file.path), headers=download.headers()
                ) as answer:
                    if not answer.is_success:
                        raise calls.refusal(answer.status_code, answer.read())
                    with download.open(answer.status_code) as draft:
                        for piece in answer.iter_bytes():
                            draft.write(piece)
                download.finish()
            written.append(download.path)
        return written

    def _send(self, call: Call[T]) -> T:
        for attempt in range(TRIES):
            try:
                answer = self._http.request(
                    call.method, call.path, params=calls.given(call.params), json=call.body, headers=call.headers
                )
            except httpx2.TransportError as error:
                if call.again and attempt + 1 < TRIES and not isinstance(error, httpx2.ConnectError):
                    time.sleep(PAUSE_SECONDS)
                    continue
                raise ServiceUnreachable(f"no service answers at {self.url}: {error}") from error
            if not answer.is_success:
                raise calls.refusal(answer.status_code, answer.content)
            return call.read(answer.content)
        raise AssertionError("every try returns or raises")
