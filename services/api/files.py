"""Files as answers, whole or a range of them; what lies in an object store is passed on and not kept."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from parallelism import places
from services.api.problems import Refusal

BINARY = "application/octet-stream"
PIECE_BYTES = 4 << 20
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def send_file(request: Request, path: Path, size: int, headers: Mapping[str, str], filename: str) -> Response:
    """``size`` bytes under a name of their own; ``headers`` has their ``ETag``.

    Raises :class:`Refusal` for a range that begins behind the end.
    """
    if not places.is_mirrored(path):
        return FileResponse(path, media_type=BINARY, headers=headers, filename=filename)
    given = {
        **headers,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'attachment; filename="{quote(filename)}"',
    }
    span = None
    if request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        span = asked_range(request.headers.get("range", ""), size)
    start, end = span or (0, size)
    if span:
        given["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    given["Content-Length"] = str(end - start)
    pieces = places.pieces(path, start, end, PIECE_BYTES)
    return StreamingResponse(pieces, 206 if span else 200, headers=given, media_type=BINARY)


def asked_range(header: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, end) that a ``Range`` asks for (RFC 9110, section 14); None: all of them.

    A header that is not understood, or asks for several ranges, is ignored, as it may be.
    """
    found = RANGE.fullmatch(header.strip())
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last) + 1, size) if first and last else size
    if start >= size:
        raise Refusal(416, f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return (start, end) if start < end else None
