"""Both clients against a real server, with a coordinator that needs no cluster; servers that go away and come back."""

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.states import JobState
from services.api.documents import FileDocument
from services.client import AsyncClient, Client, ServiceError, ServiceUnreachable
from services.client.calls import EventParser, StreamEnded
from services.client.files import Download
from services.dispatcher.deliveries import signature
from services.store.webhooks import Webhooks
from tests.services.running import until
from tests.services.small import Small


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    made = Small(tmp_path)
    with made.dispatching():
        yield made
    made.database.close()


def test_every_event_once_and_in_order_however_often_the_server_goes_away(small: Small) -> None:
    with small.serving(), Client(small.url) as client:
        job = client.submit(small.spec).id

    def watch() -> list[int]:
        with Client(small.url) as client:
            return [event["number"] for event in client.watch(job) if event is not None]

    with ThreadPoolExecutor(1) as threads:
        watching = threads.submit(watch)
        while not watching.done():  # the job goes on all the while
            with small.serving():
                wait([watching], timeout=1.0)
    seen = watching.result()
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 60


def test_a_client_that_comes_anew_every_second_misses_nothing(small: Small) -> None:
    found: list[int] = []
    with small.serving(), Client(small.url) as client:
        job = client.submit(small.spec).id
        over = False
        while not over:
            until_time = time.monotonic() + 1.0
            over = True
            for event in client.watch(job, after=found[-1] if found else 0):
                if event is not None:
                    found.append(event["number"])
                if time.monotonic() > until_time:
                    over = False
                    break
        assert found == [event["number"] for event in client.events(job)]


def test_the_asynchronous_client_does_the_same(small: Small) -> None:
    async def work() -> None:
        async with AsyncClient(small.url) as client:
            assert (await client.ready()).status == "ok"
            plan = await client.plan(small.spec)
            assert plan["candidates"][0]["name"] == "small"
            job = await client.submit(small.spec, idempotency_key="k")
            assert (await client.submit(small.spec, idempotency_key="k")).id == job.id
            numbers = [event["number"] async for event in client.watch(job.id) if event is not None]
            assert numbers == list(range(1, len(numbers) + 1))
            done = await client.wait(job.id, 30)
            assert done.state is JobState.SUCCEEDED
            assert [one.id async for one in client.jobs(states=["succeeded"])] == [job.id]
            assert "loss" in await client.metrics(job.id)
            (series,) = (await client.metric(job.id, "loss", points=10)).series
            assert (series.steps[0], series.steps[-1], len(series.steps)) == (1, 60, 10)
            assert series.values[-1] == pytest.approx(1 / 60)
            assert "step 60 of epoch 1" in await client.log(job.id)
            followed = "".join([piece async for piece in client.follow_log(job.id, lines=2)])
            assert followed == "step 59 of epoch 1\nstep 60 of epoch 1\n"
            await client.delete(job.id)
            with pytest.raises(ServiceError, match="there is no job") as refused:
                await client.job(job.id)
            assert refused.value.status == 404

    with small.serving():
        asyncio.run(work())


def test_both_clients_offer_the_same() -> None:
    def offered(kind: type) -> dict[str, list[str]]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(member).parameters) for name, member in members if name[0] != "_"}

    assert offered(Client) == offered(AsyncClient)


def test_pause_and_resume_by_the_client(small: Small) -> None:
    with small.serving(), Client(small.url) as client:
        job = client.submit(small.spec).id
        until(lambda: client.job(job).state is JobState.RUNNING)
        client.pause(job)
        assert client.wait(job, 30).state is JobState.PAUSED
        client.resume(job)
        assert client.wait(job, 60).attempt == 2


class Receiver(BaseHTTPRequestHandler):
    """Takes messages; refuses the first one, once."""

    received: list[tuple[dict[str, str], str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        messages = type(self).received
        messages.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(500 if len(messages) == 1 else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def test_changes_of_state_are_told_signed_until_they_are_taken(small: Small) -> None:
    Receiver.received = []
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hook = Webhooks(small.database).add("local", f"http://127.0.0.1:{server.server_port}/hook")
    with small.serving(), Client(small.url) as client:
        job = client.submit(small.spec | {"seed": 5}).id
        until(lambda: {"starting", "running", "succeeded"} <= {_state(body) for _, body in Receiver.received[1:]}, 60)
    server.shutdown()
    server.server_close()
    for headers, body in Receiver.received:
        told = json.loads(body)
        assert (told["type"], told["job"]["id"]) == ("job.state_changed", job)
        timestamp = int(headers["webhook-timestamp"])
        assert headers["webhook-signature"] == signature(hook.secret, headers["webhook-id"], timestamp, body)
        assert hook.secret not in body + str(headers)
    ids = [headers["webhook-id"] for headers, _ in Receiver.received]
    assert ids.count(ids[0]) == 2  # what was refused came again, under the same id


def _state(body: str) -> str:
    return str(json.loads(body)["job"]["state"])


def test_nobody_there_is_said_in_words() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(ServiceUnreachable, match="no service answers at"):
        client.job("x")


def test_half_an_event_counts_for_nothing() -> None:
    parser = EventParser(0)
    lines = ["id: 1", 'data: {"number": 1}', "", "id: 2", 'data: {"num']
    assert [event for line in lines if (event := parser.feed(line))] == [{"number": 1}]
    parser.broken_off()
    again = ["id: 1", 'data: {"number": 1}', "", "id: 2", 'data: {"number": 2}', ""]
    assert [event for line in again if (event := parser.feed(line))] == [{"number": 2}]
    assert [parser.feed(line) for line in ("event: end", "data: {}")] == [None, None]
    with pytest.raises(StreamEnded):
        parser.feed("")


def test_a_server_cannot_name_a_file_outside_the_folder(tmp_path: Path) -> None:
    for path in ("../x", "/etc/x", "a/../../x"):
        with pytest.raises(ValueError, match="which is none"):
            Download.of(FileDocument(path=path, bytes=1, sha256="", href=""), tmp_path)
