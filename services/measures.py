"""Metrics against the step, out of a job's events. Pure and torch-free."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from launcher.events import Event

Points = dict[int, tuple[float, float]]
"""Step → value and time."""

NOT_METRICS = frozenset({"step", "time", "candidate", "number", "epoch"})


def metric_names(events: Iterable[Event]) -> list[str]:
    """Names of all metrics that the events hold."""
    return sorted({name for _, _, _, values in _readings(events) for name in values})


def metric_points(events: Iterable[Event], name: str) -> dict[str, Points]:
    """Candidate → points; where a step was done again after a restart, its newer value counts."""
    found: dict[str, Points] = {}
    for candidate, step, time, values in _readings(events):
        if name in values:
            found.setdefault(candidate, {})[step] = (values[name], time)
    return found


def thin(points: Points, most: int) -> list[tuple[int, float, float]]:
    """``(step, value, time)`` in the order of the steps; of more than ``most``, evenly chosen ones with both ends."""
    rows = [(step, *points[step]) for step in sorted(points)]
    if len(rows) <= most:
        return rows
    last = len(rows) - 1
    return [rows[round(index * last / (most - 1))] for index in range(most)]


def _readings(events: Iterable[Event]) -> Iterator[tuple[str, int, float, dict[str, float]]]:
    """Candidate, step, time and values of everything that was measured."""
    for event in events:
        candidate = event.get("candidate")
        if candidate is None:
            continue
        if event["kind"] == "train.step":
            for row in event["steps"]:
                yield candidate, int(row["step"]), float(row.get("time", event["time"])), _numbers(row)
        elif event["kind"] == "train.evaluation":
            yield candidate, int(event["step"]), event["time"], _numbers({"validation_loss": event["validation_loss"]})


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the fields; one that is not finite stands in the journal as text."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name in NOT_METRICS or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            found[name] = float(value)
        elif value in ("nan", "inf", "-inf"):
            found[name] = math.nan
    return found
