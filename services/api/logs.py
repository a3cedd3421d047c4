"""The output of a job's processes: which logs there are, the end of one, and what is added to it."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, StreamingResponse

from launcher.backends.common import tail
from parallelism import places
from services.api.context import service_of
from services.api.documents import LogFile, LogList
from services.api.events import ALIVE_SECONDS, POLL_SECONDS, is_over
from services.api.jobs import JobId, Reader
from services.api.problems import Refusal, responses

router = APIRouter(prefix="/v1")

RANK = re.compile(r"^(?P<candidate>.+)\.e\d+-g\d+\.rank(?P<rank>\d+)$")
PIECE_BYTES = 1 << 16


@router.get("/jobs/{job_id}/logs", responses=responses(404, 422), summary="The logs there are")
def logs(request: Request, who: Reader, job_id: JobId) -> LogList:
    """One for the coordinator, one for each rank of every process group, and others."""
    service = service_of(request)
    service.jobs.get(job_id, who.sees)
    folder = service.home.journal(job_id).logs_dir
    return LogList(logs=[_describe(path) for path in _paths(folder)])


@router.get(
    "/jobs/{job_id}/logs/{name}",
    response_class=PlainTextResponse,
    responses=responses(404, 422),
    summary="The end of a log, and what is added to it",
)
async def log(
    request: Request,
    who: Reader,
    job_id: JobId,
    name: Annotated[str, PathParameter(min_length=1, max_length=200)],
    lines: Annotated[int, Query(ge=1, le=10_000)] = 200,
    follow: Annotated[bool, Query(description="go on until the job is over")] = False,
) -> Response:
    """Plain text, as the process wrote it."""
    service = service_of(request)
    await run_in_threadpool(service.jobs.get, job_id, who.sees)
    # Only what the folder really holds can be named, so that no name leads out of it.
    paths = {path.stem: path for path in await run_in_threadpool(_paths, service.home.journal(job_id).logs_dir)}
    if name not in paths:
        raise Refusal(404, f"job {job_id} has no log of that name: GET …/logs lists them")
    size = await run_in_threadpool(places.size, paths[name])
    text = await run_in_threadpool(tail, paths[name], lines)
    headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    if not follow:
        return PlainTextResponse(text + "\n" if text else "", headers=headers)

    async def following() -> AsyncIterator[bytes]:
        yield (text + "\n").encode() if text else b""
        position, waited = size, 0.0
        while not await request.is_disconnected():
            over = await run_in_threadpool(is_over, service, job_id)
            piece = await run_in_threadpool(_piece, paths[name], position)
            if piece:
                position += len(piece)
                yield piece
            elif over:
                return
            else:
                await asyncio.sleep(POLL_SECONDS)
                waited += POLL_SECONDS
                if waited > ALIVE_SECONDS:
                    waited = 0.0
                    yield b""

    return StreamingResponse(following(), media_type="text/plain", headers=headers)


def _paths(folder: Path) -> list[Path]:
    """Log files, links left out: a job could have put them there."""
    if places.is_mirrored(folder):
        return [folder / name for name in places.sizes(folder) if name.endswith(".log") and "/" not in name]
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.suffix == ".log" and path.is_file() and not path.is_symlink()
    )


def _describe(path: Path) -> LogFile:
    found = RANK.match(path.stem)
    return LogFile(
        name=path.stem,
        bytes=places.size(path),
        modified=places.modified(path),
        candidate=found["candidate"] if found else None,
        rank=int(found["rank"]) if found else None,
    )


def _piece(path: Path, position: int) -> bytes:
    if places.is_mirrored(path):
        return places.read_bytes(path)[position : position + PIECE_BYTES]
    with open(path, "rb") as file:
        file.seek(position)
        return file.read(PIECE_BYTES)
