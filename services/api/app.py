"""The app, made from its settings: routes, middleware, handlers. No globals."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.spec import JobSpec
from services.api import artifacts, events, jobs, logs, measures, pages, problems, system
from services.api.bodies import BodyLimit
from services.api.context import Service
from services.settings import Settings

ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'",
}

REF = "#/components/schemas/{model}"


def make_app(settings: Settings) -> FastAPI:
    """One service's app; the store's tables must be there. Raises ``StoreError`` and ``ValueError``."""
    service = Service.open(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.database.close()

    app = _App(
        title="Espalier",
        version=version("espalier-service"),
        description="Train large, then compress: jobs, what becomes of them, and what they leave.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.state.meters = system.Meters(service)
    rooms = (jobs, events, logs, artifacts, measures, system, pages)
    for room in rooms:
        app.include_router(room.router)
    problems.install(app, [route for room in rooms for route in room.router.routes])
    app.add_middleware(BodyLimit, limit=settings.body_bytes)
    app.add_middleware(system.Measured, meters=app.state.meters)
    app.add_middleware(Headers)
    return app


class _App(FastAPI):
    """Its OpenAPI document has the job's document, which routes read themselves, and the keys."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            schema = JobSpec.model_json_schema(ref_template=REF)
            schemas = document["components"]["schemas"]
            schemas |= schema.pop("$defs")
            schemas["JobSpec"] = schema
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {"key": []}]
            for path in ("/healthz", "/readyz"):
                document["paths"][path]["get"]["security"] = []
            return document
        return self.openapi_schema


class Headers:
    """Headers that every answer has, unless its route sets them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in ALWAYS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)
