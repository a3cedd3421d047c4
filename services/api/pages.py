"""The routes of the status page. A browser shows its key as a password; nothing can be changed from here."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse

from compression.report import mark_frontier
from compression.results import Variant
from launcher.result import result_document
from services.api.access import Principal, identify
from services.api.context import service_of
from services.api.jobs import JobId, base_url
from services.api.views import job_document, read_cursor, write_cursor
from services.measures import metric_points
from services.store.jobs import Filter
from services.web.pages import SHOWN_METRICS, job_page, jobs_page
from services.web.render import Page

router = APIRouter(include_in_schema=False)

JOBS_PER_PAGE = 50


def viewer(request: Request) -> Principal:
    """Whoever has a key may look."""
    return identify(request, page=True)


Viewer = Annotated[Principal, Depends(viewer)]


@router.get("/", response_class=HTMLResponse)
def index(request: Request, who: Viewer, cursor: Annotated[str | None, Query(max_length=100)] = None) -> Response:
    """All jobs that this one may see, the newest first."""
    service = service_of(request)
    rows = service.jobs.page(Filter(who.sees), JOBS_PER_PAGE + 1, read_cursor(cursor) if cursor else None)
    base = base_url(request)
    jobs = [job_document(row, base).model_dump(mode="json") for row in rows[:JOBS_PER_PAGE]]
    more = write_cursor(rows[JOBS_PER_PAGE - 1].sequence) if len(rows) > JOBS_PER_PAGE else None
    counts = service.jobs.counts(who.sees)
    return _answer(
        jobs_page(jobs, counts, more, service.settings.mlflow_url, owners=who.sees is None and not who.local)
    )


@router.get("/jobs/{job_id}", response_class=HTMLResponse)
def job(request: Request, who: Viewer, job_id: JobId) -> Response:
    """One job."""
    service = service_of(request)
    row = service.jobs.get(job_id, who.sees)
    metrics, variants = {}, []
    with service.opened(job_id) as journal:
        if journal is not None:
            events = list(journal.events())
            metrics = {name: found for name in SHOWN_METRICS if (found := metric_points(events, name))}
            variants = [Variant.model_validate(one) for one in result_document(journal)["variants"]]
    document = job_document(row, base_url(request)).model_dump(mode="json")
    return _answer(job_page(document, metrics, mark_frontier(variants)))


def _answer(page: Page) -> Response:
    return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy, "Cache-Control": "no-store"})
