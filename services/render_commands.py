"""``espalier render``: what a back-end would be given for a job, to be read before it is submitted."""

from pathlib import Path

import typer

from launcher.backends.slurm import render_job, slurm_job
from launcher.spec import load_spec
from services.terminal import DEFAULT_HOME, HomeOption, JobFileArgument, home_at

render = typer.Typer(help="Show what a back-end would be given for a job.", no_args_is_help=True)


@render.callback()
def _choose() -> None:
    """Keeps the back-end's name part of the command while there is one."""


@render.command(name="slurm")
def slurm(job_file: JobFileArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Print the batch script of a job, with JOB where its id will be. Nothing is submitted."""
    spec, root = load_spec(job_file), home_at(home)
    job_id = f"{spec.name}-JOB"
    typer.echo(render_job(spec, root.root, slurm_job(spec, root.journal(job_id), job_id, Path.cwd())), nl=False)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(render, name="render")
