"""Commands of those who use a service: submit, watch, logs, resume, download."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.spec import load_spec
from launcher.states import JobState
from parallelism.layout import Layout
from services.commands import remote
from services.commands.terminal import (
    DEFAULT_HOME,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    HomeOption,
    JobArgument,
    JobFileArgument,
    JsonOption,
    UrlOption,
    api_key,
    print_json,
    stderr,
    stdout,
)
from services.progress import display_for


def submit(
    job_file: JobFileArgument,
    priority: Annotated[int, typer.Option(min=-10, max=10, help="Higher ones start first.")] = 0,
    key: Annotated[str | None, typer.Option("--idempotency-key", help="The same key never makes a second job.")] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Watch it until it rests.")] = False,
    url: UrlOption = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Hand a job in to a service. Relative paths of the job file start here."""
    spec = remote.absolute_paths(load_spec(job_file))
    with remote.service(url, api_key(), home) as client:
        job = client.submit(spec, idempotency_key=key, priority=priority)
    if as_json and not follow:
        print_json(job.model_dump(mode="json"))
        return
    stderr.print(f"job {job.id} is {job.state}; MLflow: {job.links.mlflow}")
    if follow:
        watch(job.id, url, home, as_json)
    else:
        stdout.print(job.id)


def watch(
    job: JobArgument, url: UrlOption = None, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False
) -> None:
    """Show a job while it runs, until it rests. Ctrl-C ends the watching, not the job."""
    with remote.service(url, api_key(), home) as client:
        found = client.job(remote.find(client, job).id)
        names, variants = remote.expected_variants(found)
        try:
            state = remote.watch(client, found, display_for(stderr, names, variants))
        except KeyboardInterrupt:
            stderr.print(f"job {found.id} goes on; look again with: espalier watch {found.id}")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        if as_json:
            print_json(client.result(found.id))
    stderr.print(f"job {found.id} is {state}")
    if state is not JobState.SUCCEEDED:
        raise typer.Exit(EXIT_FAILED)


def logs(
    job: JobArgument,
    name: Annotated[
        str | None, typer.Argument(help="A log's name. [default: the coordinator's; --list: which]")
    ] = None,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, max=10_000, help="Lines of its end.")] = 50,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job is over.")] = False,
    which: Annotated[bool, typer.Option("--list", help="Only say which logs there are.")] = False,
    url: UrlOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Show the output of a job's process: the coordinator, or one rank."""
    with remote.service(url, api_key(), home) as client:
        job_id = remote.find(client, job).id
        if which:
            for log in client.logs(job_id):
                stdout.print(f"{log.name}  {log.bytes:,} bytes", markup=False)
            return
        chosen = name or "coordinator"
        if follow:
            remote.print_log(client.follow_log(job_id, chosen, lines))
        else:
            remote.print_log(iter([client.log(job_id, chosen, lines)]))


def resume(
    job: JobArgument,
    layouts: Annotated[
        list[str] | None,
        typer.Option("--layout", metavar="CANDIDATE=T,P,D", help="Go on at another layout, such as large=2,1,1."),
    ] = None,
    url: UrlOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Let a paused, interrupted or failed job of a service go on from its last checkpoints."""
    wanted = dict(_layout(text) for text in layouts or [])
    with remote.service(url, api_key(), home) as client:
        asked = client.resume(remote.find(client, job).id, wanted)
    stderr.print(f"job {asked.id} goes on when its turn comes")


def download(
    job: JobArgument,
    variant: Annotated[str, typer.Argument(metavar="CANDIDATE/RECIPE", help="As espalier frontier names it.")],
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the files go.")] = Path(),
    url: UrlOption = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Fetch a variant's files; half-fetched ones go on where they stopped, and every one is checked."""
    with remote.service(url, api_key(), home) as client:
        job_id = remote.find(client, job).id
        for path in client.download(job_id, variant, target / job_id / variant):
            stdout.print(str(path), markup=False)


def _layout(text: str) -> tuple[str, dict[str, object]]:
    """``large=2,1,1`` → candidate and layout. Raises ``ValueError``."""
    name, _, numbers = text.partition("=")
    parts = numbers.split(",")
    if not name or not 1 <= len(parts) <= 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--layout {text!r}: write CANDIDATE=TENSOR,PIPELINE,DATA, such as large=2,1,1")
    sizes = dict(zip(("tensor", "pipeline", "data"), map(int, parts), strict=False))
    return name, Layout.model_validate(sizes).model_dump(mode="json")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (submit, watch, logs, resume, download):
        app.command()(command)
