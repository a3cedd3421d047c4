"""What goes wrong, as problem documents (RFC 9457); a refused field is named by a JSON pointer (RFC 6901)."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from launcher.problems import Problem, SpecError, shorten
from parallelism.objects import StoreAwayError
from services.store.jobs import Conflict, KeyReused, QuotaExceeded, UnknownJob, VersionChanged

MEDIA_TYPE = "application/problem+json"
MOST_ERRORS, LONGEST_DETAIL = 100, 2000

log = logging.getLogger("espalier.api")


class FieldError(BaseModel):
    """One refused field: of the body by ``pointer``, otherwise by the name of the ``parameter``."""

    pointer: str | None = Field(default=None, examples=["#/candidates/0/layout/tensor"])
    parameter: str | None = Field(default=None, examples=["limit"])
    detail: str


class ProblemDocument(BaseModel):
    """What went wrong."""

    type: str = Field(default="about:blank", examples=["about:blank"])
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldError] = []


class Refusal(Exception):
    """A request that is answered with a problem document."""

    def __init__(
        self, status: int, detail: str, errors: Iterable[FieldError] = (), headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors = status, detail, list(errors)
        self.headers = dict(headers or {})


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route says of its refusals in the OpenAPI document; those every route has come by themselves."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "model": ProblemDocument,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}},
        }
        for status in (*statuses, 400, 401, 403, 500, 503)
    }


def pointer(field: str) -> str:
    """``candidates.0.model`` → ``#/candidates/0/model``."""
    parts = [part.replace("~", "~0").replace("/", "~1") for part in field.split(".")] if field else []
    return "#" + "".join(f"/{part}" for part in parts)


def of_problem(problem: Problem) -> FieldError:
    """One complaint about a job's document."""
    return FieldError(pointer=pointer(problem.field), detail=problem.message[:LONGEST_DETAIL])


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Answer every error with a problem document; ``routes``: all that the app answers."""

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return answer(request, error.status, error.detail, error.errors, error.headers)

    def refused_spec(request: Request, error: Exception) -> Response:
        assert isinstance(error, SpecError)
        errors = [of_problem(problem) for problem in error.problems[:MOST_ERRORS]]
        count = len(error.problems)
        detail = f"the job cannot run: {count} problem{'s' if count > 1 else ''}"
        return answer(request, 422, detail, errors)

    def refused_parameters(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        errors = [_of_validation(detail) for detail in error.errors()[:MOST_ERRORS]]
        return answer(request, 422, "the request is not valid", errors)

    def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request, routes))
        return answer(request, error.status_code, str(error.detail), headers=headers)

    def busy(request: Request, error: Exception) -> Response:
        log.error("the store does not answer: %s", str(error).partition("\n")[0])
        return answer(request, 503, "the job store does not answer", headers={"Retry-After": "5"})

    def away(request: Request, error: Exception) -> Response:
        log.error("%s", error)
        return answer(request, 503, "the store of the jobs' files does not answer", headers={"Retry-After": "5"})

    def fault(request: Request, error: Exception) -> Response:
        return answer(request, 500, "a fault of the service; its log says more")

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(SpecError, refused_spec)
    app.add_exception_handler(RequestValidationError, refused_parameters)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(OperationalError, busy)
    app.add_exception_handler(StoreAwayError, away)
    app.add_exception_handler(Exception, fault)
    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _with_status(status))


_STATUS: dict[type[Exception], int] = {
    UnknownJob: 404,
    Conflict: 409,
    VersionChanged: 412,
    KeyReused: 422,
    QuotaExceeded: 429,
}


def _with_status(status: int) -> Any:
    def handler(request: Request, error: Exception) -> Response:
        return answer(request, status, str(error), headers={"Retry-After": "60"} if status == 429 else None)

    return handler


def _methods(request: Request, routes: Sequence[BaseRoute]) -> list[str]:
    """What any route answers at this path: the framework names the methods of the first one only."""
    fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in fitting if isinstance(route, Route) for method in route.methods or ()})


def answer(
    request: Request,
    status: int,
    detail: str,
    errors: Iterable[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The problem document as a response."""
    document = ProblemDocument(
        title=HTTPStatus(status).phrase,
        status=status,
        detail=detail[:LONGEST_DETAIL],
        instance=request.url.path,
        errors=list(errors),
    )
    return JSONResponse(
        document.model_dump(exclude_none=True), status, headers=dict(headers or {}), media_type=MEDIA_TYPE
    )


def _of_validation(detail: Any) -> FieldError:
    """A complaint of FastAPI's about a parameter or a body."""
    where, *path = [str(part) for part in detail["loc"]]
    value = detail.get("input")
    shown = shorten(value) if isinstance(value, str | int | float | bool) else ""
    text = f"{shown}: {detail['msg']}" if shown else str(detail["msg"])
    if where == "body":
        return FieldError(pointer="#" + "".join(f"/{part}" for part in path), detail=text)
    return FieldError(parameter=".".join(path), detail=text)
