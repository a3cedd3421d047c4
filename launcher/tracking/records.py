"""What the events of a job mean in MLflow: runs, parameters, metrics, tags, statuses. Pure functions; torch-free.

A job is a parent run, each candidate a child of it, each variant a child of its candidate. A run is named by its key:
``""`` for the job, ``"large"`` for a candidate, ``"large/magnitude-s50"`` for a variant.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compression.harness import PREFIX

JOB = ""
"""Key of the job's own run."""

TRAINING_SERIES = ("learning_rate", "gradient_norm", "tokens_per_second", "mfu", "tokens", "flops")
"""Fields of a training step that keep their name; ``tokens``, ``flops`` and ``device_hours`` also serve as x-axes."""

RUN_STATUS = {
    "submitted": "SCHEDULED",
    "paused": "SCHEDULED",
    "interrupted": "SCHEDULED",
    "succeeded": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}
"""Job state → MLflow run status; every other state is RUNNING."""

TERMINAL = frozenset({"FINISHED", "FAILED", "KILLED"})


@dataclass(frozen=True)
class Point:
    """One value of a metric; ``milliseconds`` since 1970 come from the event, so feeding it again changes nothing."""

    key: str
    value: float
    step: int
    milliseconds: int


@dataclass
class Changes:
    """What is to be written to one run, in the order parameters, metrics, tags, status."""

    milliseconds: int
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: str | None = None
    status_milliseconds: int = 0

    def set_status(self, status: str, milliseconds: int) -> None:
        """The last status set is the one written."""
        self.status = status
        self.status_milliseconds = milliseconds


class Translation:
    """Folds events, in order, into changes per run.

    ``last_steps`` (series → last step written) is the memory that makes steps increase: a trainer that resumes from a
    checkpoint repeats the steps after it, with the same values, and those are left out. What a candidate has burnt is
    drawn against its training step too, where a restart shows as a rise; what nodes report, against the seconds since
    the job ``began`` (a time in seconds since 1970).
    """

    def __init__(self, last_steps: Mapping[str, int], began: float) -> None:
        self.last_steps = dict(last_steps)
        self.began = began
        self.changes: dict[str, Changes] = {}

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the journal; kinds that mean nothing to MLflow are passed over."""
        handler = _HANDLERS.get(event["kind"])
        if handler:
            handler(self, event)

    def of(self, run: str, event: Mapping[str, Any]) -> Changes:
        """The changes of a run, which ``event`` touches. Parents come before their children."""
        if run:
            self.of(run.rpartition("/")[0], event)
        return self.changes.setdefault(run, Changes(_milliseconds(event["time"])))

    def is_new(self, series: str, step: int) -> bool:
        """Whether the step lies beyond the last one of the series, which it then becomes."""
        if step <= self.last_steps.get(series, -1):
            return False
        self.last_steps[series] = step
        return True

    def highest(self, series: str, step: int) -> int:
        """The step, or the highest that the series has had."""
        self.last_steps[series] = max(step, self.last_steps.get(series, 0))
        return self.last_steps[series]

    def _state(self, event: Mapping[str, Any]) -> None:
        state = str(event["state"])
        changes = self.of(JOB, event)
        changes.tags["espalier.state"] = state
        changes.set_status(RUN_STATUS.get(state, "RUNNING"), _milliseconds(event["time"]))

    def _attempt(self, event: Mapping[str, Any]) -> None:
        changes = self.of(JOB, event)
        changes.tags["espalier.attempts"] = str(event["epoch"])
        changes.metrics.append(_point("attempts", event["epoch"], event["epoch"], event))

    def _start(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event["candidate"], event)
        changes.set_status("RUNNING", _milliseconds(event["time"]))
        facts = {name: event[name] for name in ("parameters", "flops_per_token", "world_size") if name in event}
        changes.params |= flatten(facts)

    def _steps(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event["candidate"], event)
        for row in event["steps"]:
            if self.is_new(f"{event['candidate']}:train", row["step"]):
                milliseconds = _milliseconds(row["time"])
                changes.metrics += [
                    Point(key, value, row["step"], milliseconds) for key, value in _training_values(row).items()
                ]

    def _evaluation(self, event: Mapping[str, Any]) -> None:
        if self.is_new(f"{event['candidate']}:evaluation", event["step"]):
            loss = float(event["validation_loss"])
            metrics = self.of(event["candidate"], event).metrics
            metrics.append(_point("validation_loss", loss, event["step"], event))
            metrics.append(_point("validation_perplexity", perplexity(loss), event["step"], event))

    def _checkpoint(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event["candidate"], event)
        changes.tags["espalier.checkpoint"] = str(event["path"])
        if self.is_new(f"{event['candidate']}:checkpoint", event["step"]):
            for name in ("stall_seconds", "write_seconds"):
                if event.get(name) is not None:
                    changes.metrics.append(_point(f"checkpoint_{name}", event[name], event["step"], event))

    def _finished(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event["candidate"], event)
        reason = str(event["reason"])
        changes.tags["espalier.finish_reason"] = reason
        status = {"budget": "FINISHED", "cancel": "KILLED"}.get(reason, "SCHEDULED")
        changes.set_status(status, _milliseconds(event["time"]))

    def _heartbeat(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event.get("candidate") or JOB, event)
        for name in ("device_seconds", "wall_seconds"):
            if event.get(name) is not None:
                key, step = f"burnt_{name.partition('_')[0]}_hours", self._burnt_at(event, "step")
                changes.metrics.append(_point(key, event[name] / 3600.0, step, event))
        system = event.get("system") or {}
        for node, numbers in ({event["node"]: system} if event.get("node") else system).items():
            for name, value in flatten(numbers, numbers=True).items():
                changes.metrics.append(_point(f"system/{node}/{name}", value, round(event["time"] - self.began), event))

    def _burnt_at(self, event: Mapping[str, Any], field: str) -> int:
        """The training step against which something burnt is drawn."""
        return self.highest(f"{event.get('candidate') or JOB}:burnt", int(event.get(field) or 0))

    def _restart(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event.get("candidate") or JOB, event)
        changes.tags["espalier.last_restart"] = str(event.get("reason", ""))
        lost = event.get("lost_device_seconds")
        if lost is not None:
            step = self._burnt_at(event, "from_step")
            changes.metrics.append(_point("lost_device_hours", lost / 3600.0, step, event))

    def _variant(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event["name"], event)
        changes.params |= flatten({"recipe": event.get("recipe") or {}})
        changes.params["variant"] = str(event["name"])
        for name, value in variant_numbers(event).items():
            changes.metrics.append(_point(name, value, 0, event))
        changes.set_status("FINISHED", _milliseconds(event["time"]))


_HANDLERS: dict[str, Callable[[Translation, Mapping[str, Any]], None]] = {
    "submitted": lambda self, event: self._state({"state": "submitted", **event}),
    "state": Translation._state,
    "attempt_started": Translation._attempt,
    "train.start": Translation._start,
    "train.step": Translation._steps,
    "train.evaluation": Translation._evaluation,
    "train.checkpoint": Translation._checkpoint,
    "train.finished": Translation._finished,
    "heartbeat": Translation._heartbeat,
    "restart": Translation._restart,
    "variant": Translation._variant,
}


def variant_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Every measured number of a variant."""
    names = ("bytes", "bits_per_parameter", "sparsity")
    numbers = {name: float(row[name]) for name in names if row.get(name) is not None}
    return numbers | flatten(row.get("metrics") or {}, numbers=True)


def closing_variant(row: Mapping[str, Any], milliseconds: int) -> Changes:
    """What a variant's run says at the end, from its row in the result document: frontier or not, export's size."""
    changes = Changes(milliseconds, tags={"espalier.on_frontier": str(bool(row["on_frontier"])).lower()})
    if row.get("path"):
        changes.tags["espalier.path"] = str(row["path"])
    if row.get("export_bytes") is not None:
        changes.metrics.append(Point("export_bytes", float(row["export_bytes"]), 0, milliseconds))
    scores = {name: value for name, value in (row.get("metrics") or {}).items() if name.startswith(f"{PREFIX}/")}
    changes.metrics += [Point(name, float(value), 0, milliseconds) for name, value in scores.items()]
    return changes


def closing_candidate(row: Mapping[str, Any], milliseconds: int) -> Changes:
    """What a candidate's run says at the end: all that it has burnt, of which the last heartbeat saw only a part."""
    changes = Changes(milliseconds)
    if row.get("device_seconds"):
        hours = row["device_seconds"] / 3600.0
        changes.metrics.append(Point("burnt_device_hours", hours, row["steps"], milliseconds))
    return changes


def closing_job(result: Mapping[str, Any], milliseconds: int) -> Changes:
    """What the job's run says at the end, so that jobs can be compared in a list: what came out, and what it took."""
    chosen = sorted((row for row in result["variants"] if row.get("on_frontier")), key=lambda row: row["bytes"])
    numbers = {
        "variants": len(result["variants"]),
        "frontier_variants": len(chosen),
        "burnt_device_hours": sum(row["device_seconds"] for row in result["candidates"]) / 3600.0,
    }
    if chosen:
        quality = chosen[-1]["quality"]  # along the frontier quality grows with size
        numbers |= {"smallest_bytes": chosen[0]["bytes"], f"best_{quality['metric']}": quality["value"]}
    points = [Point(key, float(value), 0, milliseconds) for key, value in numbers.items()]
    return Changes(milliseconds, metrics=points)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is no longer a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def flatten(tree: Any, prefix: str = "", numbers: bool = False) -> dict[str, Any]:
    """Nested mappings and lists as dotted names; values as text or, with ``numbers``, only the numbers, as floats."""
    if isinstance(tree, Mapping):
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, list):
        items = [(str(index), value) for index, value in enumerate(tree)]
    elif numbers:
        is_number = isinstance(tree, int | float) and not isinstance(tree, bool)
        return {prefix: float(tree)} if is_number else {}
    else:
        return {} if tree is None else {prefix: str(tree)}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name, numbers)
    return flat


def _training_values(row: Mapping[str, Any]) -> dict[str, float]:
    values = {name: float(row[name]) for name in TRAINING_SERIES if row.get(name) is not None}
    for source, name, unit in (
        ("loss", "train_loss", 1),
        ("fraction", "budget_fraction", 1),
        ("device_seconds", "device_hours", 3600),
    ):
        if row.get(source) is not None:
            values[name] = float(row[source]) / unit
    return values


def _point(key: str, value: float, step: int, event: Mapping[str, Any]) -> Point:
    return Point(key, float(value), int(step), _milliseconds(event["time"]))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
