"""The MLflow feeder against a real server that is killed in the middle, and against a SQLite store."""

import fcntl
import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from launcher.tracking.feed import EXPERIMENT, NOTE_TAG, RUN_TAG, Cursor, Feeder, TrackedJob
from launcher.tracking.process import (
    EXIT_BUSY,
    EXIT_DONE,
    EXIT_UNREACHABLE,
    FeederProcess,
    Leaving,
    default_uri,
    follow,
)
from launcher.tracking.records import JOB, Translation, flatten, perplexity
from launcher.tracking.store import make_store
from launcher.tracking.text import summary
from tests.ports import free_ports

STEPS = 1200  # of the large candidate: more points than MLflow takes in one request


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "tracked",
            "data": {"train": ["builtin:python-stdlib"], "sequence_length": 64},
            "budget": {"tokens": 1e6},
            "candidates": [
                {"name": name, "model": {"family": "gpt", "layers": 2, "hidden": 64, "heads": 4}}
                for name in ("small", "large")
            ],
            "compression": {"prune": {"methods": ["magnitude"], "sparsity": [0.5]}},
        }
    )


@pytest.fixture
def journal(tmp_path: Path, spec: JobSpec) -> Journal:
    journal = Journal(tmp_path / "home" / "jobs" / "tracked-0001").create(spec)
    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    journal.set_state(JobState.RUNNING)
    return journal


def train(journal: Journal, candidate: str, first: int, last: int, batch: int = 50) -> None:
    """Report steps ``first`` to ``last`` as the coordinator does, a batch per event."""
    for start in range(first, last + 1, batch):
        steps = [training_step(step) for step in range(start, min(start + batch, last + 1))]
        journal.append("train.step", {"candidate": candidate, "steps": steps})


def training_step(step: int) -> dict[str, float]:
    return {
        "step": step,
        "time": 1.7e9 + 0.02 * step,
        "loss": 8.0 / step,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "tokens": 1000 * step,
        "samples": 10 * step,
        "flops": 1e9 * step,
        "seconds": 0.0,
        "tokens_per_second": 1e5,
        "mfu": 0.4,
        "fraction": step / STEPS,
        "device_seconds": 0.02 * step,
    }


def heartbeat(journal: Journal, candidate: str, step: int) -> None:
    system = {"cpu_percent": 50.0, "memory_bytes": 1 << 30}
    fields = {"step": step, "device_seconds": 36.0, "wall_seconds": 18.0, "system": system, "node": "n1"}
    journal.append("heartbeat", {"candidate": candidate, **fields})


def variant(journal: Journal, candidate: str, name: str, loss: float, size: int) -> None:
    metrics = {"validation_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 3}
    fields = {
        "candidate": candidate,
        "name": f"{candidate}/{name}",
        "bytes": size,
        "sparsity": 0.5,
        "bits_per_parameter": 8.0,
    }
    quality = {"metric": "perplexity", "value": math.exp(loss), "higher_is_better": False}
    recipe = {"prune": {"method": "magnitude", "sparsity": 0.5}, "quantize": None, "embedding_bits": 16}
    journal.append("variant", {**fields, "metrics": metrics, "quality": quality, "recipe": recipe})


def runs(uri: str) -> dict[str, Run]:
    """Run key → run; fails when a key appears twice."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert Counter(run.data.tags.get(RUN_TAG, JOB) for run in found).most_common(1)[0][1] == 1
    return {run.data.tags.get(RUN_TAG, JOB): run for run in found}


def history(uri: str, run: Run, metric: str) -> list[tuple[int, float]]:
    """(step, value) as they were logged, in the order of their time stamps and steps."""
    points = MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.timestamp, point.step))]


@pytest.fixture(autouse=True)
def _quick_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the feeder's own process: a dead server is noticed at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def uri(journal: Journal, empty_store: Path) -> str:
    """The store of the journal's home."""
    home = journal.directory.parents[1]
    (home / "mlflow").mkdir()
    shutil.copyfile(empty_store, home / "mlflow" / "mlflow.db")
    return default_uri(home)


def feed_once(journal: Journal, uri: str, patience_seconds: float = 20.0) -> int:
    """What ``--once`` does, in this process."""
    journal.tracking_dir.mkdir(exist_ok=True)
    leaving = Leaving()
    leaving.ask()
    feeder = Feeder(TrackedJob(journal), MlflowClient(uri), journal.tracking_dir, uri)
    return follow(feeder, leaving, poll_seconds=0.1, patience_seconds=patience_seconds)


class Server:
    """A real MLflow server that can be killed and started again on the same port and store."""

    def __init__(self, directory: Path, empty_store: Path) -> None:
        shutil.copyfile(empty_store, directory / "server.db")
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._directory}/server.db"]
        command += ["--artifacts-destination", str(self._directory / "artifacts")]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self._directory / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=self._directory
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self._directory / "server.log").read_text())

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[Server]:
    server = Server(tmp_path, empty_store)
    server.start()
    yield server
    server.kill()


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time allowed"
        time.sleep(0.2)


@pytest.mark.timeout(240)
def test_server_killed_in_the_middle_loses_and_doubles_nothing(journal: Journal, server: Server) -> None:
    feeder = FeederProcess(journal, journal.directory.parents[1], server.uri)
    try:
        journal.append("train.start", {"candidate": "large", "step": 0, "parameters": 5_000_000, "world_size": 2})
        train(journal, "large", 1, 400)
        wait_for(lambda: Cursor.load(journal.tracking_dir, server.uri).after >= 8)

        server.kill()
        train(journal, "large", 401, 800)
        # A rank died: the group went back to the checkpoint of step 300 and repeats what follows.
        journal.append("restart", {"candidate": "large", "reason": "rank died", "lost_device_seconds": 36.0})
        train(journal, "large", 301, STEPS)
        heartbeat(journal, "large", STEPS)
        time.sleep(3)  # the feeder meets the dead server
        server.start()

        journal.append("train.evaluation", {"candidate": "large", "step": STEPS, "validation_loss": 2.0})
        journal.append("train.finished", {"candidate": "large", "step": STEPS, "reason": "budget"})
        variant(journal, "large", "magnitude-s50", 2.5, 1000)
        journal.set_state(JobState.SUCCEEDED)
    finally:
        assert feeder.close(90) == EXIT_DONE

    found = runs(server.uri)
    assert set(found) == {JOB, "large", "large/magnitude-s50"}
    assert found["large"].data.tags["mlflow.parentRunId"] == found[JOB].info.run_id
    assert found["large/magnitude-s50"].data.tags["mlflow.parentRunId"] == found["large"].info.run_id
    for metric, value in (("train_loss", lambda step: 8.0 / step), ("tokens", lambda step: 1000.0 * step)):
        assert history(server.uri, found["large"], metric) == [(step, value(step)) for step in range(1, STEPS + 1)]
    assert history(server.uri, found["large"], "device_hours")[-1][1] == pytest.approx(0.02 * STEPS / 3600)
    assert found["large"].data.metrics["validation_perplexity"] == pytest.approx(math.exp(2.0))
    assert found["large"].data.metrics["system/n1/memory_bytes"] == 1 << 30
    assert found["large"].data.metrics["lost_device_hours"] == pytest.approx(0.01)
    assert found["large"].data.params["parameters"] == "5000000"
    assert found["large/magnitude-s50"].data.params["recipe.prune.method"] == "magnitude"
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    place = journal.document("tracking/mlflow")
    assert place is not None
    assert place["url"].endswith(f"/runs/{found[JOB].info.run_id}?workflowType=machine_learning")

    # Feeding the finished job again changes nothing.
    before = {key: (run.data.metrics, run.data.tags) for key, run in found.items()}
    assert feed_once(journal, server.uri) == EXIT_DONE
    assert {key: (run.data.metrics, run.data.tags) for key, run in runs(server.uri).items()} == before


@pytest.mark.timeout(120)
def test_feeding_without_the_cursor_doubles_nothing_and_artifacts_are_there(journal: Journal, uri: str) -> None:
    train(journal, "small", 1, 120)
    variant(journal, "small", "dense", 2.0, 4000)
    heartbeat(journal, "small", 120)
    journal.set_state(JobState.FAILED, error="the disk is full")
    journal.report_dir.mkdir(parents=True)
    (journal.report_dir / "frontier.png").write_bytes(b"\x89PNG")

    assert feed_once(journal, uri) == EXIT_DONE
    (journal.tracking_dir / "cursor.json").unlink()
    assert feed_once(journal, uri) == EXIT_DONE

    found = runs(uri)
    assert history(uri, found["small"], "train_loss") == [(step, 8.0 / step) for step in range(1, 121)]
    assert len(history(uri, found["small"], "system/n1/cpu_percent")) == 1
    assert history(uri, found["small"], "burnt_device_hours") == [(120, 0.01)]
    assert len(history(uri, found["small/dense"], "perplexity")) == 1
    assert found[JOB].info.status == found["small"].info.status == "FAILED"
    assert "the disk is full" in found[JOB].data.tags[NOTE_TAG]
    assert found[JOB].data.metrics.items() >= {"variants": 1, "frontier_variants": 0}.items()
    assert "gpt, layers 2, hidden 64, heads 4" in found["small"].data.tags[NOTE_TAG]
    assert "magnitude pruning to 50% zeros" in found["small/dense"].data.tags[NOTE_TAG]
    assert found["small/dense"].info.run_name == "small/dense"
    assert found[JOB].data.params["budget.tokens"] == "1000000.0"

    names = {item.path for item in MlflowClient(uri).list_artifacts(found[JOB].info.run_id)}
    assert names == {"spec.yaml", "result.json", "frontier.png"}
    local = journal.directory.parents[1] / "mlflow" / "artifacts" / found[JOB].info.run_id / "artifacts"
    assert json.loads((local / "result.json").read_text())["state"] == "failed"


@pytest.mark.timeout(120)
def test_paused_job_is_scheduled_and_its_continuation_runs_on(journal: Journal, uri: str) -> None:
    train(journal, "small", 1, 10)
    journal.set_state(JobState.PAUSING)
    journal.set_state(JobState.PAUSED)
    assert feed_once(journal, uri) == EXIT_DONE
    assert {run.info.status for run in runs(uri).values()} == {"SCHEDULED"}

    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    journal.set_state(JobState.RUNNING)
    train(journal, "small", 6, 20)
    assert feed_once(journal, uri) == EXIT_DONE
    found = runs(uri)
    assert found[JOB].info.status == "RUNNING"
    assert [step for step, _ in history(uri, found["small"], "train_loss")] == list(range(1, 21))

    journal.set_state(JobState.CANCELLING)
    journal.set_state(JobState.CANCELLED)
    assert feed_once(journal, uri) == EXIT_DONE
    assert {run.info.status for run in runs(uri).values()} == {"KILLED"}


def test_dead_server_ends_the_feeder_within_its_patience(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    started = time.monotonic()
    assert feed_once(journal, uri, patience_seconds=2.0) == EXIT_UNREACHABLE
    assert 2.0 < time.monotonic() - started < 20
    assert f"espalier track {journal.job_id}" in capsys.readouterr().err
    assert Cursor.load(journal.tracking_dir, uri).after == 0


def test_second_feeder_of_a_job_leaves(journal: Journal, uri: str) -> None:
    journal.tracking_dir.mkdir()
    with open(journal.tracking_dir / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "launcher.tracking.process", str(journal.directory), "--uri", uri, "--once"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_BUSY
    assert "another feeder" in ended.stderr


def test_deleted_runs_are_fed_again_from_the_beginning(journal: Journal, uri: str) -> None:
    train(journal, "small", 1, 10)
    assert feed_once(journal, uri) == EXIT_DONE
    first = runs(uri)
    client = MlflowClient(uri)
    for run in first.values():
        client.delete_run(run.info.run_id)
    train(journal, "small", 11, 20)
    assert feed_once(journal, uri) == EXIT_DONE
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    again = {run.data.tags.get(RUN_TAG, JOB): run for run in client.search_runs([experiment.experiment_id])}
    assert set(again) == {JOB, "small"}
    assert [step for step, _ in history(uri, again["small"], "train_loss")] == list(range(1, 21))


def test_repeated_steps_are_left_out_and_a_diverged_loss_is_kept() -> None:
    translation = Translation({"small:train": 2}, 0.0)
    steps = [{"step": 2, "loss": 1.0, "time": 98.0}, {"step": 3, "loss": "nan", "time": 99.5}]
    translation.add({"kind": "train.step", "number": 9, "time": 100.0, "candidate": "small", "steps": steps})
    points = [point for point in translation.changes["small"].metrics if point.key == "train_loss"]
    assert [(point.step, point.milliseconds) for point in points] == [(3, 99_500)]
    assert math.isnan(points[0].value)
    assert translation.last_steps == {"small:train": 3}


def test_steps_have_the_time_of_the_rank_and_not_of_the_event_that_brings_them() -> None:
    translation = Translation({}, 0.0)
    steps = [{"step": step, "loss": 1.0, "time": 90.0 + step} for step in (1, 2, 3)]
    translation.add({"kind": "train.step", "number": 1, "time": 100.0, "candidate": "small", "steps": steps})
    times = [point.milliseconds for point in translation.changes["small"].metrics if point.key == "train_loss"]
    assert times == [91_000, 92_000, 93_000]


def test_what_is_burnt_is_drawn_against_training_steps_and_what_nodes_report_against_seconds() -> None:
    """A restart goes back in steps, but what was burnt stays burnt: it shows as a rise at the step that was reached."""
    translation = Translation({}, 1000.0)
    beats = [(1010.0, 30, 36.0), (1020.0, 60, 72.0), (1035.0, 40, 108.0), (1045.0, 70, 144.0)]
    for number, (time_, step, seconds) in enumerate(beats):
        fields = {"candidate": "small", "step": step, "device_seconds": seconds}
        translation.add({"kind": "heartbeat", "number": number, "time": time_, **fields})
        system = {"candidate": None, "node": "n1", "system": {"cpu_percent": 50.0}}
        translation.add({"kind": "heartbeat", "number": number, "time": time_, **system})
    burnt = [(point.step, point.value) for point in translation.changes["small"].metrics]
    assert burnt == [(30, 0.01), (60, 0.02), (60, 0.03), (70, 0.04)]
    assert [point.step for point in translation.changes[JOB].metrics] == [10, 20, 35, 45]


def test_flatten_keeps_names_dotted_and_numbers_apart() -> None:
    tree = {"a": {"b": 1, "c": None, "d": [True, "x"]}, "e": 2.5}
    assert flatten(tree) == {"a.b": "1", "a.d.0": "True", "a.d.1": "x", "e": "2.5"}
    assert flatten(tree, numbers=True) == {"a.b": 1.0, "e": 2.5}


def test_perplexity_of_a_hopeless_loss_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isinf(perplexity(1e6))


def test_summary_lists_the_frontier_by_size() -> None:
    quality = {"metric": "perplexity", "value": 7.0, "higher_is_better": False}
    shared = {"candidate": "c", "quality": quality, "bits_per_parameter": 8.0, "sparsity": 0.5}
    variants = [
        {**shared, "name": f"c/{name}", "bytes": size, "on_frontier": on_frontier}
        for name, size, on_frontier in (("big", 900, True), ("lost", 500, False), ("tiny", 100, True))
    ]
    candidates = [{"name": "c", "parameters": 5000, "layout": {"tensor": 2, "engine": "lean"}, "steps": 7}]
    text = summary("job", "succeeded", {"candidates": candidates, "variants": variants})
    assert "3 variants, 2 of them on the frontier: the smallest is `c/tiny` (100 B, perplexity 7), the best" in text
    assert text.index("| c/tiny | 100 B | 7 |") < text.index("| c/big | 900 B | 7 |")
    assert "c/lost" not in text
    assert "| c | 5,000 | T2×P1×D1 lean | 7 |" in text


def test_a_store_is_made_once_and_whole_however_many_come_at_once(tmp_path: Path, empty_store: Path) -> None:
    """Also where one that was killed at it has left something. MLflow's own way ends with tables that nobody opens."""
    path = tmp_path / "mlflow" / "mlflow.db"
    path.parent.mkdir()
    path.with_suffix(".draft").write_bytes(empty_store.read_bytes()[:8192])
    path.with_suffix(".copy").write_bytes(b"half")
    script = f"from launcher.tracking.store import make_store; make_store('sqlite:///{path}')"
    makers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [maker.wait(200) for maker in makers] == [0, 0]
    with closing(sqlite3.connect(path)) as made, closing(sqlite3.connect(empty_store)) as usual:
        for question in (
            "SELECT version_num FROM alembic_version",
            "SELECT type, name FROM sqlite_master ORDER BY name",
        ):
            assert made.execute(question).fetchall() == usual.execute(question).fetchall()
    assert {one.name for one in path.parent.iterdir()} == {"mlflow.db", "mlflow.lock"}
    before = path.read_bytes()
    make_store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_feeder_does_not_outlive_a_parent_that_died_before_it_could_look(journal: Journal, uri: str) -> None:
    feeder = [sys.executable, "-m", "launcher.tracking.process", str(journal.directory), "--uri", uri]
    process = subprocess.Popen([*feeder, "--parent", "1"])
    try:
        assert process.wait(200) == EXIT_DONE
    finally:
        process.kill()
