"""Pages: everything is escaped, only our own scripts run, charts have the numbers they were given."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from compression.recipe import Recipe
from compression.results import Score, Variant
from services.web.charts import BOTTOM, TOP, chart
from services.web.frontier import frontier_page
from services.web.pages import job_page, jobs_page
from services.web.render import Page, embedded
from tests.services.api.conftest import Api, bearer

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


def document(**changes: Any) -> dict[str, Any]:
    budget = {"unit": "tokens", "limit": 100.0, "spent": 25.0, "left": 75.0}
    candidate = {
        "name": "small",
        "status": "training",
        "fraction": 0.25,
        "step": 5,
        "loss": 1.5,
        "validation_loss": None,
        "tokens_per_second": 1234.0,
        "restarts": 0,
        "budget": budget,
    }
    known = {
        "id": "tiny-1",
        "owner": "anna",
        "state": "running",
        "stage": "train",
        "waiting": None,
        "variants": {"measured": 0, "expected": 2},
        "progress": 0.175,
        "created": 0.0,
        "attempt": 1,
        "seconds_left": 75.0,
        "error": None,
        "candidates": [candidate],
    }
    return known | changes


def variant(name: str, size: int, value: float, on: bool) -> Variant:
    return Variant(
        name=f"small/{name}",
        candidate="small",
        recipe=Recipe(),
        quality=Score(value=value),
        metrics={},
        bytes=size,
        bits_per_parameter=16.0,
        sparsity=0.0,
        on_frontier=on,
        path="/x",
    )


def scripts(page: Page) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)


@pytest.mark.parametrize("field", ["error", "waiting", "stage"])
def test_what_jobs_say_is_text(field: str) -> None:
    for page in (
        job_page(document(**{field: EVIL}), {}, []),
        jobs_page([document(**{field: EVIL})], {}, None, None, True),
    ):
        assert "<script>alert" not in page.html
        assert "<img" not in page.html


def test_data_in_a_page_cannot_end_its_script() -> None:
    assert "<" not in embedded({"name": EVIL})
    page = frontier_page(EVIL, [variant("a", 100, 9.0, True)])
    assert page.html.count("<script") == 2
    assert "<img" not in page.html


def test_only_the_scripts_of_the_page_may_run() -> None:
    for page in (job_page(document(), {}, []), frontier_page("x", [variant("a", 100, 9.0, True)])):
        found = scripts(page)
        assert found
        for script in found:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in page.policy
        assert "unsafe-inline'" not in page.policy.partition("script-src")[2].partition(";")[0]
        assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.html)


def test_job_page_has_the_figures() -> None:
    page = job_page(document(), {"loss": {"small": {1: (4.0, 0.0), 2: (2.0, 1.0)}}}, []).html
    for text in ("tiny-1", "running", "25%", "75 tokens", "1.500", "1,234", "about 1:15", 'data-live="3"'):
        assert text in page, text
    assert 'data-live="0"' in job_page(document(state="succeeded"), {}, []).html


def test_lines_of_a_chart_are_where_their_values_are() -> None:
    drawn = chart("loss", {"small": {1: (4.0, 0.0), 2: (2.0, 1.0), 3: (float("nan"), 2.0)}, "large": {3: (3.0, 0.0)}})
    assert drawn is not None
    assert (drawn.first, drawn.last) == (1, 3)
    lines = {line.name: [tuple(map(float, point.split(","))) for point in line.points.split()] for line in drawn.lines}
    (x1, y1), (x2, y2) = lines["small"]
    assert (x1, x2) == (52.0, 231.0)
    assert TOP < y1 < y2 < BOTTOM
    assert lines["large"] == [(410.0, pytest.approx((y1 + y2) / 2, abs=0.1))]
    assert chart("loss", {"small": {1: (float("nan"), 0.0)}}) is None


def test_pages_need_a_key_once_there_are_some_and_show_ones_own_jobs(tmp_path: Path) -> None:
    api = Api(tmp_path / "home")
    mine = api.submit()
    assert mine in api.http.get("/").text
    _, key = api.service.keys.create("k", "anna", "submitter")
    asked = api.http.get("/")
    assert asked.status_code == 401
    assert asked.headers["www-authenticate"].startswith("Basic")
    hers = api.submit(key)
    page = api.http.get("/", auth=("", key))
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert hers in page.text
    assert mine not in page.text
    assert api.http.get(f"/jobs/{hers}", auth=("", key)).status_code == 200
    assert api.http.get(f"/jobs/{mine}", auth=("", key)).status_code == 404
    # A password, which a browser sends by itself, changes nothing.
    assert api.http.post(f"/v1/jobs/{hers}/cancel", auth=("", key)).status_code == 401
    assert api.http.post(f"/v1/jobs/{hers}/cancel", headers=bearer(key)).status_code == 202
