"""Whether the service works, what it counts, and the models it knows by name."""

import time
from collections.abc import Iterator

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.states import JobState
from services.api.context import Service, service_of
from services.api.documents import Health, PresetDocument, PresetList
from services.api.jobs import Reader
from services.api.problems import responses
from services.presets import preset_rows
from services.store.leases import DISPATCHER

router = APIRouter()

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


@router.get("/v1/presets", responses=responses(), summary="Published models that a job may name")
def presets(who: Reader) -> PresetList:
    """The smallest first."""
    return PresetList(presets=[PresetDocument.model_validate(row) for row in preset_rows()])


@router.get("/healthz", summary="Whether this process answers")
def healthz() -> Health:
    """Always, while it does."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": Health}}, summary="Whether jobs are accepted and dispatched")
def readyz(request: Request) -> Response:
    """The store answers, its tables are of this version, and a dispatcher leads."""
    service = service_of(request)
    problems = list(_problems(service))
    health = Health(status="unavailable" if problems else "ok", problems=problems)
    return JSONResponse(health.model_dump(), 503 if problems else 200)


def _problems(service: Service) -> Iterator[str]:
    try:
        found, wanted = service.database.revisions()
        if found != wanted:
            yield f"the store's tables are of version {found}, this code needs {wanted}"
            return
        if service.leases.leader(DISPATCHER) is None:
            yield "no dispatcher leads: jobs are accepted, and start when there is one"
    except SQLAlchemyError:
        yield "the job store does not answer"


@router.get("/metrics", responses=responses(), response_class=Response, summary="Counts for Prometheus")
def metrics(request: Request, who: Reader) -> Response:
    """In Prometheus' text format."""
    meters: Meters = request.app.state.meters
    return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)


class Meters:
    """What is counted of one app."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_StoreCollector(service))
        self._requests = Counter(
            "espalier_http_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "espalier_http_request_seconds", "Until the answer began", ["route"], registry=self.registry
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request that was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)


class Measured:
    """Counts every request by its route (never by its path: anybody can make those up)."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._meters.count(method, route, message["status"], time.perf_counter() - started)
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)


class _StoreCollector(Collector):
    """Counted in the store when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Names only: the store need not answer when the app is made."""
        yield GaugeMetricFamily("espalier_jobs", "Jobs by state")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = self._service.jobs.counts()
        jobs = GaugeMetricFamily("espalier_jobs", "Jobs by state", labels=["state"])
        for state in JobState:
            jobs.add_metric([state.value], counts.get(state.value, 0))
        yield jobs
        devices, oldest = self._service.jobs.load()
        yield GaugeMetricFamily("espalier_devices_held", "Devices that jobs hold", value=devices)
        queued = 0.0 if oldest is None else max(0.0, time.time() - oldest)
        yield GaugeMetricFamily("espalier_oldest_queued_seconds", "Age of the oldest queued job", value=queued)
        leads = self._service.leases.leader(DISPATCHER) is not None
        yield GaugeMetricFamily("espalier_dispatcher_leads", "Whether a dispatcher leads", value=int(leads))
        waiting = self._service.webhooks.waiting()
        yield GaugeMetricFamily("espalier_webhooks_waiting", "Messages to webhooks not delivered yet", value=waiting)
