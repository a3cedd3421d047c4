"""The status page in a real browser, while a job runs and behind it; pictures for the docs on demand."""

import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from tests.finished import RUN_SECONDS
from tests.services.conftest import Done

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


def visit(browser: str, folder: Path, url: str, *options: str) -> str:
    """What a headless browser says of a page, its scripts run for a while."""
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", *options, url]
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
