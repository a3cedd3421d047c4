"""``espalier render``: what a back-end would be given for a job, to be read before it is submitted."""

from pathlib import Path

import typer

from launcher.backends import kubernetes as k8s
from launcher.backends.kubernetes_manifest import job_name, to_yaml
from launcher.backends.slurm import render_job, slurm_job
from launcher.profiles import KubernetesProfile, profile_named
from launcher.spec import load_spec
from services.commands.terminal import DEFAULT_HOME, HomeOption, JobFileArgument, home_at

render = typer.Typer(help="Show what a back-end would be given for a job.", no_args_is_help=True)


@render.command(name="slurm")
def slurm(job_file: JobFileArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Print the batch script of a job, with JOB where its id will be. Nothing is submitted."""
    spec, root = load_spec(job_file), home_at(home)
    job_id = f"{spec.name}-JOB"
    typer.echo(render_job(spec, root.root, slurm_job(spec, root.journal(job_id), job_id, Path.cwd())), nl=False)


@render.command(name="kubernetes")
def kubernetes(job_file: JobFileArgument, home: HomeOption = DEFAULT_HOME) -> None:
    """Print the RayJob of a job, with JOB where its id will be, and IMAGE without a profile. Nothing is submitted."""
    spec, root = load_spec(job_file), home_at(home)
    job_id = f"{spec.name}-JOB"
    journal = root.journal(job_id)
    profile = profile_named(root.root, spec.execution.profile).kubernetes or KubernetesProfile(image="IMAGE")
    name = job_name(job_id, journal.location, epoch=1)
    job = k8s.kubernetes_job(spec, journal, job_id, name, Path.cwd())
    typer.echo(to_yaml(k8s.render_job(spec, profile, job)), nl=False)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(render, name="render")
