"""What the command line says of a job at the end: what it brought, how it ended, how to go on."""

from pathlib import Path
from typing import Any

from launcher.jobs import Home
from launcher.journal import Journal
from launcher.states import FINAL, JobState
from services import tables
from services.commands.terminal import DEFAULT_HOME, home_at, stderr, stdout


def show_result(journal: Journal | None, result: dict[str, Any]) -> None:
    """Candidates, frontier, and where things lie; ``journal`` None: elsewhere."""
    stdout.print(tables.candidates_table(result))
    variants = tables.marked_variants(result)
    if variants:
        stdout.print("", tables.frontier_table(variants), "", sep="\n")
    if journal is None:
        return
    for label, path in (("figure", journal.report_dir / "frontier.png"), ("exports", journal.exports_dir)):
        if path.exists():
            stdout.print(f"{label}: {path}")
    if result["mlflow_url"]:
        place = journal.document("tracking/mlflow") or {}
        served = str(place.get("uri", "")).startswith("http")
        stdout.print(f"MLflow: {result['mlflow_url']}{'' if served else '  (served by: espalier ui)'}")


def say_how_it_ended(result: dict[str, Any], job_file: Path | None, home: Home) -> None:
    """The last lines: what went wrong, and how to go on."""
    state = JobState(result["state"])
    if result["error"]:
        stderr.print(f"[red]job {result['job']} {state}:[/] {first_lines(result['error'])}")
    if state not in FINAL:
        words = ["espalier", "run", *([str(job_file)] if job_file else []), "--continue", result["job"]]
        if home != home_at(DEFAULT_HOME):
            words += ["--home", str(home.path)]
        stderr.print(f"the job is {state}; continue it with: {' '.join(words)}")


def first_lines(text: str, count: int = 2) -> str:
    """The beginning of a long message."""
    return "\n".join(text.strip().splitlines()[:count])
