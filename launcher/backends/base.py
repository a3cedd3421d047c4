"""What every back-end offers, and the table of back-ends. Torch-free.

A back-end takes a job whose journal exists and has a coordinator run for it somewhere. It retries nothing: whoever
submitted the job looks at the status and decides. A new back-end is one file and one line in :data:`BACKENDS`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from launcher.journal import Journal
from parallelism.registry import Entry, load


class Phase(StrEnum):
    """Where a submission stands."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class BackendStatus:
    """``reason``: in the back-end's own words, why it waits or how it ended. ``exit_code``: where one is known.

    ``since``: when it began to run (again), in seconds since 1970; 0 where the back-end does not say. ``final``: it
    ended in a way after which it is not tried again, because somebody withdrew it, or memory was too small.
    """

    phase: Phase
    reason: str = ""
    exit_code: int | None = None
    since: float = 0.0
    final: bool = False


Handle = dict[str, Any]
"""What identifies a submission; JSON-able, so that another process can ask for it later."""


class BackendUnavailable(OSError):
    """The back-end does not answer: asking again may help."""


class Backend(Protocol):
    """Where a job's Ray cluster comes from. All but ``logs`` may raise :class:`BackendUnavailable`."""

    outlives: bool
    """Whether a submission goes on when whoever submitted it has ended: then it is looked for before another."""

    def submit(self, journal: Journal) -> Handle:
        """Start one coordinator for the job. Raises ``ValueError`` where the back-end refuses."""

    def find(self, journal: Journal) -> Handle | None:
        """The submission of this job that has not ended, if there is one: who starts a coordinator asks first."""

    def status(self, handle: Handle) -> BackendStatus:
        """Where the submission stands."""

    def stop(self, handle: Handle, grace_seconds: float) -> None:
        """Ask the coordinator to checkpoint and end; after the grace period nothing of it is left."""

    def logs(self, handle: Handle, journal: Journal, lines: int = 50) -> str:
        """The end of the coordinator's output."""


@dataclass(frozen=True)
class BackendEntry(Entry):
    """``objects``: whether jobs whose journals are in an object store can run there."""

    objects: bool = False


BACKENDS: dict[str, BackendEntry] = {
    "kubernetes": BackendEntry(
        "launcher.backends.kubernetes_options:KubernetesOptions",
        "launcher.backends.kubernetes:KubernetesBackend",
        objects=True,
    ),
    "local": BackendEntry("launcher.spec:ExecutionConfig", "launcher.backends.local:LocalBackend", objects=True),
    "ray": BackendEntry("launcher.profiles:RayProfile", "launcher.backends.ray:RayBackend", objects=True),
    "slurm": BackendEntry("launcher.backends.slurm_options:SlurmOptions", "launcher.backends.slurm:SlurmBackend"),
}


def make_backend(name: str) -> Backend:
    """The back-end of that name. Raises ``ValueError`` with the names there are."""
    if name not in BACKENDS:
        raise ValueError(f"execution.backend {name!r} is unknown: available are {', '.join(sorted(BACKENDS))}")
    backend: Backend = load(BACKENDS[name].implementation)()
    return backend
