"""Metrics against the step, read from the job's events."""

import math
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi import Path as PathParameter

from services.api.context import service_of
from services.api.documents import MetricDocument, MetricNames, Series
from services.api.jobs import JobId, Reader
from services.api.problems import Refusal, responses
from services.measures import Points, metric_points, thin
from services.measures import metric_names as names

router = APIRouter(prefix="/v1")


@router.get("/jobs/{job_id}/metrics", responses=responses(404, 422), summary="What can be drawn")
def metric_names(request: Request, who: Reader, job_id: JobId) -> MetricNames:
    """Names of the metrics that some candidate has."""
    service = service_of(request)
    service.jobs.get(job_id, who.sees)
    with service.opened(job_id) as journal:
        found = names(journal.events() if journal else [])
    return MetricNames(metrics=found)


@router.get("/jobs/{job_id}/metrics/{name}", responses=responses(404, 422), summary="One metric against the step")
def metric(
    request: Request,
    who: Reader,
    job_id: JobId,
    name: Annotated[str, PathParameter(min_length=1, max_length=100)],
    candidate: Annotated[str | None, Query(max_length=63)] = None,
    points: Annotated[int, Query(ge=2, le=10_000, description="per candidate at most, evenly chosen")] = 1000,
) -> MetricDocument:
    """One series per candidate."""
    service = service_of(request)
    service.jobs.get(job_id, who.sees)
    with service.opened(job_id) as journal:
        found = metric_points(journal.events() if journal else [], name)
    if not found:
        raise Refusal(404, f"job {job_id} has no metric {name}: GET …/metrics lists them")
    chosen = {one: rows for one, rows in found.items() if candidate in (None, one)}
    return MetricDocument(name=name, series=[_thin(one, rows, points) for one, rows in sorted(chosen.items())])


def _thin(candidate: str, points: Points, most: int) -> Series:
    rows = thin(points, most)
    return Series(
        candidate=candidate,
        steps=[step for step, _, _ in rows],
        values=[value if math.isfinite(value) else None for _, value, _ in rows],
        times=[time for _, _, time in rows],
    )
