"""What happened to a job, as its journal has it: in parts, or as a stream that goes on where it was cut off."""

import asyncio
import json
from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from launcher.journal import Journal
from services.api.context import Service, service_of
from services.api.documents import EventPage
from services.api.jobs import JobId, Reader
from services.api.problems import responses
from services.api.views import is_active

router = APIRouter(prefix="/v1")

STREAM = "text/event-stream"
EVENTS_PER_READ = 500
POLL_SECONDS, ALIVE_SECONDS = 0.5, 15.0
RETRY_MILLISECONDS = 1000
MOST_NUMBER = 2**53


@router.get(
    "/jobs/{job_id}/events",
    response_model=EventPage,
    responses={200: {"content": {STREAM: {"schema": {"type": "string"}}}}, **responses(404, 422)},
    summary="A job's events",
)
async def events(
    request: Request,
    who: Reader,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=MOST_NUMBER, description="only events with a higher number")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 200,
    last_event_id: Annotated[str | None, Header(max_length=20, description="streams: as `after`")] = None,
) -> Response:
    """With ``Accept: text/event-stream``, a stream of server-sent events; each has the event's number as its id."""
    service = service_of(request)
    await run_in_threadpool(service.jobs.get, job_id, who.sees)
    if STREAM in request.headers.get("accept", ""):
        start = int(last_event_id) if last_event_id and last_event_id.isdigit() else after
        stream = _stream(request, service, job_id, start)
        return StreamingResponse(stream, media_type=STREAM, headers={"Cache-Control": "no-store"})
    found = await run_in_threadpool(_read, service.journal(job_id), after, limit + 1)
    page = found[:limit]
    document = EventPage(events=page, next=page[-1]["number"] if page else after, more=len(found) > limit)
    return JSONResponse(document.model_dump(mode="json"))


def _read(journal: Journal | None, after: int, limit: int) -> list[dict[str, Any]]:
    return list(islice(journal.events(after), limit)) if journal else []


async def _stream(request: Request, service: Service, job_id: str, after: int) -> AsyncIterator[str]:
    """Every event from ``after`` on, as it is written; ends once the job rests and everything was told."""
    yield f"retry: {RETRY_MILLISECONDS}\n\n"
    silent = 0.0
    while not await request.is_disconnected():
        # Asked before reading: what a job that is over says, it has said by then.
        over = await run_in_threadpool(is_over, service, job_id)
        found = await run_in_threadpool(_read, service.journal(job_id), after, EVENTS_PER_READ)
        for event in found:
            after = event["number"]
            yield f"id: {after}\ndata: {json.dumps(event)}\n\n"
        if found:
            silent = 0.0
            continue
        if over:
            yield "event: end\ndata: {}\n\n"
            return
        await asyncio.sleep(POLL_SECONDS)
        silent += POLL_SECONDS
        if silent >= ALIVE_SECONDS:
            silent = 0.0
            yield ": still here\n\n"


def is_over(service: Service, job_id: str) -> bool:
    """By the store, which the dispatcher tells after the journal: nothing follows unless somebody asks for it."""
    row = service.jobs.peek(job_id)
    return row is None or (row.handle is None and not is_active(row))
