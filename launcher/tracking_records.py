"""What the events of a job mean in MLflow: runs, parameters, metrics, tags, statuses. Pure functions; torch-free.

A job is a parent run, each candidate a child of it, each variant a child of its candidate. A run is named by its key:
``""`` for the job, ``"large"`` for a candidate, ``"large/magnitude-s50"`` for a variant.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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

    ``last_steps`` (series → last step written) is the memory that makes steps strictly increase: a trainer that resumes
    from a checkpoint repeats the steps after it, with the same values, and those are left out.
    """

    def __init__(self, last_steps: Mapping[str, int]) -> None:
        self.last_steps = dict(last_steps)
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

    def _state(self, event: Mapping[str, Any]) -> None:
        state = str(event["state"])
        changes = self.of(JOB, event)
        changes.tags["espalier.state"] = state
        changes.set_status(RUN_STATUS.get(state, "RUNNING"), _milliseconds(event["time"]))

    def _attempt(self, event: Mapping[str, Any]) -> None:
        changes = self.of(JOB, event)
        changes.tags["espalier.attempts"] = str(event["epoch"])
        changes.metrics.append(_point("attempts", event["epoch"], event["number"], event))

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
                hours = event[name] / 3600.0
                changes.metrics.append(_point(f"burnt_{name.partition('_')[0]}_hours", hours, event["number"], event))
        system = event.get("system") or {}
        for node, numbers in ({event["node"]: system} if event.get("node") else system).items():
            for name, value in flatten(numbers, numbers=True).items():
                changes.metrics.append(_point(f"system/{node}/{name}", value, event["number"], event))

    def _restart(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event.get("candidate") or JOB, event)
        changes.tags["espalier.last_restart"] = str(event.get("reason", ""))
        lost = event.get("lost_device_seconds")
        if lost is not None:
            changes.metrics.append(_point("lost_device_hours", lost / 3600.0, event["number"], event))

    def _variant(self, event: Mapping[str, Any]) -> None:
        changes = self.of(event["name"], event)
        changes.params |= flatten({"recipe": event.get("recipe") or {}})
        changes.params["variant"] = str(event["name"])
        for name, value in variant_numbers(event).items():
            changes.metrics.append(_point(name, value, event["number"], event))
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


def closing_changes(row: Mapping[str, Any], number: int, milliseconds: int) -> Changes:
    """What a variant's run says at the end, from its row in the result document: frontier or not, export's size."""
    changes = Changes(milliseconds, tags={"espalier.on_frontier": str(bool(row["on_frontier"])).lower()})
    if row.get("path"):
        changes.tags["espalier.path"] = str(row["path"])
    if row.get("export_bytes") is not None:
        changes.metrics.append(Point("export_bytes", float(row["export_bytes"]), number, milliseconds))
    return changes


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


def summary(name: str, state: str, result: Mapping[str, Any]) -> str:
    """Markdown for the description of the job's run, from the result document (contract 11)."""
    lines = [f"## {name}: {state}", ""]
    if result.get("error"):
        lines += [f"**{result['error']}**", ""]
    candidates = result.get("candidates") or []
    if candidates:
        lines += ["| candidate | parameters | layout | steps | tokens | validation loss |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row['name']} | {_text(row.get('parameters'))} | {row.get('layout')} | {_text(row.get('steps'))} "
            f"| {_text(row.get('tokens'))} | {_text(row.get('validation_loss'))} |"
            for row in candidates
        ]
        lines.append("")
    frontier = sorted(
        (row for row in result.get("variants") or [] if row.get("on_frontier")), key=lambda row: row["bytes"]
    )
    if frontier:
        metric = frontier[0]["quality"]["metric"]
        lines += ["### Frontier", "", f"| variant | bytes | {metric} |", "|---|---|---|"]
        lines += [f"| {row['name']} | {_text(row['bytes'])} | {_text(row['quality']['value'])} |" for row in frontier]
        lines.append("")
    return "\n".join(lines)


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


def _text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value if value is not None else "–")
