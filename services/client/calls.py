"""What can be asked of the API: each request with the type of its answer. Shared by both forms of the client."""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from launcher.events import Event
from launcher.spec import JobSpec
from services.api.documents import (
    EventPage,
    FrontierDocument,
    Health,
    JobDocument,
    JobPage,
    JobWithSpec,
    LogList,
    MetricDocument,
    MetricNames,
    PresetDocument,
    PresetList,
    VariantDocument,
)

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

Spec = JobSpec | Mapping[str, Any]


class ServiceError(ValueError):
    """The service refuses a request; ``problem`` is its problem document."""

    def __init__(self, status: int, problem: Mapping[str, Any]) -> None:
        self.status, self.problem = status, dict(problem)
        lines = [f"{one.get('pointer') or one.get('parameter')}: {one['detail']}" for one in problem.get("errors", [])]
        super().__init__("\n".join(lines) or str(problem.get("detail") or f"status {status}"))


class ServiceUnreachable(OSError):
    """Nobody answers at the service's address."""


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request; ``read`` makes its answer of the body. ``again``: it may be sent twice."""

    method: str
    path: str
    read: Callable[[bytes], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    again: bool = True


def submit(spec: Spec, idempotency_key: str | None, priority: int) -> Call[JobDocument]:
    """Hand a job in. Without a key of its own the request gets one, so that sending it twice makes one job."""
    document = _document(spec)
    headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    return Call("POST", "/v1/jobs", as_model(JobDocument), {"priority": priority}, document, headers)


def _document(spec: Spec) -> dict[str, Any]:
    """Only what was said: the rest is the service's to choose."""
    return spec.model_dump(mode="json", exclude_unset=True) if isinstance(spec, JobSpec) else dict(spec)


def plan(spec: Spec) -> Call[dict[str, Any]]:
    return Call("POST", "/v1/plan", as_document, body=_document(spec))


def jobs(states: Iterable[str], name: str | None, owner: str | None, limit: int, cursor: str | None) -> Call[JobPage]:
    params = {"state": list(states), "name": name, "owner": owner, "limit": limit, "cursor": cursor}
    return Call("GET", "/v1/jobs", as_model(JobPage), params)


def job(job_id: str) -> Call[JobWithSpec]:
    return Call("GET", _job(job_id), as_model(JobWithSpec))


def ask(job_id: str, what: str, body: Any = None) -> Call[JobDocument]:
    """``what``: cancel, pause or resume; asking twice is asking once."""
    return Call("POST", f"{_job(job_id)}/{what}", as_model(JobDocument), body=body)


def delete(job_id: str) -> Call[None]:
    return Call("DELETE", _job(job_id), lambda body: None, again=False)


def events(job_id: str, after: int, limit: int) -> Call[EventPage]:
    return Call("GET", f"{_job(job_id)}/events", as_model(EventPage), {"after": after, "limit": limit})


def result(job_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"{_job(job_id)}/result", as_document)


def frontier(job_id: str) -> Call[FrontierDocument]:
    return Call("GET", f"{_job(job_id)}/frontier", as_model(FrontierDocument))


def frontier_file(job_id: str, kind: str) -> Call[bytes]:
    """``kind``: png or html."""
    return Call("GET", f"{_job(job_id)}/frontier.{kind}", lambda body: body)


def variant(job_id: str, name: str) -> Call[VariantDocument]:
    """``name``: candidate/recipe."""
    return Call("GET", f"{_job(job_id)}/variants/{quote(name)}", as_model(VariantDocument))


def logs(job_id: str) -> Call[LogList]:
    return Call("GET", f"{_job(job_id)}/logs", as_model(LogList))


def log(job_id: str, name: str, lines: int) -> Call[str]:
    return Call("GET", log_path(job_id, name), lambda body: body.decode("utf-8", "replace"), {"lines": lines})


def metrics(job_id: str) -> Call[MetricNames]:
    return Call("GET", f"{_job(job_id)}/metrics", as_model(MetricNames))


def metric(job_id: str, name: str, candidate: str | None, points: int) -> Call[MetricDocument]:
    params = {"candidate": candidate, "points": points}
    return Call("GET", f"{_job(job_id)}/metrics/{quote(name)}", as_model(MetricDocument), params)


def presets() -> Call[list[PresetDocument]]:
    return Call("GET", "/v1/presets", lambda body: PresetList.model_validate_json(body).presets)


def ready() -> Call[Health]:
    return Call("GET", "/readyz", as_model(Health))


def log_path(job_id: str, name: str) -> str:
    """Where a log is."""
    return f"{_job(job_id)}/logs/{quote(name, safe='')}"


def events_path(job_id: str) -> str:
    """Where a job's events are."""
    return f"{_job(job_id)}/events"


def file_path(job_id: str, name: str, file: str) -> str:
    """Where a variant's file is."""
    return f"{_job(job_id)}/variants/{quote(name)}/files/{quote(file)}"


def headers_of(key: str | None) -> dict[str, str]:
    """Headers of every request."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that say something."""
    return {name: value for name, value in params.items() if value is not None}


def refusal(status: int, body: bytes) -> ServiceError:
    """The error behind an answer that is none."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = {}
    return ServiceError(status, problem if isinstance(problem, dict) else {})


def as_model(model: type[M]) -> Callable[[bytes], M]:
    return model.model_validate_json


def as_document(body: bytes) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(body)
    return document


class StreamEnded(Exception):
    """The server has told everything that there will be."""


@dataclass
class EventParser:
    """Server-sent events, line by line."""

    last_id: int
    _data: list[str] = field(default_factory=list)
    _id: int | None = None
    _kind: str = ""

    def feed(self, line: str) -> Event | None:
        """An event that this line completes. Raises :class:`StreamEnded`."""
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line == "":
            return self._complete()
        if name == "data":
            self._data.append(value)
        elif name == "id" and value.isdigit():
            self._id = int(value)
        elif name == "event":
            self._kind = value
        return None

    def broken_off(self) -> None:
        """The connection is gone: half an event counts for nothing."""
        self._data, self._id, self._kind = [], None, ""

    def _complete(self) -> Event | None:
        data, number, kind = "\n".join(self._data), self._id, self._kind
        self.broken_off()
        if kind == "end":
            raise StreamEnded
        if number is None or number <= self.last_id:
            return None
        self.last_id = number
        event: Event = json.loads(data)
        return event


def _job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"
