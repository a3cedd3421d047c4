"""What all commands share: the two streams, common options, exit codes."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

from launcher.jobs import Home
from parallelism.objects import PATIENCE_SECONDS
from services.settings import load_settings

DEFAULT_HOME = Path("~/.local/share/espalier")

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

WIDTH_WITHOUT_TERMINAL = 160


def _console(stream: TextIO) -> Console:
    """Lines are never broken; tables are as wide as the terminal, and wide where there is none."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH_WITHOUT_TERMINAL
    return Console(file=stream, soft_wrap=True, highlight=False, width=width)


stdout = _console(sys.stdout)
stderr = _console(sys.stderr)

HomeOption = Annotated[
    Path, typer.Option("--home", metavar="DIR", envvar="ESPALIER_HOME", help="Where all jobs and results live.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for machines.")]
JobArgument = Annotated[str, typer.Argument(help="A job's id, the beginning of one, or 'last'.")]
JobFileArgument = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="A job file.")]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--mlflow", metavar="URI", help="An MLflow server or store, or 'none'. [default: the home's own store]"
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="ESPALIER_URL",
        help="A service; its key stands in ESPALIER_API_KEY. [default: the one that is up on the home]",
    ),
]


def api_key() -> str | None:
    """Not an option: whatever stands in a command line, others on the machine can read."""
    return os.environ.get("ESPALIER_API_KEY")


def home_at(path: Path) -> Home:
    """The home behind the option. Raises ``SpecError`` for an operator's file that cannot be used."""
    return load_settings(path).jobs_home(PATIENCE_SECONDS)


def print_json(document: Any) -> None:
    """One document on stdout."""
    sys.stdout.write(json.dumps(document, indent=1, default=str, allow_nan=False) + "\n")
