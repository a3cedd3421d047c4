"""Brings a job's runs in MLflow up to date with its journal. Torch-free.

The feeder remembers in the journal's directory how far it has come, finds runs by tag before it creates them, and takes
every time stamp from the events (MLflow keeps one copy of equal records). So it may be killed, and the server may die,
at any moment: nothing is lost, nothing appears twice.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import TypeAdapter

from launcher.events import Event
from launcher.journal import Journal
from launcher.result import result_document
from launcher.states import RESTING
from launcher.tracking.records import (
    JOB,
    RUN_STATUS,
    TERMINAL,
    Changes,
    Translation,
    closing_candidate,
    closing_job,
    closing_variant,
    flatten,
)
from launcher.tracking.store import (
    TrackingRefusedError,
    TrackingUnavailableError,
    artifacts_beside,
    batches,
    calls,
    page_url,
)
from launcher.tracking.text import ABOUT, beginning, candidate_text, summary, variant_text
from parallelism import places
from parallelism.layout import layout_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "espalier"
JOB_TAG = "espalier.job"
RUN_TAG = "espalier.run"
"""Key of a candidate's or variant's run; the job's own run has none."""
NOTE_TAG = "mlflow.note.content"
KIND_TAGS = {"mlflow.experimentKind": "custom_model_development", NOTE_TAG: ABOUT}

EVENTS_PER_ROUND = 500

SETTLED = frozenset(
    ("name", "source", "model", "layout", "layout_chosen", "training", "budget", "parameters", "flops_per_token")
)
"""What of a candidate's plan holds when it runs."""
ESTIMATES = ("steps", "tokens", "flops", "seconds", "device_seconds", "cost", "memory_bytes", "disk_bytes")
"""What of it is an estimate, as far as it can be held against what comes out; all of it is in ``plan.json``."""


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

    def began(self) -> float:
        """When the job was written down, in seconds since 1970."""
        return float(self._journal.facts()["created"])

    def rested_at(self) -> float:
        """Time of the newest event."""
        return self._journal.view().last_time

    def params(self) -> dict[str, Any]:
        """The job's own parameters (nested)."""
        spec = self._spec.model_dump(mode="json", exclude_none=True, exclude={"candidates"})
        return spec | {"candidates": ", ".join(candidate.name for candidate in self._spec.candidates)}

    def candidate_params(self, name: str) -> dict[str, Any]:
        """One candidate's parameters (nested): what the plan made of them, or else what the spec says.

        What the plan only estimates stands apart, under ``plan``.
        """
        document = self._journal.document("plan") or {}
        planned = {row["name"]: row for part in ("candidates", "sources") for row in document.get(part, [])}
        asked = {candidate.name: candidate for candidate in self._spec.candidates}
        row = planned.get(name, {})
        settled = {key: value for key, value in row.items() if key in SETTLED}
        estimates = {key: row[key] for key in ESTIMATES if key in row}
        return asked[name].model_dump(mode="json", exclude_none=True) | settled | {"plan": estimates}

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
        url = page_url(cursor.uri, cursor.experiment_id, run_id)
        place = {"uri": cursor.uri, "experiment_id": cursor.experiment_id, "run_id": run_id, "url": url}
        self._journal.write_document("tracking/mlflow", place)

    def report(self) -> list[Path]:
        """The frontier's figure, table and data, as far as they exist now."""
        directory = self._journal.report_dir
        return [places.need(directory / name) for name in places.sizes(directory) if "/" not in name]


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
            kept = TypeAdapter(cls).validate_json(places.read_bytes(directory / "cursor.json"))
        except FileNotFoundError:
            return cls(uri)
        return kept if kept.uri == uri else cls(uri)

    def save(self, directory: Path) -> None:
        """A reader sees the old cursor or the new one."""
        places.write_text(directory / "cursor.json", json.dumps(vars(self)))


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
        with calls():
            experiment = self._client.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                artifacts = artifacts_beside(self.cursor.uri)
                location = artifacts.absolute().as_uri() if artifacts else None
                experiment_id = self._client.create_experiment(EXPERIMENT, location, KIND_TAGS)
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
            with calls():
                page = self._client.search_runs(
                    [experiment_id], f"tags.`{JOB_TAG}` = '{self._job.job_id}'", max_results=1000, page_token=token
                )
            yield from ((run.data.tags.get(RUN_TAG, JOB), run.info.run_id) for run in page)
            token = page.token
            if not token:
                return

    def _feed_round(self) -> bool:
        """Feed the next events and move the cursor behind them; False when there were none."""
        events = list(islice(self._job.events(self.cursor.after), EVENTS_PER_ROUND))
        if not events:
            return False
        translation = Translation(self.cursor.last_steps, self._job.began())
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
        result, milliseconds = self._job.result(), round(self._job.rested_at() * 1000)
        for row in result["variants"]:
            self._write(row["name"], _with_note(closing_variant(row, milliseconds), variant_text(row)))
        for row in result["candidates"]:
            if row["name"] in self._known:
                variants = [each for each in result["variants"] if each["candidate"] == row["name"]]
                text = candidate_text(row, self._job.candidate_params(row["name"]), variants)
                self._write(row["name"], _with_note(closing_candidate(row, milliseconds), text))
        status = RUN_STATUS.get(result["state"], "RUNNING")
        self._end_candidates(status, milliseconds)
        self._upload({**self._job.documents(), "result.json": json.dumps(result, indent=1)}, self._job.report())
        text = summary(self._job.name, result["state"], result)
        self._write(JOB, _with_note(closing_job(result, milliseconds), text))
        self.cursor.closed = True
        self.cursor.save(self._directory)

    def _end_candidates(self, status: str, milliseconds: int) -> None:
        """Give the job's status to the children that have not ended by themselves."""
        for run, run_id in list(self._known.items()):
            if run == JOB:
                continue
            with calls():
                current = self._client.get_run(run_id).info.status
            if current not in TERMINAL:
                self._write(run, Changes(milliseconds, status=status, status_milliseconds=milliseconds))

    def _upload(self, texts: Mapping[str, str], files: Iterable[Path]) -> None:
        run_id = self._known[JOB]
        with calls():
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
        for batch in batches(changes):
            with calls():
                self._client.log_batch(run_id, metrics=batch.metrics, params=batch.params, tags=batch.tags)
        if changes.status:
            with calls():
                if changes.status in TERMINAL:
                    self._client.set_terminated(run_id, changes.status, changes.status_milliseconds)
                else:
                    self._client.update_run(run_id, changes.status)

    def _run_id(self, run: str, milliseconds: int) -> str:
        """The run's id. A missing run is made below its parent; parameters are written once per look at the server."""
        if run in self._described:
            return self._known[run]
        parent = run.rpartition("/")[0]
        parent_id = self._run_id(parent, milliseconds) if run else None
        if run not in self._known:
            # Of a variant the whole key: in lists and charts its candidate does not stand beside it.
            self._known[run] = self._create_run(run, run or self._job.name, parent_id, milliseconds)
        self._described.add(run)
        if run == JOB:
            self._job.link(self.cursor, self._known[run])
            self._write_once(run, Changes(milliseconds, params=flatten(self._job.params())))
            self._upload(self._job.documents(), [])
        elif parent == JOB:
            params = self._job.candidate_params(run)
            shown = flatten(params) | {"layout": layout_text(params.get("layout"))}
            self._write_once(run, Changes(milliseconds, params=shown))
        return self._known[run]

    def _create_run(self, run: str, name: str, parent_id: str | None, milliseconds: int) -> str:
        assert self.cursor.experiment_id is not None, "connected"
        tags = {JOB_TAG: self._job.job_id, "mlflow.source.name": self._job.job_id, "mlflow.source.type": "LOCAL"}
        if parent_id is None:
            tags[NOTE_TAG] = beginning(name, self._job.job_id)
        else:
            tags |= {RUN_TAG: run, "mlflow.parentRunId": parent_id}
        with calls():
            created = self._client.create_run(self.cursor.experiment_id, milliseconds, tags, name)
        return str(created.info.run_id)

    def forget(self) -> None:
        """After a failed call nobody knows what arrived: look at the server again."""
        self._known, self._described = {}, set()


def _with_note(changes: Changes, text: str) -> Changes:
    """The changes, and what the run's page says in words."""
    changes.tags[NOTE_TAG] = text
    return changes
