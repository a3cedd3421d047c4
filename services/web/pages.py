"""The status page: jobs with their progress, one job with its charts and its frontier. Documents in, pages out."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from compression.results import Variant
from launcher.states import FINAL, JobState
from services.measures import Points
from services.progress import clock
from services.tables import counted
from services.web.charts import chart
from services.web.frontier import plot_data
from services.web.render import Page, render

SHOWN_METRICS = ("loss", "validation_loss", "tokens_per_second", "learning_rate")

Document = Mapping[str, Any]


def jobs_page(
    jobs: Sequence[Document], counts: Mapping[str, int], next_cursor: str | None, mlflow: str | None, owners: bool
) -> Page:
    """``owners``: whoever looks sees more than their own."""
    total = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()) if count) or "no jobs"
    rows = [_row(job) for job in jobs]
    return render("jobs.html", ("live.js",), jobs=rows, counts=total, next=next_cursor, mlflow=mlflow, owners=owners)


def job_page(job: Document, metrics: Mapping[str, Mapping[str, Points]], variants: Sequence[Variant]) -> Page:
    """``metrics``: name → candidate → points."""
    charts = [chart(name, metrics[name]) for name in SHOWN_METRICS if name in metrics]
    shown = {
        **_row(job),
        "attempt": job["attempt"],
        "left": None if job["seconds_left"] is None else clock(job["seconds_left"]),
        "error": job["error"],
        "live": JobState(job["state"]) not in FINAL,
        "candidates": [_candidate(one) for one in job["candidates"]],
    }
    scripts = ("plot.js", "live.js")
    return render("job.html", scripts, job=shown, charts=[one for one in charts if one], plot=plot_data(variants))


def _row(job: Document) -> dict[str, Any]:
    same = {name: job[name] for name in ("id", "owner", "state", "stage", "waiting")}
    variants = job["variants"]
    return {
        **same,
        "percent": round(100 * job["progress"]),
        "measured": f"{variants['measured']} of {variants['expected']}" if variants else "",
        "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(job["created"])),
    }


def _candidate(one: Document) -> dict[str, Any]:
    budget = one["budget"]
    return {
        **{name: one[name] for name in ("name", "status", "restarts", "step")},
        "percent": round(100 * one["fraction"]),
        "spent": counted(budget["spent"]),
        "left": counted(budget["left"]),
        "unit": budget["unit"].replace("_", " "),
        "loss": _number(one["loss"], ".3f"),
        "validation": _number(one["validation_loss"], ".3f"),
        "speed": _number(one["tokens_per_second"], ",.0f"),
    }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
