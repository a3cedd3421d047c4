"""A job's directory: events, stage manifests, checkpoints, variants; the durable truth about what happened. Torch-free.

This is the only code that knows paths inside the directory::

    job.json  spec.json  plan.json  desired.json      what was asked for
    events/00000001.json …  segments/…                what happened (launcher.events)
    stages/train/small.e0001.json                     manifests; true once an event `stage_done` names them
    data/                                             prepared tokens
    candidates/NAME/checkpoints/e0001-g01/…           one folder per process group, so that a dead one disturbs nobody
    candidates/NAME/layers/…  candidates/NAME/variants/…
    exports/  report/  logs/  tracking/  cluster/

It may lie in an object store. The directory on each machine is then a copy of what is needed there
(:mod:`parallelism.places`), at the same path everywhere, and documents and events are never in it.
"""

import errno
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import psutil

from launcher.events import Event, EventLog, StaleEpochError
from launcher.spec import JobSpec
from launcher.states import JobState, check_transition
from launcher.storage import LocalStorage, ObjectStorage, Storage
from launcher.view import JobView
from parallelism import places

__all__ = [
    "Desired",
    "Event",
    "Journal",
    "StageRecord",
    "StaleEpochError",
    "code_version",
    "hash_inputs",
    "open_journal",
]

Desired = Literal["run", "pause", "cancel"]

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
FULL_DISK_SECONDS, FULL_DISK_POLL_SECONDS = 600.0, 5.0

CLOCK_SECONDS = 3.0
"""Processes with one number whose start lies closer together are the same: no number is given out again so soon."""


@dataclass(frozen=True)
class StageRecord:
    """A stage that is done: the hash of what went in, and what came out."""

    name: str
    inputs_hash: str
    outputs: dict[str, Any]
    seconds: float


class Journal:
    """The directory of one job. Reading needs no epoch; writing events and stages needs a claimed one."""

    def __init__(self, directory: str | Path, storage: Storage | None = None) -> None:
        self.directory = Path(directory).absolute()
        self.storage = storage or _storage_at(self.directory)
        self._log = EventLog(self.storage)
        self._view = JobView()

    @property
    def location(self) -> str:
        """What :func:`open_journal` finds it by, on any machine: the directory, or ``URL#DIRECTORY``."""
        return places.address(self.directory)

    def local(self, shown: str) -> Path:
        """The path that people are shown as :func:`parallelism.places.url` has it."""
        url = places.url(self.directory)
        return self.directory / shown.removeprefix(f"{url}/") if shown.startswith(f"{url}/") else Path(shown)

    # What was asked for

    def create(
        self, spec: JobSpec, job_id: str | None = None, documents: Mapping[str, Mapping[str, Any]] | None = None
    ) -> "Journal":
        """Write a new job down, with ``documents`` (see :meth:`write_document`) beside it; what was half written is
        completed. Raises ``ValueError`` where the directory already holds one.
        """
        facts = {
            "id": job_id or self.directory.name,
            "created": time.time(),
            "working_directory": os.getcwd(),
            "versions": {"espalier": code_version(), "python": platform.python_version()},
        }
        if not places.is_mirrored(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        if not self.storage.put_exclusive("job.json", _encode(facts)) and self.exists:
            raise ValueError(f"{self.directory} already holds a job: choose another directory")
        self.storage.put("spec.json", _encode(spec.model_dump(mode="json")))
        for name, document in (documents or {}).items():
            self.write_document(name, document)
        if not self.last_event():
            self._log.append("submitted", {"job": facts["id"], "name": spec.name})
        self.set_desired("run")
        return self

    @property
    def exists(self) -> bool:
        """Whether the directory holds a job that is completely written down."""
        return self.storage.exists("desired.json")

    def facts(self) -> dict[str, Any]:
        """``id``, ``created``, ``working_directory`` (relative paths of the spec start there) and ``versions``."""
        return self._read("job.json")

    @property
    def job_id(self) -> str:
        """The job's identifier."""
        return str(self.facts()["id"])

    def spec(self) -> JobSpec:
        """The job's spec, as it was copied in, with the defaults of that day."""
        return JobSpec.model_validate(self._read("spec.json"))

    def desired(self) -> Desired:
        """What the job's owner wants of it."""
        wanted: Desired = self._read("desired.json")["desired"]
        return wanted

    def set_desired(self, desired: Desired) -> None:
        """Ask the coordinator to run, pause or cancel; it looks about once a second."""
        if desired not in get_args(Desired):
            raise ValueError(f"desired state {desired!r} is unknown: use one of {', '.join(get_args(Desired))}")
        self.storage.put("desired.json", _encode({"desired": desired, "time": time.time()}))

    def write_document(self, name: str, document: Mapping[str, Any]) -> None:
        """Keep a JSON document (the plan, the result) beside the spec, under ``NAME.json``."""
        self.storage.put(f"{name}.json", _encode(document))

    def document(self, name: str) -> dict[str, Any] | None:
        """What :meth:`write_document` kept, or None."""
        content = self.storage.get(f"{name}.json")
        return json.loads(content) if content else None

    # What happened

    @property
    def epoch(self) -> int:
        """The epoch this object has claimed; 0 before."""
        return self._log.epoch

    def claim_epoch(self, role: str = "coordinator") -> int:
        """Begin a new attempt: from here on, every older attempt is refused."""
        identity = {"role": role, "pid": os.getpid(), "node": socket.gethostname(), "code": code_version()}
        return self._log.claim_epoch(identity | {"process_created": psutil.Process().create_time()})

    def append(self, kind: str, fields: Mapping[str, Any]) -> Event:
        """Write one event; needs a claimed epoch. Raises :class:`StaleEpochError` once a newer attempt has begun.

        On a full disk it waits for room, because the work goes on meanwhile; after ten minutes it raises ``OSError``.
        """
        assert self.epoch, "claim an epoch before writing events"
        deadline = time.monotonic() + FULL_DISK_SECONDS
        while True:
            try:
                return self._log.append(kind, fields)
            except OSError as error:
                if error.errno not in NO_SPACE or time.monotonic() > deadline:
                    raise
                print(f"event {kind} waits for room in {self.directory}: {error}", file=sys.stderr, flush=True)
                time.sleep(FULL_DISK_POLL_SECONDS)

    def set_state(self, state: JobState, **fields: Any) -> None:
        """Change the job's state. Raises ``IllegalTransition``."""
        check_transition(self.state(), state)
        self.append("state", {"state": state.value, **fields})

    def events(self, after: int = 0) -> Iterator[Event]:
        """Every event with a number above ``after``, in order, up to the last one that exists now."""
        return self._log.read(after)

    def last_event(self) -> int:
        """The number of the newest event."""
        return self._log.last_number()

    def view(self) -> JobView:
        """All events folded into one picture; reads only what is new since the last call."""
        for event in self.events(self._view.last_event):
            self._view.apply(event)
        return self._view

    def state(self) -> JobState:
        """The job's state as the events tell it."""
        return self.view().state

    def holder(self) -> dict[str, Any] | None:
        """The attempt that has not ended, as far as can be told from here: its ``pid``, ``node``, ``epoch``, or None.

        A process of this machine counts while it lives, one of another machine while its last event is younger than a
        minute.
        """
        view = self.view()
        attempt = view.attempt
        if attempt is None or view.released:
            return None
        if attempt["node"] != socket.gethostname():
            return attempt if time.time() - view.last_time < 60 else None
        return attempt if is_process(attempt["pid"], attempt["process_created"]) else None

    # Stages

    def stage(self, name: str) -> StageRecord | None:
        """The stage's record, if it is done with whatever inputs."""
        done = self.view().stages.get(name)
        if done is None:
            return None
        manifest = self._read(done["manifest"])
        return StageRecord(name, manifest["inputs_hash"], manifest["outputs"], manifest["seconds"])

    def stage_done(self, name: str, inputs_hash: str) -> StageRecord | None:
        """The stage's record if it is done with exactly these inputs, otherwise None."""
        record = self.stage(name)
        return record if record and record.inputs_hash == inputs_hash else None

    def commit_stage(self, name: str, inputs_hash: str, outputs: Mapping[str, Any], seconds: float) -> StageRecord:
        """Declare a stage done, once in an attempt.

        The manifest is created and never replaced; it becomes true by the event, which a stale attempt cannot write.
        """
        key = f"stages/{name}.e{self.epoch:04d}.json"
        manifest = {"stage": name, "inputs_hash": inputs_hash, "outputs": dict(outputs), "seconds": seconds}
        if not self.storage.put_exclusive(key, _encode(manifest | {"epoch": self.epoch, "created": time.time()})):
            raise StaleEpochError(f"stage {name} is done already in attempt {self.epoch}")
        self.append("stage_done", {"stage": name, "inputs_hash": inputs_hash, "manifest": key, "seconds": seconds})
        return StageRecord(name, inputs_hash, dict(outputs), seconds)

    # Paths

    @property
    def data_dir(self) -> Path:
        """Prepared tokens."""
        return self.directory / "data"

    def candidate_dir(self, candidate: str) -> Path:
        """Everything that belongs to one candidate."""
        return self.directory / "candidates" / candidate

    def checkpoints_dir(self, candidate: str) -> Path:
        """Roots of checkpoints, one per process group."""
        return self.candidate_dir(candidate) / "checkpoints"

    def gang_root(self, candidate: str, gang: int) -> Path:
        """Where the process group ``gang`` of this epoch writes its checkpoints."""
        return self.checkpoints_dir(candidate) / f"e{self.epoch:04d}-g{gang:02d}"

    def layers_dir(self, candidate: str) -> Path:
        """Compressed layers, before they are put together."""
        return self.candidate_dir(candidate) / "layers"

    def variants_dir(self, candidate: str) -> Path:
        """Compact files, one per variant."""
        return self.candidate_dir(candidate) / "variants"

    @property
    def exports_dir(self) -> Path:
        """Variants in a format that other software loads."""
        return self.directory / "exports"

    @property
    def report_dir(self) -> Path:
        """The frontier as table, figure and data."""
        return self.directory / "report"

    @property
    def logs_dir(self) -> Path:
        """Output of every process of the job."""
        return self.directory / "logs"

    @property
    def cluster_dir(self) -> Path:
        """What a back-end keeps of the job: the script it submitted, the token of its Ray cluster, requests to stop."""
        return self.directory / "cluster"

    @property
    def tracking_dir(self) -> Path:
        """What the MLflow feeder remembers."""
        return self.directory / "tracking"

    def log_path(self, role: str) -> Path:
        """A log file for a process in this role; the folder is made."""
        self.logs_dir.mkdir(parents=True, exist_ok=True)
        return self.logs_dir / f"{role}.log"

    def _read(self, key: str) -> dict[str, Any]:
        content = self.storage.get(key)
        if content is None:
            raise ValueError(f"{self.directory} is not a job's directory (no {key}): check the path or the job's id")
        document: dict[str, Any] = json.loads(content)
        return document


def open_journal(location: str) -> Journal:
    """The journal at a :attr:`Journal.location`."""
    return Journal(places.at(location))


def _storage_at(directory: Path) -> Storage:
    found = places.store_of(directory)
    return ObjectStorage(*found) if found else LocalStorage(directory)


def hash_inputs(*parts: Any) -> str:
    """A short hash of JSON-able parts, the code's version among them: what a stage depends on."""
    text = json.dumps([code_version(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def code_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("espalier-service")
    except PackageNotFoundError:
        return "source"


def is_process(pid: int, created: float, zombie: bool = False) -> bool:
    """Whether this very process still runs (a process id may be given out again), or at least is a ``zombie``.

    ``created`` moves with the clock of the machine, which may be corrected.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created) < CLOCK_SECONDS
        return same and (zombie or process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _encode(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, default=str).encode()
