"""From the store's rows to the API's documents."""

import base64
import binascii
from typing import Any

from launcher.states import FINAL, RESTING, JobState
from services.api.documents import JobDocument, JobWithSpec, Links
from services.api.problems import FieldError, Refusal
from services.store.tables import JobRow


def job_document(row: JobRow, base: str) -> JobDocument:
    """``base``: the address that links begin with."""
    return JobDocument.model_validate(_fields(row, base))


def job_with_spec(row: JobRow, base: str) -> JobWithSpec:
    """With all that was asked for."""
    more = {"spec": row.spec, "plan": row.plan, "layouts": row.layouts or {}}
    return JobWithSpec.model_validate(_fields(row, base) | more)


def _fields(row: JobRow, base: str) -> dict[str, Any]:
    seen = row.observed or {}
    same = ("id", "name", "owner", "state", "desired", "priority", "created", "changed", "progress", "error", "devices")
    return {
        **{name: getattr(row, name) for name in same},
        "active": is_active(row),
        "attempt": row.epoch,
        "stage": seen.get("stage"),
        "seconds_left": seen.get("seconds_left"),
        "waiting": row.waiting,
        "candidates": seen.get("candidates", []),
        "variants": seen.get("variants"),
        "links": links(row.id, base),
    }


def is_active(row: JobRow) -> bool:
    """Whether the dispatcher has, or will have, something to do with the job as things are."""
    state = JobState(row.state)
    if state in FINAL:
        return False
    if row.desired == "cancel":
        return True
    if row.desired == "pause":
        return state not in RESTING | {JobState.SUBMITTED}
    by_itself = state not in RESTING or state is JobState.INTERRUPTED
    return by_itself or row.resumed_epoch >= row.epoch


def links(job_id: str, base: str) -> Links:
    """Where to go from a job."""
    here = f"{base}/v1/jobs/{job_id}"
    parts = {name: f"{here}/{name}" for name in Links.model_fields if name not in ("self", "page")}
    return Links(self=here, page=f"{base}/jobs/{job_id}", **parts)


def etag(row: JobRow) -> str:
    """Another one for every version that a reader can tell apart."""
    return f'"{row.version}"'


def write_cursor(sequence: int) -> str:
    """Opaque to whoever is given it."""
    return base64.urlsafe_b64encode(f"before:{sequence}".encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> int:
    """Raises :class:`Refusal` for what :func:`write_cursor` did not write."""
    try:
        word, _, number = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii").partition(":")
        if word == "before" and number.isdigit() and len(number) < 19:
            return int(number)
    except (binascii.Error, UnicodeDecodeError, ValueError):
        pass
    raise Refusal(422, "the request is not valid", [FieldError(parameter="cursor", detail="not a cursor of this list")])
