"""Feeds MLflow from a job's journal, in a process of its own: ``python -m launcher.tracking JOURNAL_DIR --uri URI``.

The journal is the truth and MLflow a picture of it. The feeder remembers in the journal's directory how far it has
come, finds runs by tag before it creates them, and takes every time stamp from the events (MLflow keeps one copy of
equal records). So it may be killed, and the server may die, at any moment: nothing is lost, nothing appears twice.
Torch-free.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

from launcher.events import Event
from launcher.journal import Journal
from launcher.result import result_document
from launcher.states import RESTING
from launcher.tracking_records import (
    JOB,
    RUN_STATUS,
    TERMINAL,
    Changes,
    Translation,
    closing_changes,
    flatten,
    summary,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

EXPERIMENT = "espalier"
JOB_TAG = "espalier.job"
RUN_TAG = "espalier.run"
NOTE_TAG = "mlflow.note.content"

SQLITE = "sqlite:///"

UI_PORT = 5000
"""Where ``espalier ui`` serves a home's own store, unless the port is taken."""

EVENTS_PER_ROUND = 500
# MLflow's limits for one request, and for the length of one value.
METRICS_PER_BATCH, PARAMS_PER_BATCH, TAGS_PER_BATCH = 1000, 100, 100
PARAM_LENGTH, TAG_LENGTH = 6000, 8000

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
# Refused for what the request says: trying again would end the same way. Everything else may pass.
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST"})

EXIT_DONE, EXIT_UNREACHABLE, EXIT_BUSY, EXIT_REFUSED = 0, 3, 4, 5


class TrackingUnavailableError(RuntimeError):
    """The MLflow server cannot be reached or answers with an error of its own."""


class TrackingRefusedError(RuntimeError):
    """The MLflow server refuses what it was told."""


class TrackedJob:
    """What the feeder reads of a job: its journal, folded as far as it was read."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._spec = journal.spec()
        self.job_id = journal.job_id
        self.name = self._spec.name

    def events(self, after: int) -> Iterator[Event]:
        """Events with a number above ``after``, in order."""
        return self._journal.events(after)

    def at_rest(self) -> bool:
        """Whether the last attempt has come to an end of its own (finished, failed, paused or interrupted)."""
        return self._journal.state() in RESTING

    def rested_at(self) -> tuple[int, float]:
        """Number and time of the newest event."""
        view = self._journal.view()
        return view.last_event, view.last_time

    def params(self) -> dict[str, Any]:
        """The job's own parameters (nested)."""
        spec = self._spec.model_dump(mode="json", exclude_none=True, exclude={"candidates"})
        return spec | {"candidates": ", ".join(candidate.name for candidate in self._spec.candidates)}

    def candidate_params(self, name: str) -> dict[str, Any]:
        """One candidate's parameters (nested): what the plan made of them, or else what the spec says."""
        planned = {row["name"]: row for row in (self._journal.document("plan") or {}).get("candidates", [])}
        asked = {candidate.name: candidate for candidate in self._spec.candidates}
        return asked[name].model_dump(mode="json", exclude_none=True) | planned.get(name, {})

    def result(self) -> dict[str, Any]:
        """The result document as it stands now."""
        return result_document(self._journal)

    def documents(self) -> dict[str, str]:
        """Artifact name → text, of those that exist now: the spec as it can be run again, and the plan."""
        spec = self._spec.model_dump(mode="json", exclude_none=True)
        texts = {"spec.yaml": yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)}
        plan = self._journal.document("plan")
        return texts | ({"plan.json": json.dumps(plan, indent=1)} if plan else {})

    def link(self, cursor: "Cursor", run_id: str) -> None:
        """Note where the job is shown; for a store without a server, where ``espalier ui`` shows it by default."""
        base = cursor.uri.rstrip("/") if cursor.uri.startswith("http") else f"http://127.0.0.1:{UI_PORT}"
        url = f"{base}/#/experiments/{cursor.experiment_id}/runs/{run_id}"
        place = {"uri": cursor.uri, "experiment_id": cursor.experiment_id, "run_id": run_id, "url": url}
        self._journal.write_document("tracking/mlflow", place)

    def report(self) -> list[Path]:
        """The frontier's figure, table and data, as far as they exist now."""
        directory = self._journal.report_dir
        return sorted(path for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []


@dataclass
class Cursor:
    """How far a job has been fed, and where its picture is. ``closed``: the summary of the job at rest is written."""

    uri: str
    after: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    experiment_id: str | None = None
    closed: bool = False

    @classmethod
    def load(cls, directory: Path, uri: str) -> "Cursor":
        """The cursor kept for this server, or a fresh one: a job fed to another server is fed from its beginning."""
        try:
            kept = TypeAdapter(cls).validate_json((directory / "cursor.json").read_bytes())
        except FileNotFoundError:
            return cls(uri)
        return kept if kept.uri == uri else cls(uri)

    def save(self, directory: Path) -> None:
        """Write, then rename: a reader sees the old cursor or the new one."""
        draft = directory / f"cursor.json.{os.getpid()}"
        draft.write_text(json.dumps(vars(self)), encoding="utf-8")
        draft.replace(directory / "cursor.json")


class Feeder:
    """Brings one job's runs in MLflow up to date with its journal."""

    def __init__(self, job: TrackedJob, client: "MlflowClient", directory: Path, uri: str) -> None:
        """``directory`` keeps the cursor; ``uri`` is where the client writes."""
        self._job = job
        self._client = client
        self.job_id = job.job_id
        self._directory = directory
        self._known: dict[str, str] = {}  # run key → id, as the server told
        self._described: set[str] = set()  # runs whose parameters were written since the last look at the server
        self.cursor = Cursor.load(directory, uri)

    def feed(self) -> None:
        """Write everything that is new, and the summary when the job is at rest.

        Raises :class:`TrackingUnavailableError`; calling again continues where it stopped.
        """
        self._connect()
        while self._feed_round():
            pass
        if self._job.at_rest() and not self.cursor.closed:
            self._close()

    def _connect(self) -> None:
        """Find the experiment and the job's runs, once; create the parent run where there is none."""
        if self._known:
            return
        with _calls():
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                artifacts = artifacts_beside(self.cursor.uri)
                location = artifacts.absolute().as_uri() if artifacts else None
                experiment_id = self._client.create_experiment(EXPERIMENT, artifact_location=location)
            else:
                experiment_id = experiment.experiment_id
        self.cursor.experiment_id = experiment_id
        found = dict(self._find_runs(experiment_id))
        if JOB not in found and self.cursor.after:
            # The server lost its store, or somebody deleted the runs: the journal has everything.
            self.cursor = Cursor(self.cursor.uri, experiment_id=experiment_id)
        self._known = found

    def _find_runs(self, experiment_id: str) -> Iterator[tuple[str, str]]:
        token = None
        while True:
            with _calls():
                page = self._client.search_runs(
                    [experiment_id], f"tags.`{JOB_TAG}` = '{self._job.job_id}'", max_results=1000, page_token=token
                )
            yield from ((run.data.tags[RUN_TAG], run.info.run_id) for run in page)
            token = page.token
            if not token:
                return

    def _feed_round(self) -> bool:
        """Feed the next events and move the cursor behind them; False when there were none."""
        events = list(islice(self._job.events(self.cursor.after), EVENTS_PER_ROUND))
        if not events:
            return False
        translation = Translation(self.cursor.last_steps)
        for event in events:
            translation.add(event)
        for run, changes in translation.changes.items():
            self._write(run, changes)
        self.cursor.after = events[-1]["number"]
        self.cursor.last_steps = translation.last_steps
        self.cursor.closed = False
        self.cursor.save(self._directory)
        return True

    def _close(self) -> None:
        """Write what is only known once the job rests: summary, artifacts, the frontier, the status of every run."""
        result = self._job.result()
        number, seconds = self._job.rested_at()
        milliseconds = round(seconds * 1000)
        for row in result["variants"]:
            self._write(row["name"], closing_changes(row, number, milliseconds))
        status = RUN_STATUS.get(result["state"], "RUNNING")
        self._end_candidates(status, milliseconds)
        self._upload({**self._job.documents(), "result.json": json.dumps(result, indent=1)}, self._job.report())
        self._write(JOB, Changes(milliseconds, tags={NOTE_TAG: summary(self._job.name, result["state"], result)}))
        self.cursor.closed = True
        self.cursor.save(self._directory)

    def _end_candidates(self, status: str, milliseconds: int) -> None:
        """Give the job's status to the children that have not ended by themselves."""
        for run, run_id in list(self._known.items()):
            if run == JOB:
                continue
            with _calls():
                current = self._client.get_run(run_id).info.status
            if current not in TERMINAL:
                self._write(run, Changes(milliseconds, status=status, status_milliseconds=milliseconds))

    def _upload(self, texts: Mapping[str, str], files: Iterable[Path]) -> None:
        run_id = self._known[JOB]
        with _calls():
            for name, text in texts.items():
                self._client.log_text(run_id, text, name)
            for path in files:
                self._client.log_artifact(run_id, str(path))

    def _write(self, run: str, changes: Changes) -> None:
        """Write changes to a run; what the server refuses twice is reported and left out, so that the rest goes on."""
        try:
            self._write_once(run, changes)
        except TrackingRefusedError:
            # Most likely the run was deleted behind our back: look again, then give up on this part.
            before = self.cursor
            self.forget()
            self._connect()
            if self.cursor is not before:
                raise TrackingUnavailableError("the job's runs are gone; feeding it again from its beginning") from None
            try:
                self._write_once(run, changes)
            except TrackingRefusedError as error:
                print(f"MLflow refuses a part of run {run or 'of the job'!r}: {error}", file=sys.stderr, flush=True)

    def _write_once(self, run: str, changes: Changes) -> None:
        run_id = self._run_id(run, changes.milliseconds)
        for batch in _batches(changes):
            with _calls():
                self._client.log_batch(run_id, metrics=batch.metrics, params=batch.params, tags=batch.tags)
        if changes.status:
            with _calls():
                if changes.status in TERMINAL:
                    self._client.set_terminated(run_id, changes.status, changes.status_milliseconds)
                else:
                    self._client.update_run(run_id, changes.status)

    def _run_id(self, run: str, milliseconds: int) -> str:
        """The run's id. A missing run is made below its parent; parameters are written once per look at the server."""
        if run in self._described:
            return self._known[run]
        parent, _, name = run.rpartition("/")
        parent_id = self._run_id(parent, milliseconds) if run else None
        if run not in self._known:
            self._known[run] = self._create_run(run, name or self._job.name, parent_id, milliseconds)
        self._described.add(run)
        if run == JOB:
            self._job.link(self.cursor, self._known[run])
            self._write_once(run, Changes(milliseconds, params=flatten(self._job.params())))
            self._upload(self._job.documents(), [])
        elif parent == JOB:
            self._write_once(run, Changes(milliseconds, params=flatten(self._job.candidate_params(name))))
        return self._known[run]

    def _create_run(self, run: str, name: str, parent_id: str | None, milliseconds: int) -> str:
        assert self.cursor.experiment_id is not None, "connected"
        tags = {JOB_TAG: self._job.job_id, RUN_TAG: run}
        if parent_id is None:
            tags[NOTE_TAG] = f"## {name}\n\nJob `{self._job.job_id}` is under way."
        else:
            tags["mlflow.parentRunId"] = parent_id
        with _calls():
            created = self._client.create_run(self.cursor.experiment_id, milliseconds, tags, name)
        return str(created.info.run_id)

    def forget(self) -> None:
        """After a failed call nobody knows what arrived: look at the server again."""
        self._known, self._described = {}, set()


class Leaving:
    """Whether the feeder was asked to end: by a signal, or by the death of the process that started it."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._parent = os.getppid()

    def ask(self, *_: object) -> None:
        """A signal handler."""
        self._asked.set()

    def asked(self) -> bool:
        """True from the first request on."""
        return self._asked.is_set() or os.getppid() != self._parent

    def wait(self, seconds: float) -> None:
        """Pause; a request ends the pause, and later pauses are short."""
        if self._asked.is_set():
            time.sleep(min(seconds, 0.5))
        else:
            self._asked.wait(seconds)


def follow(feeder: Feeder, leaving: Leaving, poll_seconds: float, patience_seconds: float) -> int:
    """Feed until the feeder has to leave; from then on wait at most ``patience_seconds`` for a dead server.

    Returns an exit code. What is left unfed, the next feeder feeds.
    """
    failures = 0
    give_up_at: float | None = None
    while True:
        last_round = leaving.asked()  # asked before feeding, so that nothing written until then is missed
        try:
            feeder.feed()
        except TrackingUnavailableError as error:
            feeder.forget()
            if not failures:
                _say(f"MLflow does not answer; nothing is lost, the feeder tries again: {error}")
            if last_round and give_up_at is None:
                give_up_at = time.monotonic() + patience_seconds
            if give_up_at is not None and time.monotonic() >= give_up_at:
                _say(f"MLflow stays away; feed the rest later with: espalier track {feeder.job_id}")
                return EXIT_UNREACHABLE
            leaving.wait(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1
        except TrackingRefusedError as error:
            _say(f"MLflow refuses the job: {error}")
            return EXIT_REFUSED
        else:
            if last_round:
                return EXIT_DONE
            if failures:
                _say("MLflow answers again")
            failures = 0
            leaving.wait(poll_seconds)


@contextmanager
def _calls() -> Iterator[None]:
    """Around calls to MLflow: sorts its many ways to fail into refused and unavailable."""
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        kind = TrackingRefusedError if error.error_code in REFUSALS else TrackingUnavailableError
        raise kind(str(error).partition("\n")[0][:300]) from error
    except (requests.RequestException, SQLAlchemyError, OSError) as error:
        raise TrackingUnavailableError(str(error).partition("\n")[0][:300]) from error


@dataclass
class Batch:
    """One request."""

    metrics: "list[Metric]" = field(default_factory=list)
    params: "list[Param]" = field(default_factory=list)
    tags: "list[RunTag]" = field(default_factory=list)


def _batches(changes: Changes) -> Iterator[Batch]:
    """Requests within MLflow's limits: first parameters and tags, then metrics in the order of their steps."""
    from mlflow.entities import Metric, Param, RunTag

    params = [Param(key, value[:PARAM_LENGTH]) for key, value in changes.params.items()]
    tags = [RunTag(key, value[:TAG_LENGTH]) for key, value in changes.tags.items()]
    metrics = [Metric(point.key, point.value, point.milliseconds, point.step) for point in changes.metrics]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        yield Batch(params=params[start : start + PARAMS_PER_BATCH])
    for start in range(0, len(tags), TAGS_PER_BATCH):
        yield Batch(tags=tags[start : start + TAGS_PER_BATCH])
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        yield Batch(metrics=metrics[start : start + METRICS_PER_BATCH])


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def default_uri(home: Path) -> str:
    """The MLflow store that belongs to a home: a SQLite file."""
    return f"{SQLITE}{home.absolute()}/mlflow/mlflow.db"


def artifacts_beside(uri: str) -> Path | None:
    """Where the artifacts of a SQLite store lie; None for a server, which decides itself."""
    return Path(uri.removeprefix(SQLITE)).parent / "artifacts" if uri.startswith(SQLITE) else None


class FeederProcess:
    """The feeder of one job as a child process; it also ends by itself when its parent dies."""

    def __init__(self, journal: Journal, home: Path, uri: str | None = None) -> None:
        """``uri``: an MLflow server or store; by default the one of the home."""
        command = [sys.executable, "-m", "launcher.tracking", str(journal.directory)]
        command += ["--uri", uri or default_uri(home)]
        with open(journal.log_path("tracking"), "ab") as log:
            # In a session of its own: Ctrl-C is meant for the job, whose end the feeder still has to write down.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def close(self, timeout_seconds: float = 60.0) -> int:
        """Let it write what is left, for a limited time. Returns its exit code: 0 when everything was written."""
        self._process.terminate()
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the feeder's process. Returns its exit code."""
    options = _parse(arguments)
    journal = Journal(options.journal)
    journal.tracking_dir.mkdir(parents=True, exist_ok=True)
    leaving = Leaving()
    if options.once:
        leaving.ask()
    signal.signal(signal.SIGTERM, leaving.ask)
    signal.signal(signal.SIGINT, leaving.ask)
    with open(journal.tracking_dir / "lock", "w", encoding="utf-8") as lock:
        if not _acquire(lock, leaving):
            _say(f"another feeder is at work on job {journal.job_id}")
            return EXIT_BUSY
        feeder = Feeder(TrackedJob(journal), _connect(options.uri), journal.tracking_dir, options.uri)
        return follow(feeder, leaving, options.poll, options.patience)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.tracking", description="Feed MLflow from a job's journal."
    )
    parser.add_argument("journal", type=Path, help="a job's directory")
    parser.add_argument("--uri", required=True, help="an MLflow tracking server or store")
    parser.add_argument("--once", action="store_true", help="feed what there is and end")
    parser.add_argument("--poll", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--patience", type=float, default=20.0, metavar="SECONDS", help="for a dead server, at the end")
    return parser.parse_args(arguments)


def _acquire(lock: IO[str], leaving: Leaving) -> bool:
    """Be the only feeder of the job; one that is about to leave is waited for."""
    for _ in range(25):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            leaving.wait(0.2)
    return False


def _connect(uri: str) -> "MlflowClient":
    """A client that fails quickly: the feeder does the waiting."""
    # MLflow reads these from the environment and nowhere else; this process is the feeder's own.
    os.environ |= {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    from mlflow import MlflowClient

    artifacts = artifacts_beside(uri)
    if artifacts:
        artifacts.mkdir(parents=True, exist_ok=True)
    with _calls():
        return MlflowClient(uri)


if __name__ == "__main__":
    sys.exit(main())
