"""Handing jobs in, looking at them, asking them to stop or go on."""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ValidationError

from launcher.jobs import free_disk_bytes
from launcher.planning.plan import with_layouts
from launcher.problems import Problem, SpecError, of_validation
from launcher.spec import JobSpec, parse_spec
from launcher.states import JobState
from parallelism.layout import Layout
from services.api.access import PRIORITIES, Principal, allowed
from services.api.bodies import confine, read_document
from services.api.context import Service, service_of
from services.api.documents import JobDocument, JobPage, JobWithSpec, ResumeRequest
from services.api.problems import FieldError, Refusal, responses
from services.api.views import etag, job_document, job_with_spec, links, read_cursor, write_cursor
from services.store.jobs import Filter, NewJob, Wish, refuse_wish
from services.store.records import FORGOTTEN
from services.store.tables import JobRow
from services.submission import Request as CheckedJob
from services.submission import make_request

router = APIRouter(prefix="/v1")

JobId = Annotated[str, Path(description="a job's id", min_length=1, max_length=100, pattern=r"^[a-z0-9][a-z0-9._-]*$")]
Reader = Annotated[Principal, Depends(allowed("reader"))]
Submitter = Annotated[Principal, Depends(allowed("submitter"))]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$", description="the same key never makes a second job"
    ),
]
IfMatch = Annotated[str | None, Header(max_length=100, description="the ETag of the version that is meant")]
IfNoneMatch = Annotated[str | None, Header(max_length=1000, description="an ETag that is known already")]
Priority = Annotated[
    int, Query(ge=PRIORITIES[0], le=PRIORITIES[-1], description="higher ones start first; keys have a highest one")
]

JOB_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"$ref": "#/components/schemas/JobSpec"}}
            for kind in ("application/json", "application/yaml")
        },
    }
}
JOB_ID_HEADERS = {
    "Location": {"description": "the job", "schema": {"type": "string"}},
    "ETag": {"description": "its version", "schema": {"type": "string"}},
}


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobDocument,
    responses={202: {"headers": JOB_ID_HEADERS}, **responses(409, 413, 415, 422, 429, 507)},
    openapi_extra=JOB_BODY,
    summary="Hand a job in",
)
async def submit(
    request: Request, who: Submitter, idempotency_key: IdempotencyKey = None, priority: Priority = 0
) -> Response:
    """The job is checked and planned, and written down before the answer; it runs when its turn comes."""
    document = await read_document(request)
    row = await run_in_threadpool(_submit, service_of(request), who, document, idempotency_key, priority)
    base = base_url(request)
    headers = {"Location": links(row.id, base).self, "ETag": etag(row)}
    return _document(job_document(row, base), 202, headers)


def _submit(service: Service, who: Principal, document: object, key: str | None, priority: int) -> JobRow:
    if priority > who.highest_priority:
        detail = f"{priority}: the highest that this key may ask for is {who.highest_priority}"
        raise Refusal(422, "the request is not valid", [FieldError(parameter="priority", detail=detail)])
    spec = parse_spec(document)
    request_hash = _hash(spec, priority)
    if key is not None:
        earlier = service.jobs.earlier(who.account.owner, key, request_hash)
        if earlier:
            return earlier
    checked = checked_job(service, who, spec)
    if free_disk_bytes(service.home) < service.settings.disk_reserve_bytes:
        raise Refusal(507, "the service's disk is full: no job is accepted until there is room")
    new = NewJob(
        id=f"{spec.name}-{secrets.token_hex(6)}",
        name=spec.name,
        spec=checked.spec.model_dump(mode="json"),
        plan=checked.plan.model_dump(mode="json"),
        request_hash=request_hash,
        devices=devices_of(checked.spec, service),
        priority=priority,
        idempotency_key=key,
    )
    return service.jobs.submit(new, who.account)[0]


def checked_job(service: Service, who: Principal, spec: JobSpec) -> CheckedJob:
    """A spec that may run here, with its plan. Raises ``SpecError``."""
    settings = service.settings
    roots = settings.roots
    if roots is None:
        roots = [FilePath("/")] if who.local else [settings.home / "data"]
    confine(spec, roots, settings.protocols)
    return make_request(placed(spec, settings.backends), service.home)


def placed(spec: JobSpec, backends: Sequence[str] | None) -> JobSpec:
    """The spec with a back-end that the service offers. Raises ``SpecError`` where it names another."""
    execution = spec.execution
    if backends is None:
        return spec
    if "backend" not in execution.model_fields_set:
        return spec.model_copy(update={"execution": execution.model_copy(update={"backend": backends[0]})})
    if execution.backend not in backends:
        how = f"use {' or '.join(backends)}, or leave it out"
        raise SpecError([Problem("execution.backend", execution.backend, "this service does not offer it", how)])
    return spec


def devices_of(spec: JobSpec, service: Service) -> int:
    """Cores or GPUs that the job holds while it runs; one that wants more than there are runs alone."""
    total = service.settings.devices
    wanted = (spec.execution.devices or total) * spec.execution.threads_per_rank
    return min(wanted, total)


def _hash(spec: JobSpec, priority: int) -> str:
    """What makes two requests the same: what was asked for, however it was written."""
    text = json.dumps([spec.model_dump(mode="json"), priority], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@router.get("/jobs", response_model=JobPage, responses=responses(422), summary="List jobs, the newest first")
def list_jobs(
    request: Request,
    who: Reader,
    state: Annotated[list[JobState] | None, Query(max_length=10, description="several times: any of them")] = None,
    name: Annotated[str | None, Query(max_length=63, description="the job's name")] = None,
    owner: Annotated[str | None, Query(max_length=200, description="for admins: whose jobs")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=100, description="`next` of the part before")] = None,
) -> Response:
    """One part of the list; ``next`` leads to the following one."""
    seen_owner = who.sees or owner
    if owner is not None and who.sees not in (None, owner):
        return _document(JobPage(jobs=[], next=None))
    before = read_cursor(cursor) if cursor is not None else None
    which = Filter(seen_owner, tuple(one.value for one in state or ()), name)
    rows = service_of(request).jobs.page(which, limit + 1, before)
    base = base_url(request)
    more = len(rows) > limit
    return _document(
        JobPage(
            jobs=[job_document(row, base) for row in rows[:limit]],
            next=write_cursor(rows[limit - 1].sequence) if more else None,
        )
    )


@router.get(
    "/jobs/{job_id}",
    response_model=JobWithSpec,
    responses={304: {"description": "Not Modified"}, **responses(404, 422)},
    summary="One job",
)
def show(request: Request, who: Reader, job_id: JobId, if_none_match: IfNoneMatch = None) -> Response:
    """State, progress, budgets, what it waits for, and the document that describes it."""
    row = service_of(request).jobs.get(job_id, who.sees, whole=True)
    headers = {"ETag": etag(row), "Cache-Control": "no-cache"}
    if if_none_match is not None and etag(row) in [one.strip().removeprefix("W/") for one in if_none_match.split(",")]:
        return Response(status_code=304, headers=headers)
    return _document(job_with_spec(row, base_url(request)), headers=headers)


ASKED: dict[str, Any] = {
    "status_code": 202,
    "response_model": JobDocument,
    "responses": {202: {"headers": {"ETag": JOB_ID_HEADERS["ETag"]}}, **responses(404, 409, 412, 413, 422)},
}


@router.post("/jobs/{job_id}/cancel", summary="End a job for good, with checkpoints", **ASKED)
def cancel(request: Request, who: Submitter, job_id: JobId, if_match: IfMatch = None) -> Response:
    """Every candidate writes a checkpoint first; what is done stays."""
    return _ask(request, who, job_id, Wish("cancel"), if_match)


@router.post("/jobs/{job_id}/pause", summary="Pause a job, with checkpoints", **ASKED)
def pause(request: Request, who: Submitter, job_id: JobId, if_match: IfMatch = None) -> Response:
    """Every candidate writes a checkpoint first; a job that has not started stays where it is."""
    return _ask(request, who, job_id, Wish("pause"), if_match)


@router.post("/jobs/{job_id}/resume", summary="Let a job go on, also at another layout", **ASKED)
def resume(
    request: Request, who: Submitter, job_id: JobId, asked: ResumeRequest | None = None, if_match: IfMatch = None
) -> Response:
    """From its last checkpoints. Training goes on the same way at any layout: only how it is spread changes."""
    wish = Wish("run")
    if asked is not None and asked.layouts:
        wish = _other_layouts(service_of(request), who, job_id, asked.layouts)
    return _ask(request, who, job_id, wish, if_match)


def _other_layouts(service: Service, who: Principal, job_id: str, given: dict[str, dict[str, Any]]) -> Wish:
    """The wish to go on at other layouts, checked as at submission. Raises ``SpecError`` by field of the request."""
    row = service.jobs.get(job_id, who.sees, whole=True)
    refuse_wish(JobState(row.state), row.desired, "run")
    spec = JobSpec.model_validate(row.spec)
    trained = [candidate.name for candidate in spec.trained]
    layouts: dict[str, Layout] = {}
    for name, document in {**(row.layouts or {}), **given}.items():
        if name not in trained:
            known = ", ".join(trained) or "none"
            raise SpecError([Problem(f"layouts.{name}", None, "no such candidate is trained", f"there are: {known}")])
        try:
            layouts[name] = Layout.model_validate(document)
        except ValidationError as error:
            problems = [problem.below(f"layouts.{name}") for problem in of_validation(error, Layout)]
            raise SpecError(problems) from error
    changed = with_layouts(spec, layouts)
    checked = checked_job(service, who, changed)
    asked = {name: layouts[name].model_dump(mode="json") for name in given}
    return Wish("run", asked, checked.plan.model_dump(mode="json"), devices_of(changed, service))


def _ask(request: Request, who: Principal, job_id: str, wish: Wish, if_match: str | None) -> Response:
    row = service_of(request).jobs.ask(job_id, who.sees, wish, version_of(if_match))
    return _document(job_document(row, base_url(request)), 202, {"ETag": etag(row)})


def _document(model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A document that was checked when it was made: the framework would check and copy it once more."""
    return Response(model.model_dump_json(), status, headers=headers, media_type="application/json")


@router.delete(
    "/jobs/{job_id}", status_code=204, responses=responses(404, 409, 412, 422), summary="Remove a finished job's record"
)
def delete(request: Request, who: Submitter, job_id: JobId, if_match: IfMatch = None) -> Response:
    """The job's directory stays, until ``espalier gc``; it is not taken up again when the store is rebuilt."""
    service = service_of(request)

    def forget() -> None:
        journal = service.journal(job_id)
        if journal is not None:
            journal.write_document(FORGOTTEN, {"by": who.account.owner})

    service.jobs.delete(job_id, who.sees, version_of(if_match), before=forget)
    return Response(status_code=204)


def version_of(if_match: str | None) -> int | None:
    """The version behind an ETag; None for none, and for ``*``. Raises :class:`Refusal`."""
    if if_match is None or if_match.strip() == "*":
        return None
    number = if_match.strip().strip('"')
    if not number.isdigit() or len(number) > 12:
        raise Refusal(412, "the ETag is none of this job's")
    return int(number)


def base_url(request: Request) -> str:
    """The address that links begin with."""
    public = service_of(request).settings.public_url
    return public.rstrip("/") if public else str(request.base_url).rstrip("/")


@router.post(
    "/plan",
    responses=responses(413, 415, 422),
    openapi_extra=JOB_BODY,
    summary="What a job would take, without running it",
)
async def plan(request: Request, who: Reader) -> dict[str, Any]:
    """Layouts, steps, memory, disk, time and cost, after the same checks as at submission."""
    document = await read_document(request)
    checked = await run_in_threadpool(_plan, service_of(request), who, document)
    return checked.plan.model_dump(mode="json")


def _plan(service: Service, who: Principal, document: object) -> CheckedJob:
    return checked_job(service, who, parse_spec(document))
