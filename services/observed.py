"""What people want to know of a job at a glance, from its journal's picture. Pure, JSON-able, torch-free."""

from collections.abc import Mapping
from typing import Any

from compression.recipe import grid
from launcher.spec import JobSpec
from launcher.states import JobState
from launcher.view import CandidateView, JobView
from parallelism.budget import Budget, Burnt, Ledger, Progress
from services.progress import Pace, candidate_row

TRAINING_SHARE = 0.7
"""Part of a job's progress that training counts for, where there is any; the rest is its variants."""


def summarize(view: JobView, spec: JobSpec, pace: Pace, now: float) -> dict[str, Any]:
    """Stage, candidates with their budgets, variants, time left. ``now``: seconds of the clock that ``pace`` is fed."""
    rows = [
        _candidate(spec, view.candidates.get(one.name) or CandidateView(one.name), pace, now) for one in spec.trained
    ]
    left = [row["seconds_left"] for row in rows if row["status"] == "training"]
    expected = len(spec.candidates) * len(grid(spec.compression))
    return {
        "stage": view.active_stage,
        # Candidates train one after the other or side by side: no more than the sum, which is said.
        "seconds_left": sum(left) if left and None not in left else None,
        "candidates": rows,
        "variants": {"measured": len(view.variants), "expected": expected},
        "restarts": sum(row["restarts"] for row in rows),
    }


def progress(view: JobView, summary: Mapping[str, Any]) -> float:
    """Share of the whole job that is done, 0 to 1."""
    if view.state is JobState.SUCCEEDED:
        return 1.0
    rows, variants = summary["candidates"], summary["variants"]
    measured = min(1.0, variants["measured"] / max(1, variants["expected"]))
    if not rows:
        return 0.99 * measured
    trained = sum(row["fraction"] for row in rows) / len(rows)
    return round(min(0.99, TRAINING_SHARE * trained + (1 - TRAINING_SHARE) * measured), 4)


def device_seconds(view: JobView) -> float:
    """Burnt by training, lost work included."""
    return sum(candidate.device_seconds for candidate in view.candidates.values())


def _candidate(spec: JobSpec, view: CandidateView, pace: Pace, now: float) -> dict[str, Any]:
    row = candidate_row(view, pace, now)
    return {
        "name": row.name,
        "status": row.status,
        "fraction": round(row.fraction, 4),
        "step": row.step,
        "loss": _finite(row.loss),
        "validation_loss": _finite(row.validation_loss),
        "tokens_per_second": _finite(row.tokens_per_second),
        "seconds_left": row.seconds_left,
        "restarts": row.restarts,
        "error": view.failure,
        "budget": _budget(spec.training_budget, view, spec.execution.price_per_device_hour),
    }


def _budget(budget: Budget, view: CandidateView, price: float) -> dict[str, Any]:
    """Spent and left of one candidate's budget, in its unit."""
    known = {**view.latest, **((view.result or {}).get("progress") or {})}
    done = Progress(int(known.get("step", 0)), 0, int(known.get("tokens", 0)), float(known.get("flops", 0.0)))
    spent = Ledger(budget, price, done, Burnt(view.device_seconds, view.wall_seconds)).spent()
    return {
        "unit": budget.unit,
        "limit": budget.limit,
        "spent": spent,
        "left": max(0.0, budget.limit - spent),
        "device_seconds": view.device_seconds,
        "lost_device_seconds": view.lost_device_seconds,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no word for a diverged loss."""
    return value if value is not None and abs(value) != float("inf") and value == value else None
