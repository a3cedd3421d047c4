"""Handing in, listing, reading, asking: status codes, problem documents, versions, cursors."""

import json
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from launcher.journal import Journal
from launcher.spec import JobSpec, parse_spec
from launcher.states import JobState
from parallelism.objects import StoreAwayError
from services.client import calls
from services.settings import Settings
from services.store.jobs import Change, Observation
from services.store.leases import DISPATCHER
from tests.services.api.conftest import Api
from tests.services.running import text_files, tiny_job

PROBLEM = "application/problem+json"


def test_a_job_is_handed_in_as_json_and_as_yaml(api: Api) -> None:
    for kind, text in (("application/json", json.dumps(api.spec)), ("application/yaml", yaml.safe_dump(api.spec))):
        answer = api.http.post("/v1/jobs", content=text, headers={"Content-Type": kind})
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["location"] == job["links"]["self"] == f"http://127.0.0.1:8700/v1/jobs/{job['id']}"
        assert (job["state"], job["desired"], job["attempt"]) == ("submitted", "run", 0)
        assert job["links"]["mlflow"].endswith("/mlflow")
        read = api.http.get(answer.headers["location"])
        assert read.json()["spec"] == JobSpec.model_validate(api.spec).model_dump(mode="json")
        assert read.json()["plan"]["candidates"][0]["name"] == "small"


def test_the_same_request_fifty_times_at_once_is_one_job(api: Api) -> None:
    def post(_: int) -> Any:
        return api.http.post("/v1/jobs", json=api.spec, headers={"Idempotency-Key": "once"})

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(post, range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(api.http.get("/v1/jobs").json()["jobs"]) == 1
    other = api.http.post("/v1/jobs", json=api.spec | {"seed": 7}, headers={"Idempotency-Key": "once"})
    assert other.status_code == 422
    assert "was used for another request" in other.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "pointer", "said"),
    [
        ({"budgte": 1}, "#/budgte", "did you mean 'budget'?"),
        ({"seed": "x"}, "#/seed", "should be a valid integer"),
        ({"data": {"train": ["/nowhere/*.txt"]}}, "#/data/train/0", "matches no file"),
        ({"candidates": []}, "#/candidates", "at least 1"),
        (
            {"candidates": [{"name": "odd", "model": {"family": "gpt", "layers": 2, "hidden": 64, "heads": 5}}]},
            "#/candidates/0/model",
            "",
        ),
        ({"execution": {"backend": "moon"}}, "#/execution/backend", "unknown back-end"),
        ({"execution": {"profile": "root"}}, "#/execution/profile", "unknown profile"),
    ],
)
def test_a_job_that_cannot_run_is_refused_by_field(api: Api, changes: dict[str, Any], pointer: str, said: str) -> None:
    for path in ("/v1/jobs", "/v1/plan"):
        answer = api.http.post(path, json=api.spec | changes)
        assert (answer.status_code, answer.headers["content-type"]) == (422, PROBLEM)
        problem = answer.json()
        assert (problem["status"], problem["title"], problem["instance"]) == (422, HTTPStatus(422).phrase, path)
        errors = {error["pointer"]: error["detail"] for error in problem["errors"]}
        assert any(found.startswith(pointer) and said in detail for found, detail in errors.items()), errors
    assert api.http.get("/v1/jobs").json()["jobs"] == []


BAD_BODIES = [
    (b"{", "application/json", 400, "not valid JSON"),
    (b'{"name": 1, "name": 2}', "application/json", 400, "stands twice"),
    (b'{"seed": NaN}', "application/json", 400, "NaN is not a number"),
    (b"[" * 5000 + b"]" * 5000, "application/json", 400, ""),
    (b"[" * 60 + b"]" * 60, "application/json", 400, "nested deeper"),
    (b"\xff\xfe", "application/json", 400, "not UTF-8"),
    (b"[]", "application/json", 422, "1 problem"),
    (b"null", "application/json", 422, "1 problem"),
    (b"a: &x [1]\nb: *x", "application/yaml", 400, "anchors and aliases"),
    (b"a: [1\nb: 2", "application/yaml", 422, "1 problem"),
    (b"!!python/object/apply:os.system ['true']", "application/yaml", 422, "1 problem"),
    (b"[" * 5000, "application/yaml", 400, "nested deeper"),
    (b"a: 1\n" + b"# long\n" * 30_000, "application/yaml", 413, "send a larger one as JSON"),
    (b"name: x", "text/plain", 415, "application/json"),
    (b"x" * 2_000_000, "application/json", 413, "larger than 1048576 bytes"),
]


@pytest.mark.parametrize(("body", "kind", "status", "said"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bodies_that_are_none(api: Api, body: bytes, kind: str, status: int, said: str) -> None:
    answer = api.http.post("/v1/jobs", content=body, headers={"Content-Type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM)
    assert said in answer.json()["detail"]


def test_a_body_without_a_length_is_bounded_too(api: Api) -> None:
    def pieces() -> Any:
        for _ in range(200):
            yield b" " * 10_000

    answer = api.http.post("/v1/jobs", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_versions(api: Api) -> None:
    job = f"/v1/jobs/{api.submit()}"
    first = api.http.get(job)
    assert api.http.get(job, headers={"If-None-Match": first.headers["etag"]}).status_code == 304
    paused = api.http.post(f"{job}/pause", headers={"If-Match": first.headers["etag"]})
    assert (paused.status_code, paused.json()["desired"]) == (202, "pause")
    assert api.http.post(f"{job}/resume", headers={"If-Match": first.headers["etag"]}).status_code == 412
    assert api.http.get(job, headers={"If-None-Match": first.headers["etag"]}).status_code == 200
    assert api.http.post(f"{job}/resume", headers={"If-Match": paused.headers["etag"]}).json()["desired"] == "run"


def test_list_in_parts_with_filters(api: Api) -> None:
    made = [api.submit(name=f"job{number % 2}") for number in range(5)]
    found, cursor = [], None
    for _ in range(3):
        page = api.http.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        found += [job["id"] for job in page["jobs"]]
        cursor = page["next"]
    assert found == made[::-1]
    assert cursor is None
    assert len(api.http.get("/v1/jobs", params={"name": "job1"}).json()["jobs"]) == 2
    assert api.http.get("/v1/jobs", params={"state": ["running", "failed"]}).json()["jobs"] == []
    for params in ({"limit": 0}, {"limit": 201}, {"state": "odd"}, {"cursor": "x"}, {"cursor": "YmVmb3JlOi0x"}):
        refused = api.http.get("/v1/jobs", params=params)
        assert refused.status_code == 422, params
        assert refused.json()["errors"][0]["parameter"].startswith(next(iter(params)))


def test_what_is_not_there_and_not_allowed_is_a_problem_document(api: Api) -> None:
    for method, path, status in (
        ("GET", "/v1/jobs/none", 404),
        ("POST", "/v1/jobs/none/cancel", 404),
        ("GET", "/v1/jobs/..%2f..%2fetc", 404),
        ("GET", "/v1/jobs/UPPER", 422),
        ("GET", "/v1/nothing", 404),
        ("PUT", "/v1/jobs", 405),
        ("GET", f"/v1/jobs/{'x' * 200}", 422),
    ):
        answer = api.http.request(method, path)
        assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), path


def test_a_wrong_method_is_told_the_right_ones(api: Api) -> None:
    assert api.http.put("/v1/jobs").headers["allow"] == "GET, POST"
    assert api.http.put("/v1/jobs/none").headers["allow"] == "DELETE, GET"


def test_states_decide_what_may_be_asked(api: Api) -> None:
    job = api.submit()
    assert api.http.delete(f"/v1/jobs/{job}").status_code == 409
    lease = api.service.leases.take(DISPATCHER, "test", 60.0)
    assert lease is not None
    api.service.jobs.observe(job, Observation(3, 1, [Change(1, 1.0, JobState.CANCELLED)]), lease)
    for what in ("pause", "resume", "cancel"):
        refused = api.http.post(f"/v1/jobs/{job}/{what}")
        assert refused.status_code == 409
        assert f"a job that is cancelled cannot be asked to {what}" in refused.json()["detail"]
    journal = api.journal(job)
    assert api.http.delete(f"/v1/jobs/{job}").status_code == 204
    assert api.http.get(f"/v1/jobs/{job}").status_code == 404
    assert journal.document("forgotten") is not None


def test_a_job_whose_journal_cannot_be_told_is_not_forgotten(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    job = api.submit()
    api.journal(job)
    lease = api.service.leases.take(DISPATCHER, "test", 60.0)
    assert lease is not None
    api.service.jobs.observe(job, Observation(3, 1, [Change(1, 1.0, JobState.CANCELLED)]), lease)

    def away(*_: object) -> None:
        raise StoreAwayError("the object store does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_document", away)
        assert api.http.delete(f"/v1/jobs/{job}").status_code == 503
    assert api.http.get(f"/v1/jobs/{job}").status_code == 200
    assert api.http.delete(f"/v1/jobs/{job}").status_code == 204


def test_resume_at_another_layout_is_checked_and_kept(api: Api) -> None:
    job = api.submit(execution={"devices": 2})
    good = api.http.post(f"/v1/jobs/{job}/resume", json={"layouts": {"small": {"tensor": 2}}})
    assert good.status_code == 202
    kept = api.http.get(f"/v1/jobs/{job}").json()
    assert kept["layouts"]["small"]["tensor"] == 2
    assert kept["plan"]["candidates"][0]["layout"]["tensor"] == 2
    assert kept["spec"]["candidates"][0]["layout"]["tensor"] == 1  # what was handed in stays what it was
    for layouts, pointer in (
        ({"none": {}}, "#/layouts/none"),
        ({"small": {"tensor": 0}}, "#/layouts/small/tensor"),
        ({"small": {"tensor": 3}}, "#/candidates/0/layout/tensor"),
        ({"small": {"odd": 3}}, "#/layouts/small/odd"),
    ):
        refused = api.http.post(f"/v1/jobs/{job}/resume", json={"layouts": layouts})
        assert refused.status_code == 422
        assert any(error["pointer"].startswith(pointer) for error in refused.json()["errors"]), refused.text
    assert api.http.post(f"/v1/jobs/{job}/resume", json={"layout": {}}).status_code == 422


def test_a_full_disk_accepts_nothing(tmp_path: Path) -> None:
    api = Api(tmp_path / "home", disk_reserve_bytes=2**60)
    answer = api.http.post("/v1/jobs", json=api.spec)
    assert answer.status_code == 507
    assert "full" in answer.json()["detail"]


def test_the_operator_says_where_jobs_run(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "profiles.yaml").write_text("default: {ray: {address: 'http://127.0.0.1:8265'}}")
    api = Api(tmp_path / "home", backends=["ray", "local"])
    silent, local = api.submit(), api.submit(execution={"backend": "local", "devices": 1})
    found = {job: api.http.get(f"/v1/jobs/{job}").json()["spec"]["execution"]["backend"] for job in (silent, local)}
    assert found == {silent: "ray", local: "local"}
    refused = api.http.post("/v1/jobs", json={**api.spec, "execution": {"backend": "slurm"}})
    assert refused.status_code == 422
    (error,) = refused.json()["errors"]
    assert error["pointer"] == "#/execution/backend"
    assert "this service does not offer it; use ray or local, or leave it out" in error["detail"]
    with pytest.raises(ValidationError, match="cloud: available are"):
        Settings(home=tmp_path, backends=["cloud"])


def test_a_client_leaves_open_what_its_job_does_not_say(tmp_path: Path) -> None:
    document = tiny_job(text_files(tmp_path))
    assert calls.submit(parse_spec(document), None, 0).body == document
