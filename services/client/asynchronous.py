"""The client for code that awaits: the same as :mod:`services.client.synchronous`, word for word."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
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
from services.client.synchronous import ALIVE_SECONDS, PAUSE_SECONDS, TRIES

T = TypeVar("T")


class AsyncClient:
    """One service. Errors: :class:`ServiceError` for what it refuses, :class:`ServiceUnreachable`."""

    def __init__(self, url: str, key: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._http = httpx2.AsyncClient(
            base_url=url, headers=calls.headers_of(key), timeout=timeout_seconds, trust_env=False
        )
        self.url = url

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._http.aclose()

    async def submit(self, spec: Spec, *, idempotency_key: str | None = None, priority: int = 0) -> JobDocument:
        """Hand a job in; sent again after a lost connection, it is still one job."""
        return await self._send(calls.submit(spec, idempotency_key, priority))

    async def plan(self, spec: Spec) -> dict[str, Any]:
        """What a job would take."""
        return await self._send(calls.plan(spec))

    async def jobs(
        self, *, states: Iterable[str] = (), name: str | None = None, owner: str | None = None, limit: int = 50
    ) -> AsyncIterator[JobDocument]:
        """All jobs that fit, the newest first; ``limit`` at a time are fetched."""
        states, cursor = tuple(states), None
        while True:
            page = await self._send(calls.jobs(states, name, owner, limit, cursor))
            for job in page.jobs:
                yield job
            cursor = page.next
            if cursor is None:
                return

    async def job(self, job_id: str) -> JobWithSpec:
        """One job."""
        return await self._send(calls.job(job_id))

    async def cancel(self, job_id: str) -> JobDocument:
        """Ask it to write checkpoints and end for good."""
        return await self._send(calls.ask(job_id, "cancel"))

    async def pause(self, job_id: str) -> JobDocument:
        """Ask it to write checkpoints and pause."""
        return await self._send(calls.ask(job_id, "pause"))

    async def resume(self, job_id: str, layouts: dict[str, dict[str, Any]] | None = None) -> JobDocument:
        """Let it go on; ``layouts``: candidate → another layout."""
        return await self._send(calls.ask(job_id, "resume", {"layouts": layouts or {}}))

    async def delete(self, job_id: str) -> None:
        """Remove a finished job's record."""
        await self._send(calls.delete(job_id))

    async def result(self, job_id: str) -> dict[str, Any]:
        """What the job brought so far."""
        return await self._send(calls.result(job_id))

    async def frontier(self, job_id: str) -> FrontierDocument:
        """Quality against size."""
        return await self._send(calls.frontier(job_id))

    async def frontier_png(self, job_id: str) -> bytes:
        """The same as a picture."""
        return await self._send(calls.frontier_file(job_id, "png"))

    async def frontier_html(self, job_id: str) -> bytes:
        """The same as a page that stands alone."""
        return await self._send(calls.frontier_file(job_id, "html"))

    async def variant(self, job_id: str, name: str) -> VariantDocument:
        """One variant (``candidate/recipe``) and its files."""
        return await self._send(calls.variant(job_id, name))

    async def logs(self, job_id: str) -> list[LogFile]:
        """The logs there are."""
        return (await self._send(calls.logs(job_id))).logs

    async def log(self, job_id: str, name: str = "coordinator", lines: int = 200) -> str:
        """The end of one."""
        return await self._send(calls.log(job_id, name, lines))

    async def metric(self, job_id: str, name: str, candidate: str | None = None, points: int = 1000) -> MetricDocument:
        """One metric against the step."""
        return await self._send(calls.metric(job_id, name, candidate, points))

    async def metrics(self, job_id: str) -> list[str]:
        """The metrics there are."""
        return (await self._send(calls.metrics(job_id))).metrics

    async def presets(self) -> list[PresetDocument]:
        """Published models that a job may name."""
        return await self._send(calls.presets())

    async def ready(self) -> Health:
        """Whether jobs are accepted and dispatched; raises ``ServiceError`` (503) where not."""
        return await self._send(calls.ready())

    async def events(self, job_id: str, after: int = 0) -> AsyncIterator[Event]:
        """Every event up to now, in order."""
        while True:
            page = await self._send(calls.events(job_id, after, 1000))
            for event in page.events:
                yield event
            after = page.next
            if not page.more:
                return

    async def watch(self, job_id: str, after: int = 0) -> AsyncIterator[Event | None]:
        """Every event as it is written, each once, through any number of lost connections; None while there is none.

        Ends when the job is over. Raises ``ServiceError``; a service that is away is waited for.
        """
        parser = EventParser(after)
        while True:
            try:
                async for line in self._stream(job_id, parser.last_id):
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
            await asyncio.sleep(PAUSE_SECONDS)

    async def _stream(self, job_id: str, after: int) -> AsyncIterator[str]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        timeout = httpx2.Timeout(10.0, read=ALIVE_SECONDS)
        async with self._http.stream("GET", calls.events_path(job_id), headers=headers, timeout=timeout) as answer:
            if not answer.is_success:
                raise calls.refusal(answer.status_code, await answer.aread())
            async for line in answer.aiter_lines():
                yield line

    async def follow_log(self, job_id: str, name: str = "coordinator", lines: int = 50) -> AsyncIterator[str]:
        """The end of a log, and what is added to it until the job is over."""
        params = {"lines": lines, "follow": True}
        timeout = httpx2.Timeout(10.0, read=None)
        async with self._http.stream("GET", calls.log_path(job_id, name), params=params, timeout=timeout) as answer:
            if not answer.is_success:
                raise calls.refusal(answer.status_code, await answer.aread())
            async for piece in answer.aiter_text():
                yield piece

    async def wait(self, job_id: str, timeout_seconds: float | None = None) -> JobWithSpec:
        """The job once nothing happens to it any more unless somebody asks for it. Raises ``TimeoutError``."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            job = await self.job(job_id)
            if not job.active:
                return job
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"job {job_id} is {job.state} after {timeout_seconds:g} s")
            await asyncio.sleep(PAUSE_SECONDS)

    async def download(self, job_id: str, name: str, target: Path) -> list[Path]:
        """All files of a variant into a folder; half-fetched ones go on where they stopped, and all are checked.

        Raises ``OSError`` for a file whose checksum is not the one that was announced.
        """
        written = []
        for file in (await self.variant(job_id, name)).files:
            download = Download.of(file, target)
            if not download.done():
                async with self._http.stream(
                    "GET", calls.file_path(job_id, name, file.path), headers=download.headers()
                ) as answer:
                    if not answer.is_success:
                        raise calls.refusal(answer.status_code, await answer.aread())
                    with download.open(answer.status_code) as draft:
                        async for piece in answer.aiter_bytes():
                            draft.write(piece)
                download.finish()
            written.append(download.path)
        return written

    async def _send(self, call: Call[T]) -> T:
        for attempt in range(TRIES):
            try:
                answer = await self._http.request(
                    call.method, call.path, params=calls.given(call.params), json=call.body, headers=call.headers
                )
            except httpx2.TransportError as error:
                if call.again and attempt + 1 < TRIES and not isinstance(error, httpx2.ConnectError):
                    await asyncio.sleep(PAUSE_SECONDS)
                    continue
                raise ServiceUnreachable(f"no service answers at {self.url}: {error}") from error
            if not answer.is_success:
                raise calls.refusal(answer.status_code, answer.content)
            return call.read(answer.content)
        raise AssertionError("every try returns or raises")
