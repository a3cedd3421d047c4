"""Files as answers: from an object store as from a disk, and nothing of them stays."""

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from parallelism import places
from parallelism.objects import ObjectTree
from services.api.files import send_file
from services.api.problems import install

CONTENT = bytes(range(256)) * 40
ETAG = '"abc"'
ALIKE = ("content-range", "content-length", "content-disposition", "content-type", "etag", "accept-ranges")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """/disk and /store have the same file."""
    disk, copies = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("copies") / "jobs"
    (disk / "file").write_bytes(CONTENT)
    tree = ObjectTree("memory://files-of-the-api")
    tree.put("file", CONTENT)
    places.mirror(copies, tree)
    app = FastAPI()
    install(app, app.routes)

    @app.get("/{where}")
    def file(request: Request, where: str) -> Response:
        path = {"disk": disk, "store": copies}[where] / "file"
        answer = send_file(request, path, len(CONTENT), {"ETag": ETAG}, "model 1.safetensors")
        assert not copies.exists()
        return answer

    return TestClient(app)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file has many."""
    monkeypatch.setattr("services.api.files.PIECE_BYTES", 1000)


@pytest.mark.parametrize(
    ("headers", "status", "expected"),
    [
        ({}, 200, CONTENT),
        ({"Range": "bytes=0-0"}, 206, CONTENT[:1]),
        ({"Range": "bytes=5-2999"}, 206, CONTENT[5:3000]),
        ({"Range": "bytes=9000-"}, 206, CONTENT[9000:]),
        ({"Range": "bytes=9000-99999"}, 206, CONTENT[9000:]),
        ({"Range": "bytes=-7"}, 206, CONTENT[-7:]),
        ({"Range": "bytes=5-9", "If-Range": ETAG}, 206, CONTENT[5:10]),
        ({"Range": "bytes=5-9", "If-Range": '"other"'}, 200, CONTENT),
    ],
)
def test_a_store_answers_as_a_disk_does(
    client: TestClient, headers: dict[str, str], status: int, expected: bytes
) -> None:
    disk, store = (client.get(f"/{where}", headers=headers) for where in ("disk", "store"))
    assert (disk.status_code, store.status_code) == (status, status)
    assert disk.content == store.content == expected
    named = 'attachment; filename="model%201.safetensors"'
    told = {name: store.headers.get(name) for name in ALIKE}
    assert told == {name: disk.headers.get(name) for name in ALIKE} | {"content-disposition": named}


@pytest.mark.parametrize("asked", ["bytes=5-9,20-29", "bytes=-", "bytes=9-5", "lines=1-2", "bytes=a-b"])
def test_what_is_not_understood_is_answered_with_the_whole(client: TestClient, asked: str) -> None:
    answer = client.get("/store", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize("where", ["disk", "store"])
def test_a_range_behind_the_end_is_refused(client: TestClient, where: str) -> None:
    answer = client.get(f"/{where}", headers={"Range": f"bytes={len(CONTENT)}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
