"""The command ``espalier``. Results go to stdout, all else to stderr; with ``--json``, stdout is one document."""

import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NoReturn

import typer

from compression.recipe import grid
from compression.report import draw
from launcher.jobs import Home, JobError, collect_garbage, find_job, list_jobs
from launcher.journal import Journal, StaleEpochError
from launcher.problems import SpecError
from launcher.result import result_document
from launcher.spec import load_spec
from launcher.states import JobState
from launcher.tracking.process import EXIT_DONE, default_uri, page_url
from services import tables
from services.commands import continuing, operate, render, service
from services.commands.demonstration import demo_job
from services.commands.dryrun import DryRunError, dry_run
from services.commands.lookup import ask_service, look, with_service_rows
from services.commands.outcome import first_lines, say_how_it_ended, show_result
from services.commands.terminal import (
    DEFAULT_HOME,
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    HomeOption,
    JobArgument,
    JobFileArgument,
    JsonOption,
    TrackingOption,
    UrlOption,
    home_at,
    print_json,
    stderr,
    stdout,
)
from services.foreground import Work, run_in_foreground
from services.place import ServiceError
from services.presets import preset_rows
from services.progress import display_for
from services.submission import (
    STANDARD_TEXT,
    Grid,
    compression_job,
    make_request,
    named_cluster,
    plan_elsewhere,
    submit,
)
from services.ui import choose_port, mlflow_server

DEMO = Path(__file__).parent / "commands" / "demo.yaml"

app = typer.Typer(
    name="espalier",
    help="Train large, then compress: which model is best at every size, for a fixed compute budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
service.register(app)
operate.register(app)
render.register(app)


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """What stands before a command. ``--debug`` is taken out by :func:`main`, wherever it stands."""
    if show_version:
        stdout.print(version("espalier-service"))
        raise typer.Exit


@app.command()
def demo(home: HomeOption = DEFAULT_HOME, tracking: TrackingOption = None, as_json: JsonOption = False) -> None:
    """Train, compress and compare three small models; a few minutes on two cores."""
    with demo_job(load_spec(DEMO), home_at(home).path, tracking, stderr) as (journal, work):
        _work(journal, home_at(home), work, as_json, job_file=None)


@app.command()
def run(
    job_file: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="A job file.")] = None,
    continued: Annotated[
        str | None, typer.Option("--continue", metavar="JOB", help="Continue this job instead of starting a new one.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    tracking: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a job from its file to the frontier. Ctrl-C pauses it with checkpoints; --continue takes it up again."""
    if continued is not None:
        journal = find_job(home_at(home), continued)
        if job_file is not None:
            continuing.refuse_another_job(load_spec(job_file), journal)
    elif job_file is not None:
        journal = submit(make_request(load_spec(job_file), home_at(home)), home_at(home))
    else:
        raise ValueError("name a job file, or a job with --continue")
    _work(journal, home_at(home), continuing.continued(journal, home_at(home), tracking), as_json, job_file)


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A Hugging Face directory or a checkpoint.")],
    text: Annotated[
        list[str] | None, typer.Option(help="Text to calibrate and measure on. [default: Python's standard library]")
    ] = None,
    prune: Annotated[list[str] | None, typer.Option(metavar="METHOD", help="Pruning method; several times.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Fraction of the weights to set to zero.")] = None,
    quantize: Annotated[
        list[str] | None, typer.Option(metavar="METHOD", help="Quantisation method; several times.")
    ] = None,
    bits: Annotated[list[int] | None, typer.Option(help="Bits of a quantised weight; several times.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    home: HomeOption = DEFAULT_HOME,
    tracking: TrackingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress a model that exists: every recipe, and every pair of a pruning and a quantisation. No training."""
    asked = Grid(prune or [], sparsity or [], quantize or [], bits or [], group_size)
    spec = compression_job(source, text or [STANDARD_TEXT], sequence_length, asked)
    journal = submit(make_request(spec, home_at(home)), home_at(home))
    _work(journal, home_at(home), continuing.supervised(journal, home_at(home), tracking), as_json, job_file=None)


@app.command()
def plan(
    job_file: JobFileArgument,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Also build every rank's part of every model, without memory for weights.")
    ] = False,
    on: Annotated[
        str | None, typer.Option(metavar="KIND:DEVICES", help="Plan for another cluster than this machine: h100:32.")
    ] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Say whether and how a job fits: layout, steps, memory, disk, time and cost. Nothing is started."""
    spec = load_spec(job_file)
    made = plan_elsewhere(spec, named_cluster(on)) if on else make_request(spec, home_at(home)).plan
    document = made.model_dump(mode="json")
    if dry:
        document["dry_run"] = [
            dry_run(candidate, spec.data.sequence_length, made.device_kind) for candidate in document["candidates"]
        ]
    if as_json:
        print_json(document)
    else:
        for part in (tables.plan_table(document), "", tables.memory_table(document), "", *tables.plan_lines(document)):
            stdout.print(part)
        for built in document.get("dry_run", []):
            stdout.print("", tables.dry_run_line(built), tables.dry_run_table(built), sep="\n")
    if not all(built["ok"] for built in document.get("dry_run", [])):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def frontier(
    job: JobArgument,
    png: Annotated[Path | None, typer.Option(help="Also draw it into this file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write it as a page that stands alone.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also the variants that others beat.")] = False,
    url: UrlOption = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Show a job's frontier: the variants that no other variant beats in both quality and size."""
    result = look(job, url, home).result
    variants = tables.marked_variants(result)
    if not variants:
        raise JobError(f"job {result['job']} has no measured variants yet (state: {result['state']}): let it go on")
    if png is not None:
        draw(variants, png, title=f"{result['name']}: quality against size at the same training budget")
        stderr.print(f"figure written to {png}")
    if html is not None:
        from services.web.frontier import frontier_page

        html.write_text(frontier_page(result["name"], variants).html, encoding="utf-8")
        stderr.print(f"page written to {html}")
    if as_json:
        rows = [variant.row() for variant in variants if everything or variant.on_frontier]
        print_json({"job": result["job"], "variants": rows})
    else:
        stdout.print(tables.frontier_table(variants, everything))


@app.command()
def show(job: JobArgument, url: UrlOption = None, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show one job: state, candidates, processes, results."""
    seen = look(job, url, home)
    result, processes = seen.result, seen.processes
    if as_json:
        print_json(result | {"processes": processes})
        return
    place = f", in {result['directory']}" if seen.journal else f", at {seen.url}"
    stdout.print(f"[bold]{result['job']}[/]: {result['state']}, attempt {result['attempts']}{place}")
    if seen.waiting:
        stdout.print(f"waiting: {seen.waiting}", markup=False)
    show_result(seen.journal, result)
    if processes:
        stdout.print(tables.processes_table(processes))


@app.command(name="list")
def list_command(url: UrlOption = None, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the jobs of a home, or of a service, oldest first."""
    rows = [] if url else [_job_row(journal) for journal in list_jobs(home_at(home))]
    rows = with_service_rows(rows, url, home)
    if as_json:
        print_json(rows)
    elif rows:
        stdout.print(tables.jobs_table(rows))
    else:
        stderr.print(f"no jobs under {url or home}")


@app.command()
def pause(job: JobArgument, url: UrlOption = None, home: HomeOption = DEFAULT_HOME) -> None:
    """Ask a running job to write checkpoints and pause."""
    _ask(job, url, home, "pause")


@app.command()
def cancel(job: JobArgument, url: UrlOption = None, home: HomeOption = DEFAULT_HOME) -> None:
    """Ask a running job to write checkpoints and end for good."""
    _ask(job, url, home, "cancel")


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the published models that a job file may name as model: {preset: NAME}."""
    rows = preset_rows()
    if as_json:
        print_json(rows)
    else:
        stdout.print(tables.presets_table(rows))


@app.command()
def ui(
    port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1. [default: 5000, or a free one]")] = None,
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Serve MLflow's web interface on the home's store until Ctrl-C."""
    stderr.print("starting MLflow …")
    with mlflow_server(home_at(home).path, choose_port(port)) as address:
        stdout.print(page_url(address), soft_wrap=True)
        stderr.print("Ctrl-C ends it")
        while True:
            time.sleep(3600)


@app.command()
def track(job: JobArgument, tracking: TrackingOption = None, home: HomeOption = DEFAULT_HOME) -> None:
    """Feed MLflow with what it does not have of a job yet, from the job's journal."""
    journal = find_job(home_at(home), job)
    uri = tracking or default_uri(home_at(home).path)
    command = [sys.executable, "-m", "launcher.tracking.process", journal.location, "--uri", uri, "--once"]
    ended = subprocess.run(command, check=False)
    if ended.returncode != EXIT_DONE:
        raise typer.Exit(EXIT_FAILED)
    stderr.print(f"everything of job {journal.job_id} is in {uri}")


@app.command()
def gc(
    days: Annotated[float, typer.Option("--older-than", metavar="DAYS", help="Age of failed jobs to remove.")] = 30.0,
    dry: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Free disk space: intermediate files of finished jobs, and jobs that failed or were cancelled long ago."""
    found = collect_garbage(home_at(home), older_than_days=days, dry_run=dry)
    total = sum(item.bytes for item in found)
    if as_json:
        rows = [{"job": one.job_id, "what": one.what, "path": str(one.path), "bytes": one.bytes} for one in found]
        print_json({"dry_run": dry, "bytes": total, "removed": rows})
        return
    for one in found:
        stdout.print(f"{one.job_id}: {one.what}, {tables.sized(one.bytes)}")
    stdout.print(f"{tables.sized(total)} {'would be' if dry else 'were'} freed")


def _work(journal: Journal, home: Home, work: Work, as_json: bool, job_file: Path | None) -> None:
    """Show a job in the foreground until it rests, then what it brought, and exit as it ended."""
    spec = journal.spec()
    stderr.print(f"job {journal.job_id} in {journal.directory}")
    names = [candidate.name for candidate in spec.trained]
    variants = len(spec.candidates) * len(grid(spec.compression))
    display = display_for(stderr, names, variants=variants)
    interrupted = run_in_foreground(
        Journal(journal.directory), work.supervise, work.stop_hard, display, pause=work.pause
    )
    result = result_document(journal)
    if as_json:
        print_json(result)
    else:
        show_result(journal, result)
    say_how_it_ended(result, job_file, home)
    if result["state"] != JobState.SUCCEEDED:
        raise typer.Exit(EXIT_INTERRUPTED if interrupted else EXIT_FAILED)


def _ask(job: str, url: str | None, home: Path, desired: Literal["pause", "cancel"]) -> None:
    asked = ask_service(job, url, home, desired)
    if asked is None:
        journal = find_job(home_at(home), job)
        if journal.holder() is None:
            raise JobError(
                f"nobody works on job {journal.job_id} (state: {journal.state()}): there is nothing to {desired}"
            )
        journal.set_desired(desired)
        asked = journal.job_id
    stderr.print(f"asked job {asked} to {desired}")


def _job_row(journal: Journal) -> dict[str, Any]:
    view, facts = journal.view(), journal.facts()
    return {
        "job": journal.job_id,
        "name": journal.spec().name,
        "state": view.state.value,
        "attempts": view.epoch,
        "created": time.strftime("%Y-%m-%d %H:%M", time.localtime(facts["created"])),
        "running": journal.holder() is not None,
    }


def report(error: Exception, as_json: bool) -> int:
    """Tell a user's error in a few lines, or as JSON; returns the exit code."""
    problems = error.problems if isinstance(error, SpecError) else []
    lines = [str(problem) for problem in problems] or [first_lines(str(error))]
    if as_json:
        fields = [{"field": one.field, "value": one.value, "message": one.message} for one in problems]
        print_json({"error": lines[0], "problems": fields})
    for line in lines:
        stderr.print("[red]error:[/]", end=" ")
        stderr.print(line, markup=False)
    return EXIT_BAD_INPUT if isinstance(error, ValueError) else EXIT_FAILED


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The excepthook without ``--debug``: a fault of the software, in two lines."""
    last = traceback.extract_tb(trace)[-1]
    stderr.print(f"internal error: {kind.__name__}: {error} ({Path(last.filename).name}:{last.lineno})", markup=False)
    stderr.print("this is a fault of espalier; run the command again with --debug for the whole traceback")


def main() -> NoReturn:
    """Entry point of the command: user's errors become lines and exit codes; with ``--debug``, tracebacks."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        sys.excepthook = _unexpected
    try:
        # Not app(...): typer would put an excepthook of its own in place.
        typer.main.get_command(app).main(args=arguments, prog_name="espalier")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError, StaleEpochError, DryRunError, ServiceError) as error:
        if debug:
            raise
        sys.exit(report(error, "--json" in arguments))
    sys.exit(0)


if __name__ == "__main__":
    main()
