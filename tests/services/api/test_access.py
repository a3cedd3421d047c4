"""Who may do what to whose jobs; and what nobody may read."""

import base64
import json
import os
import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from services.store.jobs import Filter
from services.store.keys import ROLES, Role
from tests.services.api.conftest import Api, bearer

ANYBODY, READER, SUBMITTER, ADMIN = "anybody", *ROLES

ROUTES: list[tuple[str, str, str]] = [
    ("GET", "/healthz", ANYBODY),
    ("GET", "/readyz", ANYBODY),
    ("GET", "/metrics", READER),
    ("GET", "/v1/presets", READER),
    ("GET", "/v1/jobs", READER),
    ("POST", "/v1/plan", READER),
    ("POST", "/v1/jobs", SUBMITTER),
    ("GET", "/v1/jobs/{job}", READER),
    ("POST", "/v1/jobs/{job}/pause", SUBMITTER),
    ("POST", "/v1/jobs/{job}/resume", SUBMITTER),
    ("GET", "/v1/jobs/{job}/events", READER),
    ("GET", "/v1/jobs/{job}/logs", READER),
    ("GET", "/v1/jobs/{job}/logs/coordinator", READER),
    ("GET", "/v1/jobs/{job}/result", READER),
    ("GET", "/v1/jobs/{job}/frontier", READER),
    ("GET", "/v1/jobs/{job}/frontier.png", READER),
    ("GET", "/v1/jobs/{job}/frontier.html", READER),
    ("GET", "/v1/jobs/{job}/variants", READER),
    ("GET", "/v1/jobs/{job}/variants/small/dense", READER),
    ("GET", "/v1/jobs/{job}/variants/small/dense/files/compact/x", READER),
    ("GET", "/v1/jobs/{job}/metrics", READER),
    ("GET", "/v1/jobs/{job}/metrics/loss", READER),
    ("GET", "/v1/jobs/{job}/mlflow", READER),
    ("DELETE", "/v1/jobs/{job}", SUBMITTER),
    ("POST", "/v1/jobs/{job}/cancel", SUBMITTER),
]
"""Every route, and the least role that it needs."""


@pytest.fixture
def keys(api: Api) -> dict[tuple[str, str], str]:
    """A key for each owner and role."""
    made = {}
    for owner in ("anna", "berta"):
        for role in ROLES:
            made[owner, role] = api.service.keys.create(f"{owner} {role}", owner, role)[1]
    return made


def test_the_table_has_every_route(api: Api) -> None:
    document = api.app.openapi()
    documented = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    names = {"{job_id}": "{job}", "{name}": "x", "{candidate}/{recipe}": "small/dense", "{file}": "compact/x"}
    tabled = set()
    for method, path in documented:
        for name, value in names.items():
            path = path.replace(name, value)
        tabled.add((method, path.replace("logs/x", "logs/coordinator").replace("metrics/x", "metrics/loss")))
    assert tabled == {(method, path) for method, path, _ in ROUTES}


@pytest.mark.parametrize(("method", "path", "least"), ROUTES, ids=[f"{method} {path}" for method, path, _ in ROUTES])
def test_role_route_owner(api: Api, keys: dict[tuple[str, str], str], method: str, path: str, least: str) -> None:
    job = api.submit(keys["anna", "submitter"])
    target = path.format(job=job)
    # Without a key, with a wrong one, and with a right one as a password, which opens what can be read.
    basic = base64.b64encode(f"x:{keys['anna', 'admin']}".encode()).decode()
    as_password = {"Authorization": f"Basic {basic}"}
    if method == "GET":
        assert api.http.get(target, headers=as_password).status_code != 401
        as_password = {"Authorization": "Basic eDp4"}
    for headers in ({}, bearer("esp_000000000000_wrong"), as_password):
        answer = api.http.request(method, target, headers=headers)
        if least == ANYBODY:
            assert answer.status_code in (200, 503)
        else:
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert job not in answer.text.replace(target, "")
    if least == ANYBODY:
        return
    for role in ROLES:
        mine = api.http.request(method, target, headers=bearer(keys["anna", role]))
        if ROLES.index(role) < ROLES.index(_role(least)):
            assert mine.status_code == 403
        else:
            assert mine.status_code not in (401, 403), mine.text
        assert mine.status_code < 500
        theirs = api.http.request(method, target, headers=bearer(keys["berta", role]))
        if "{job}" in path and role != "admin":
            # Not even that there is such a job: the answer is that of one that never was.
            assert theirs.status_code == (404 if theirs.status_code != 403 else 403)
            never = api.http.request(
                method, target.replace(job, "tiny-000000000000"), headers=bearer(keys["berta", role])
            )
            assert never.text.replace("tiny-000000000000", job) == theirs.text
        elif path == "/v1/jobs" and method == "GET" and role != "admin":
            assert theirs.json()["jobs"] == []


def _role(name: str) -> Role:
    return next(role for role in ROLES if role == name)


def test_lists_hold_ones_own_jobs_and_for_admins_all(api: Api, keys: dict[tuple[str, str], str]) -> None:
    mine, hers = api.submit(keys["anna", "submitter"]), api.submit(keys["berta", "submitter"])

    def listed(who: str, role: Role, **params: str) -> list[str]:
        answer = api.http.get("/v1/jobs", params=params, headers=bearer(keys[who, role]))
        return [job["id"] for job in answer.json()["jobs"]]

    assert listed("anna", "reader") == [mine]
    assert listed("anna", "reader", owner="berta") == []
    assert listed("anna", "admin") == [hers, mine]
    assert listed("anna", "admin", owner="berta") == [hers]


def test_without_keys_only_this_machine_is_served(api: Api, tmp_path: Path) -> None:
    assert api.http.get("/v1/jobs").status_code == 200
    strange = [
        {"Host": "evil.example"},
        {"Origin": "http://evil.example"},
        {"X-Forwarded-For": "10.0.0.1"},
        {"Forwarded": "for=10.0.0.1"},
    ]
    for headers in strange:
        assert api.http.get("/v1/jobs", headers=headers).status_code == 403, headers
    assert api.http.get("/v1/jobs", headers={"Origin": "http://localhost:1"}).status_code == 200
    anywhere = Api(tmp_path / "open", host="0.0.0.0")
    assert anywhere.http.get("/v1/jobs").status_code == 403
    # As soon as there was a key, nobody comes in without one, also once it is revoked.
    row, _ = api.service.keys.create("k", "anna", "reader")
    api.service.keys.revoke(row.id)
    assert api.http.get("/v1/jobs").status_code == 401


def test_priorities_are_bounded_by_the_key(api: Api) -> None:
    _, key = api.service.keys.create("k", "anna", "submitter", highest_priority=2)
    post = {"json": api.spec, "headers": bearer(key)}
    assert api.http.post("/v1/jobs?priority=2", **post).status_code == 202
    refused = api.http.post("/v1/jobs?priority=3", **post)
    assert refused.json()["errors"] == [
        {"parameter": "priority", "detail": "3: the highest that this key may ask for is 2"}
    ]
    assert api.http.post("/v1/jobs?priority=11", **post).status_code == 422


def test_a_quota_is_said_with_the_time_to_wait(api: Api) -> None:
    _, key = api.service.keys.create("k", "anna", "submitter", queued_jobs=1)
    api.submit(key)
    refused = api.http.post("/v1/jobs", json=api.spec, headers=bearer(key))
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")


@pytest.fixture
def confined(tmp_path: Path) -> Api:
    """Only one folder may be read, whoever asks."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.txt").write_text("secret " * 500)
    api = Api(tmp_path / "home", roots=[tmp_path / "home" / "data"], protocols=["file"])
    os.symlink(tmp_path / "secret", tmp_path / "home" / "data" / "link")
    os.symlink(tmp_path / "secret" / "a.txt", tmp_path / "home" / "data" / "99.txt")
    return api


@pytest.mark.parametrize(
    "path",
    [
        "{secret}/a.txt",
        "{secret}/*.txt",
        "{data}/link/a.txt",
        "{data}/link/*.txt",
        "{data}/*.txt",  # it matches a link that leads out
        "{data}/../../secret/a.txt",
        "{data}/*/../../secret/a.txt",
        "file://{secret}/a.txt",
        "/etc/passwd",
        "/*",
        "relative.txt",
        "~/x",
        "s3://bucket/x",
        "http://127.0.0.1:8700/v1/jobs",
        "file://{data}/00.txt::zip://x",
        "github://org:repo@/x",
    ],
)
def test_paths_outside_the_roots_are_refused(confined: Api, path: str, tmp_path: Path) -> None:
    written = path.format(secret=tmp_path / "secret", data=tmp_path / "home" / "data")
    places = {
        "#/data/train/0": {"data": confined.spec["data"] | {"train": [written]}},
        "#/data/validation/0": {
            "data": confined.spec["data"] | {"train": [str(tmp_path / "home/data/00.txt")], "validation": [written]}
        },
        "#/data/tokenizer/path": {"data": confined.spec["data"] | {"tokenizer": {"kind": "file", "path": written}}},
        "#/candidates/0/source": {"candidates": [{"name": "x", "source": written}]},
    }
    for pointer, changes in places.items():
        answer = confined.http.post("/v1/plan", json=confined.spec | changes)
        assert answer.status_code == 422
        assert pointer in {error["pointer"] for error in answer.json()["errors"]}, answer.text
        assert "secret secret" not in answer.text


def test_paths_inside_the_roots_are_read(confined: Api, tmp_path: Path) -> None:
    os.unlink(tmp_path / "home" / "data" / "99.txt")
    assert confined.http.post("/v1/plan", json=confined.spec).status_code == 200


def test_with_keys_nothing_but_the_home_s_data_is_read_by_default(api: Api, tmp_path: Path) -> None:
    _, key = api.service.keys.create("k", "anna", "admin")
    outside = api.spec | {"data": api.spec["data"] | {"train": ["/etc/hostname"]}}
    assert api.http.post("/v1/plan", json=outside, headers=bearer(key)).status_code == 422
    assert api.http.post("/v1/plan", json=api.spec, headers=bearer(key)).status_code == 200


def test_logs_are_named_by_what_is_there(api: Api) -> None:
    job = api.submit()
    journal = api.journal(job)
    journal.log_path("coordinator").write_text("\n".join(f"line {number}" for number in range(50)))
    journal.log_path("small.e0001-g01.rank0").write_text("rank")
    os.symlink("/etc/passwd", journal.logs_dir / "evil.log")
    listed = api.http.get(f"/v1/jobs/{job}/logs").json()["logs"]
    assert [(log["name"], log["candidate"], log["rank"]) for log in listed] == [
        ("coordinator", None, None),
        ("small.e0001-g01.rank0", "small", 0),
    ]
    tail = api.http.get(f"/v1/jobs/{job}/logs/coordinator", params={"lines": 3})
    assert tail.text == "line 47\nline 48\nline 49\n"
    for name in ("evil", "..%2f..%2fservice", "coordinator.log", "%2e%2e%2fjob.json", "x%00y"):
        assert api.http.get(f"/v1/jobs/{job}/logs/{name}").status_code in (404, 422), name


def test_tokens_of_an_issuer(tmp_path: Path) -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key())) | {"kid": "one", "use": "sig"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [public]}))
    oidc = {"issuer": "https://id.example", "audience": "espalier", "jwks_file": tmp_path / "jwks.json"}
    api = Api(tmp_path / "home", oidc=oidc)
    assert api.http.get("/v1/jobs").status_code == 401

    def status(key: object = private, algorithm: str = "RS256", **changes: object) -> int:
        claims = {"iss": "https://id.example", "aud": "espalier", "sub": "anna", "exp": time.time() + 60}
        token = jwt.encode({**claims, **changes}, key, algorithm, headers={"kid": "one"})
        return api.http.post("/v1/jobs", json=api.spec, headers=bearer(token)).status_code

    assert status() == 403  # readers hand nothing in
    assert status(espalier_role="submitter") == 202
    assert [row.owner for row in api.service.jobs.page(Filter(), 9)] == ["oidc:anna"]
    assert status(exp=time.time() - 60) == 401
    assert status(iss="https://other.example") == 401
    assert status(aud="another") == 401
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert status(key=other) == 401
    assert status(key="x" * 64, algorithm="HS256") == 401
