"""The one machine-readable document that says what a job brought (contract 11). Torch-free."""

from typing import Any

from launcher.journal import Journal
from launcher.spec import CandidateSpec
from launcher.view import CandidateView, JobView
from parallelism import places

VERSION = 1


def result_document(journal: Journal) -> dict[str, Any]:
    """State, candidates and variants of a job, as far as they are known; a job in progress has gaps (``None``)."""
    view = journal.view()
    spec = journal.spec()
    document = journal.document("plan") or {}
    plan = {row["name"]: row for part in ("candidates", "sources") for row in document.get(part, [])}
    evaluation = journal.stage("report")
    rows = evaluation.outputs["variants"] if evaluation else [_variant(event) for event in view.variants.values()]
    return {
        "version": VERSION,
        "job": journal.job_id,
        "name": spec.name,
        "state": view.state.value,
        "error": view.error,
        "attempts": view.epoch,
        "mlflow_url": (journal.document("tracking/mlflow") or {}).get("url"),
        "candidates": [
            _candidate(candidate, view.candidates.get(candidate.name), plan.get(candidate.name, {}))
            for candidate in spec.candidates
        ],
        "variants": [_shown(row) for row in rows],
        "stages": _stage_seconds(view),
        "directory": places.url(journal.directory),
    }


def _candidate(spec: CandidateSpec, view: CandidateView | None, planned: dict[str, Any]) -> dict[str, Any]:
    view = view or CandidateView(spec.name)
    result = view.result or {}
    progress = result.get("progress") or view.latest
    return {
        "name": spec.name,
        "source": spec.source,
        "parameters": view.start.get("parameters", planned.get("parameters")),
        "layout": planned.get("layout") or (spec.layout.model_dump(mode="json") if spec.layout else None),
        "steps": progress.get("step", 0),
        "tokens": progress.get("tokens", 0),
        "flops": progress.get("flops", 0.0),
        "device_seconds": view.device_seconds,
        "lost_device_seconds": view.lost_device_seconds,
        "restarts": len(view.restarts),
        "train_loss": result.get("train_loss", view.latest.get("loss")),
        "validation_loss": result.get("validation_loss", view.validation_loss),
        "peak_memory_bytes": result.get("peak_memory_bytes"),
        "checkpoint": places.url(result["checkpoint"]) if result.get("checkpoint") else None,
        "error": view.failure,
    }


def _variant(event: dict[str, Any]) -> dict[str, Any]:
    """A variant that has been measured, but not yet been held against the others."""
    row = {name: value for name, value in event.items() if name not in ("number", "time", "epoch", "kind")}
    return {"on_frontier": None, "export_bytes": None, **row}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "path": places.url(row["path"])} if "path" in row else row


def _stage_seconds(view: JobView) -> dict[str, float]:
    """Seconds by stage; tasks of one stage (``compress/small/003``) are added up."""
    seconds: dict[str, float] = {}
    for name, event in view.stages.items():
        stage = name.partition("/")[0]
        seconds[stage] = seconds.get(stage, 0.0) + event["seconds"]
    return seconds
