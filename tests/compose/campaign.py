"""Containers killed in the middle of a job's training, again and again."""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.compose.project import Project

FURTHER_STEPS = 12
"""That a job has to come on between two kills; more than lie between two checkpoints, so that a new one is there."""
WHOLE_SECONDS = 240.0
TRAINING_SECONDS = 300.0
FIGURES = "ESPALIER_KILLS_JSON"
"""Names a file for the figures: benchmarks/results/compose_kills.json."""


@dataclass(frozen=True)
class Kill:
    """One blow. ``step``: the last that the service told of; ``seconds``: until everything was well again."""

    containers: tuple[str, ...]
    step: int
    seconds: float


def kill_each(project: Project, job_id: str, blows: Iterable[tuple[str, ...]]) -> Iterator[Kill]:
    """Kill these containers one after the other, or several at once, while the job's only candidate trains."""
    step = 0
    for containers in blows:
        step = _come_to(project, job_id, step + FURTHER_STEPS)
        began = time.monotonic()
        processes = {name: project.kill(name) for name in containers}
        project.until(lambda killed=processes: project.is_whole(without=killed), WHOLE_SECONDS)
        yield Kill(containers, step, round(time.monotonic() - began, 1))


def _come_to(project: Project, job_id: str, step: int) -> int:
    """Wait until the candidate trains and has done so many steps; how many it has done."""
    client = project.client()
    deadline = time.monotonic() + TRAINING_SECONDS
    while True:
        job = client.job(job_id)
        for candidate in job.candidates:
            if candidate.status == "training" and candidate.step >= step:
                return candidate.step
            assert candidate.status != "trained", f"too late for step {step}: {job}"
        assert job.active, f"{job}\n{project.logs()}"
        assert time.monotonic() < deadline, f"step {step} did not come: {job}\n{project.logs()}"
        time.sleep(0.2)


def write_figures(
    path: Path, kills: Iterable[Kill], restarts: int, found: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """What was killed at which step, and whether the job brought what an undisturbed one brought."""
    document = {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "kills": [vars(kill) for kill in kills],
        "restarts_of_trainers": restarts,
        "compared": {name: found.get(name) == value for name, value in expected.items()},
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
