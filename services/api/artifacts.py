"""What a job leaves: its result, the frontier as data, picture and page, its variants and their files."""

import base64
import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from compression.report import draw, mark_frontier
from compression.results import Variant
from launcher.journal import Journal
from launcher.result import result_document
from launcher.states import JobState
from launcher.tracking.process import page_url
from parallelism import places
from services.api.context import Service, service_of
from services.api.documents import FileDocument, FrontierDocument, VariantDocument
from services.api.files import send_file
from services.api.jobs import JobId, Reader, base_url
from services.api.problems import Refusal, responses
from services.web.frontier import frontier_page

router = APIRouter(prefix="/v1")

COMPACT, EXPORT = "compact", "export"
HASH_BYTES = 1 << 20

VariantName = Annotated[str, PathParameter(min_length=1, max_length=200, description="as in the list of variants")]


@router.get("/jobs/{job_id}/result", responses=responses(404, 422), summary="What a job brought, in one document")
def result(request: Request, who: Reader, job_id: JobId) -> dict[str, Any]:
    """The same document as ``espalier run --json`` writes; a job in progress has gaps."""
    return _result(service_of(request), who.sees, job_id)


@router.get("/jobs/{job_id}/frontier", responses=responses(404, 422), summary="Quality against size, as data")
def frontier(request: Request, who: Reader, job_id: JobId) -> FrontierDocument:
    """Every variant measured so far."""
    document = _result(service_of(request), who.sees, job_id)
    return FrontierDocument(
        job=job_id,
        name=document["name"],
        complete=document["state"] == JobState.SUCCEEDED,
        variants=[variant.row() for variant in _marked(document)],
    )


@router.get(
    "/jobs/{job_id}/frontier.png",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}, **responses(404, 422)},
    summary="Quality against size, as a picture",
)
def frontier_png(request: Request, who: Reader, job_id: JobId) -> Response:
    """Drawn from what has been measured so far."""
    document = _result(service_of(request), who.sees, job_id)
    variants = _some(_marked(document), job_id)
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        path = Path(folder) / "frontier.png"
        draw(variants, path, title=f"{document['name']}: quality against size at the same training budget")
        return Response(path.read_bytes(), media_type="image/png", headers={"Cache-Control": "no-cache"})


@router.get(
    "/jobs/{job_id}/frontier.html",
    response_class=HTMLResponse,
    responses=responses(404, 422),
    summary="Quality against size, as a page that stands alone",
)
def frontier_html(request: Request, who: Reader, job_id: JobId) -> Response:
    """One file without references to others: it can be kept and sent on."""
    document = _result(service_of(request), who.sees, job_id)
    page = frontier_page(document["name"], _some(_marked(document), job_id))
    return HTMLResponse(page.html, headers={"Content-Security-Policy": page.policy})


@router.get("/jobs/{job_id}/variants", responses=responses(404, 422), summary="The variants measured so far")
def variants(request: Request, who: Reader, job_id: JobId) -> FrontierDocument:
    """The smallest first; the name of one is ``candidate/recipe``."""
    return frontier(request, who, job_id)


@router.get(
    "/jobs/{job_id}/variants/{candidate}/{recipe}",
    responses=responses(404, 422),
    summary="One variant and its files",
)
def variant(
    request: Request, who: Reader, job_id: JobId, candidate: VariantName, recipe: VariantName
) -> VariantDocument:
    """Every file with its size and checksum."""
    service = service_of(request)
    journal, row = _variant(service, who.sees, job_id, f"{candidate}/{recipe}")
    here = f"{base_url(request)}/v1/jobs/{job_id}/variants/{quote(candidate)}/{quote(recipe)}/files"
    known = _export_checksums(journal, row["name"])
    files = [
        FileDocument(path=name, bytes=size, sha256=_checksum(path, name, known), href=f"{here}/{quote(name)}")
        for name, (path, size) in _files(journal, row).items()
    ]
    return VariantDocument(variant=row, files=files)


@router.get(
    "/jobs/{job_id}/variants/{candidate}/{recipe}/files/{file:path}",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "Partial Content"},
        **responses(404, 416, 422),
    },
    summary="One file of a variant, or ranges of it",
)
def variant_file(
    request: Request,
    who: Reader,
    job_id: JobId,
    candidate: VariantName,
    recipe: VariantName,
    file: Annotated[str, PathParameter(min_length=1, max_length=500)],
) -> Response:
    """Range requests are answered; ``ETag`` and ``Repr-Digest`` are those of the whole file."""
    service = service_of(request)
    journal, row = _variant(service, who.sees, job_id, f"{candidate}/{recipe}")
    files = _files(journal, row)
    if file not in files:
        raise Refusal(404, "the variant has no file of that name: GET …/variants/NAME lists them")
    path, size = files[file]
    digest = _checksum(path, file, _export_checksums(journal, row["name"]))
    encoded = base64.b64encode(bytes.fromhex(digest)).decode()
    headers = {"ETag": f'"{digest}"', "Repr-Digest": f"sha-256=:{encoded}:", "Cache-Control": "no-cache"}
    name = f"{job_id}-{candidate}-{recipe}-{Path(file).name}"
    return send_file(request, path, size, headers, name)


@router.get(
    "/jobs/{job_id}/mlflow",
    status_code=307,
    response_class=RedirectResponse,
    responses={307: {"description": "to the job's run in MLflow"}, **responses(404, 422)},
    summary="The job's run in MLflow",
)
def mlflow(request: Request, who: Reader, job_id: JobId) -> Response:
    """To the run once MLflow knows it; before that, to where it will be listed."""
    service = service_of(request)
    service.jobs.get(job_id, who.sees)
    server = service.settings.mlflow_url
    if server is None:
        raise Refusal(404, "this service feeds no MLflow server that people can see")
    return RedirectResponse(mlflow_address(server, service.journal(job_id)), 307)


def mlflow_address(server: str, journal: Journal | None) -> str:
    """Where a job's run is, or will be listed."""
    place = journal.document("tracking/mlflow") if journal else None
    return page_url(server, place["experiment_id"], place["run_id"]) if place else page_url(server)


def _result(service: Service, owner: str | None, job_id: str) -> dict[str, Any]:
    row = service.jobs.get(job_id, owner)
    with service.opened(job_id) as journal:
        if journal is not None:
            document, server = result_document(journal), service.settings.mlflow_url
            if server and document["mlflow_url"]:  # the journal has the server's address among the parts
                document["mlflow_url"] = mlflow_address(server, journal)
            return document
    raise Refusal(404, f"job {row.id} has not been dispatched yet: there is nothing to show")


def _marked(document: dict[str, Any]) -> list[Variant]:
    return mark_frontier([Variant.model_validate(row) for row in document["variants"]])


def _some(found: list[Variant], job_id: str) -> list[Variant]:
    if not found:
        raise Refusal(404, f"job {job_id} has no measured variants yet: there is nothing to draw")
    return found


def _variant(service: Service, owner: str | None, job_id: str, name: str) -> tuple[Journal, dict[str, Any]]:
    document = _result(service, owner, job_id)
    for row in document["variants"]:
        if row["name"] == name:
            return service.home.journal(job_id), row
    raise Refusal(404, f"job {job_id} has no variant of that name: GET …/variants lists them")


def _files(journal: Journal, row: dict[str, Any]) -> dict[str, tuple[Path, int]]:
    """Name → file and its bytes, of what exists: the compact file, and all of the export.

    Nothing outside the job's directory.
    """
    root = journal.directory.resolve()
    compact, export = journal.local(row["path"]), journal.exports_dir / row["name"]
    beside = places.sizes(compact.parent)
    found = {f"{COMPACT}/{compact.name}": (compact, beside[compact.name])} if compact.name in beside else {}
    for name, size in places.sizes(export).items():
        found[f"{EXPORT}/{name}"] = (export / name, size)
    return {name: file for name, file in found.items() if root in file[0].resolve().parents}


def _export_checksums(journal: Journal, name: str) -> dict[str, str]:
    """What was taken down when the export was written."""
    record = journal.stage("export")
    row = record.outputs["exports"].get(name) if record else None
    return {f"{EXPORT}/{file}": digest for file, digest in (row or {}).get("checksums", {}).items()}


def _checksum(path: Path, name: str, known: dict[str, str]) -> str:
    if name in known:
        return known[name]
    return _sha256(path, places.size(path), places.modified(path))


@lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, changed: float) -> str:
    """Of a file that has not changed since: its size and time are part of the question."""
    digest = hashlib.sha256()
    for piece in places.pieces(path, 0, size, HASH_BYTES):
        digest.update(piece)
    return digest.hexdigest()
