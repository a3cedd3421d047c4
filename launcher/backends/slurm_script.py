"""The batch script of a job, a pure function of what it asks for and what the profile adds. Torch-free."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher.backends.slurm_options import SlurmOptions
from launcher.policy import EXIT_DONE, EXIT_FAILED, EXIT_STALE
from launcher.profiles import SlurmProfile

PASSED = ("HOME", "LANG", "PATH", "USER")
"""Taken over from whoever submits; nothing else is, so that no secret of theirs reaches the job."""

FIRST_PORT, PORTS = 20000, 10000
"""Ray's head listens on a port that follows from the job's number, below those that the kernel gives out."""


@dataclass(frozen=True)
class SlurmJob:
    """What a batch script is made of."""

    job_id: str
    journal: Path
    working_directory: Path
    log: Path
    token_file: Path
    stop_file: Path
    """Its name is continued by the number of the allocation's life."""
    python: str
    python_path: str
    """Empty: what is installed on the nodes."""
    threads_per_rank: int = 1
    devices: int | None = None
    module: str = "launcher.coordinator"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """By which Slurm knows it."""
        return job_name(self.job_id)


def job_name(job_id: str) -> str:
    """Slurm's name for a job: it follows from the id, so that a submission can be found again."""
    return f"espalier-{job_id}"


def render(job: SlurmJob, options: SlurmOptions, profile: SlurmProfile) -> str:
    """The script: deterministic, free of secrets, made to be read."""
    head = [*_head(job), *_directives(job, options, profile), ""]
    return "\n".join([*head, *_preparation(job, profile), *_body(job, options, profile)]) + "\n"


def _head(job: SlurmJob) -> Iterator[str]:
    yield "#!/bin/bash"
    yield f"# Job {job.job_id} of Espalier: one Ray node on each Slurm node, the coordinator beside the first."


def _directives(job: SlurmJob, options: SlurmOptions, profile: SlurmProfile) -> Iterator[str]:
    memory = options.memory_gib_per_node
    values: dict[str, object] = {
        "job-name": job.name,
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": options.cpus(job.threads_per_rank),
        "gpus-per-node": options.gpus_per_node or None,
        "mem": f"{round(1024 * memory)}M" if memory else None,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": options.time,
        "constraint": options.constraint,
        "chdir": job.working_directory,
        "output": job.log,
        "open-mode": "append",
        "signal": f"B:USR2@{options.checkpoint_seconds}",
        "export": ",".join([*PASSED, *profile.pass_environment]),
    }
    for name, value in values.items():
        if value is not None:
            text = str(value)
            yield f"#SBATCH --{name}={text if ' ' not in text else chr(34) + text + chr(34)}"
    yield "#SBATCH --requeue"
    for directive in profile.directives:
        yield f"#SBATCH {directive}"


def _preparation(job: SlurmJob, profile: SlurmProfile) -> Iterator[str]:
    if profile.modules:
        yield f"module load {shlex.join(profile.modules)}"
    yield from profile.lines
    yield "set -u"  # not before: modules read variables that may not be set
    environment = {
        **({"PYTHONPATH": job.python_path} if job.python_path else {}),
        **job.environment,
        "RAY_AUTH_TOKEN_PATH": str(job.token_file),
        **profile.environment,
    }
    for name, value in environment.items():
        yield f"export {name}={shlex.quote(value)}"


def _body(job: SlurmJob, options: SlurmOptions, profile: SlurmProfile) -> Iterator[str]:
    settled = "|".join(str(code) for code in (EXIT_DONE, EXIT_FAILED, EXIT_STALE))
    yield f"""
# Ray's head is the first node.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol --oneliner show node "$head" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
port=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))
life=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}
stop={shlex.quote(str(job.stop_file))}.$life

# USR2 comes before the time limit or a preemption: checkpoints are written, and the job queues again.
# TERM asks for the same, and the job ends.
requeue=no
trap 'requeue=yes; touch "$stop"' USR2
trap 'touch "$stop"' TERM
"""
    yield " \\\n    ".join(_srun(job, options, profile)) + " &"
    yield f"""step=$!
until wait "$step"; ! kill -0 "$step" 2> /dev/null; do :; done
wait "$step"
code=$?
rm -f "$stop" "$stop.done"

if [ "$requeue" = yes ]; then
    case $code in
        {settled}) ;; # nothing is left to do, or another attempt does it
        *) scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;;
    esac
fi
exit "$code\""""


def _srun(job: SlurmJob, options: SlurmOptions, profile: SlurmProfile) -> Iterator[str]:
    cpus = options.cpus(job.threads_per_rank)
    yield f"srun --export=ALL --cpus-per-task={cpus} --kill-on-bad-exit=0"
    if profile.container:
        yield f"--container-image={shlex.quote(profile.container.image)}"
        if profile.container.mounts:
            yield f"--container-mounts={shlex.quote(','.join(profile.container.mounts))}"
    yield f"{shlex.quote(job.python)} -m launcher.ray_node {shlex.quote(str(job.journal))}"
    yield '--head "$head" --address "$address:$port" --nodes "$SLURM_JOB_NUM_NODES"'
    devices = f" --devices {job.devices}" if job.devices else ""
    yield f"--cpus {cpus} --gpus {options.gpus_per_node}{devices} --module {job.module}"
    yield '--ray-dir "/tmp/esp-$life" --stop-file "$stop"'
