"""The status page and MLflow's in a real browser, while a job runs and behind it; pictures for the docs on demand."""

import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
from mlflow import MlflowClient

from launcher.states import JobState
from launcher.tracking.feed import JOB_TAG, RUN_TAG
from services.settings import RESOLVED, Settings
from tests.finished import RUN_SECONDS
from tests.services.conftest import Done
from tests.services.running import Running, text_files, tiny_job, until, up

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PICTURES = os.environ.get("ESPALIER_PICTURES")
"""A folder that keeps the pictures: how those of the docs are made."""

pytestmark = pytest.mark.timeout(2 * RUN_SECONDS)


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


def visit(browser: str, folder: Path, url: str, *options: str, milliseconds: int = 3000) -> str:
    """What a headless browser says of a page, its scripts run for a while by the browser's own clock."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={milliseconds}", *options, url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def rows_of(png: bytes) -> list[bytes]:
    """The lines of pixels of a picture, as they are stored; equal lines of one colour are short when compressed."""
    assert png.startswith(b"\x89PNG")
    data, place = b"", 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += length + 12
    height = struct.unpack(">I", png[20:24])[0]
    pixels = zlib.decompress(data)
    size = len(pixels) // height
    return [pixels[row * size : (row + 1) * size] for row in range(height)]


@pytest.mark.parametrize(("name", "path"), [("status-jobs", "/"), ("status-job", "/jobs/{job}")])
def test_page_is_drawn(browser: str, done: Done, tmp_path: Path, name: str, path: str) -> None:
    target = Path(PICTURES) / f"{name}.png" if PICTURES else tmp_path / f"{name}.png"
    url = done.service.url + path.format(job=done.job)
    visit(browser, tmp_path, url, f"--screenshot={target}", "--window-size=1200,1150")
    assert len(set(rows_of(target.read_bytes()))) > 30  # text and lines, not one empty colour


def test_scripts_draw_the_frontier_and_say_what_a_point_is(browser: str, done: Done, tmp_path: Path) -> None:
    for path in (f"/jobs/{done.job}", f"/v1/jobs/{done.job}/frontier.html"):
        page = visit(browser, tmp_path, done.service.url + path, "--dump-dom")
        circles = re.findall(r"<circle.*?<title>(.*?)</title>", page)
        assert sorted(circles) == ["small/dense", "small/magnitude-s50"], path
        assert "● small" in page


def test_page_follows_the_job_without_being_loaded_again(browser: str, done: Done, tmp_path: Path) -> None:
    """The list asks for itself every five seconds; in the browser's own time that is soon."""
    page = visit(browser, tmp_path, f"{done.service.url}/jobs/{done.job}", "--dump-dom")
    assert re.search(r'<span class="state succeeded">', page)
    assert page.count("<polyline") >= 3  # loss, validation loss, speed


def test_frontier_page_stands_alone(browser: str, done: Done, tmp_path: Path) -> None:
    with done.service.client() as client:
        kept = tmp_path / "frontier.html"
        kept.write_bytes(client.frontier_html(done.job))
        assert client.frontier_png(done.job).startswith(b"\x89PNG")
    page = visit(browser, tmp_path, kept.as_uri(), "--dump-dom")
    assert page.count("<circle") == 2


@dataclass(frozen=True)
class Live:
    """A service with its MLflow, and a job that runs until somebody cancels it."""

    service: Running
    job: str
    mlflow: str
    runs: dict[str, str]
    """Name of a run, as MLflow is told, → its id; the job's own has none."""
    experiment: str

    def page(self, run: str) -> str:
        """MLflow's page of a run."""
        return f"{self.mlflow}/#/experiments/{self.experiment}/runs/{self.runs[run]}?workflowType=machine_learning"

    def steps(self, metric: str = "tokens") -> list[int]:
        """What the server says of the candidate's steps."""
        history = MlflowClient(self.mlflow).get_metric_history(self.runs["small"], metric)
        return [point.step for point in history]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    spec = tiny_job(text_files(folder / "text"), budget={"tokens": 3e6})
    with up(folder / "home") as service, service.client() as client:
        mlflow = Settings.read(service.home / RESOLVED).mlflow_url
        assert mlflow is not None
        job = client.submit(spec).id
        until(lambda: client.job(job).candidates and client.job(job).candidates[0].step > 50, RUN_SECONDS)
        until(lambda: answers(mlflow))
        tracking = MlflowClient(mlflow)
        runs: dict[str, str] = {}

        def told() -> bool:
            for experiment in tracking.search_experiments():
                for run in tracking.search_runs([experiment.experiment_id], f"tags.`{JOB_TAG}` = '{job}'"):
                    runs[run.data.tags.get(RUN_TAG, "")] = run.info.run_id
            return "small" in runs and len(tracking.get_metric_history(runs["small"], "tokens")) > 50

        until(told)
        yield Live(service, job, mlflow, runs, tracking.get_run(runs[""]).info.experiment_id)
        client.cancel(job)
        assert client.wait(job, RUN_SECONDS).state is JobState.CANCELLED, client.log(job)


def answers(mlflow: str) -> bool:
    try:
        return httpx2.get(f"{mlflow}/health", timeout=5).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_job_is_seen_while_it_runs(browser: str, live: Live, tmp_path: Path) -> None:
    target = Path(PICTURES or tmp_path) / "status-running.png"
    url = f"{live.service.url}/jobs/{live.job}"
    visit(browser, tmp_path, url, f"--screenshot={target}", "--window-size=1200,1000")
    assert len(set(rows_of(target.read_bytes()))) > 30
    page = visit(browser, tmp_path, url, "--dump-dom")
    assert re.search(r'<span class="state running">', page)
    assert page.count("<polyline") >= 3
    assert "No variants have been measured yet." in page


def test_its_link_leads_to_its_run_in_mlflow_which_grows(browser: str, live: Live, tmp_path: Path) -> None:
    asked = httpx2.get(f"{live.service.url}/v1/jobs/{live.job}/mlflow")
    assert (asked.status_code, asked.headers["location"]) == (307, live.page(""))
    target = Path(PICTURES or tmp_path) / "mlflow-running.png"
    visit(
        browser,
        tmp_path,
        live.page("small"),
        f"--screenshot={target}",
        "--window-size=1400,1000",
        milliseconds=15_000,
    )
    assert len(set(rows_of(target.read_bytes()))) > 100
    page = visit(browser, tmp_path, live.page(""), "--dump-dom", milliseconds=15_000)
    assert live.job in page
    before = live.steps()
    assert before == list(range(1, len(before) + 1))
    until(lambda: len(live.steps()) > len(before))


def test_mlflow_is_started_again_on_its_port_whatever_of_it_was_killed(live: Live) -> None:
    """The keeper beside it, too: what is left of the server then does not hold the port."""

    def keeper() -> psutil.Process:
        children = psutil.Process(live.service.process.pid).children()
        (found,) = [child for child in children if child.cmdline()[2:3] == ["services.keeper"]]
        return found

    first = keeper()
    parts = [first, *first.children(recursive=True)]
    assert len(parts) > 2
    before = live.steps()[-1]
    first.kill()
    _, alive = psutil.wait_procs(parts, timeout=30)
    assert alive == []
    until(lambda: answers(live.mlflow))
    steps = live.steps()
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= before
    with live.service.client() as client:
        assert client.job(live.job).attempt == 1
