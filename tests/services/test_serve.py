"""``espalier serve``: the parts of a service by themselves, as in containers."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from services.client import Client, ServiceError, ServiceUnreachable
from services.store.database import Database
from services.store.keys import KeyStore
from services.ui import choose_port
from tests.finished import espalier
from tests.services.running import ROOT, command, text_files, tiny_job, until


@contextmanager
def part(home: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One part inside the block; it ends at SIGTERM within seconds."""
    with open(home / f"{arguments[0]}.log", "ab") as log:
        process = subprocess.Popen(
            command("serve", *arguments, "--home", home), stdout=log, stderr=log, cwd=ROOT, env=os.environ
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            process.kill()


def test_parts_that_start_at_the_same_moment_are_a_service(database_url: str, tmp_path: Path) -> None:
    home, key_file, port = tmp_path / "home", tmp_path / "key", str(choose_port(0))
    home.mkdir()
    key_file.write_text(espalier("keys", "token").stdout)
    (home / "service.yaml").write_text(f"{{coordinator: tests.services.quick_coordinator, roots: [{tmp_path}]}}")
    common = ("--database", database_url, "--mlflow", "none")
    with ExitStack() as parts:
        api = parts.enter_context(part(home, "api", "--port", port, "--admin-key-file", str(key_file), *common))
        dispatchers = [parts.enter_context(part(home, "dispatcher", *common)) for _ in range(2)]
        client = Client(f"http://127.0.0.1:{port}", key_file.read_text().strip())
        until(lambda: api.poll() is not None or is_ready(client), 120)
        assert api.poll() is None, (home / "api.log").read_text()
        spec = tiny_job(text_files(tmp_path / "text"), seed=10)
        first = client.submit(spec).id
        assert client.wait(first, 120).state == "succeeded"
        # One of them led; whoever is left goes on.
        dispatchers[0].kill()
        second = client.submit(spec).id
        assert client.wait(second, 120).attempt == 1
        with pytest.raises(ServiceError, match="key"):
            list(Client(f"http://127.0.0.1:{port}").jobs())
    assert api.returncode in (0, -signal.SIGTERM)  # uvicorn ends in order, and then as the signal would have ended it
    assert dispatchers[1].returncode == 0


def is_ready(client: Client) -> bool:
    """Whether the API answers, and a dispatcher leads."""
    try:
        return bool(client.ready())
    except (ServiceError, ServiceUnreachable):
        return False


def test_a_key_is_adopted_once_and_stays_revoked(database: Database) -> None:
    keys, token = KeyStore(database), KeyStore.token()
    keys.adopt(token, "deployment", "admin", "admin")
    found = keys.find(token)
    assert found is not None
    assert (found.owner, found.role, found.expires) == ("admin", "admin", None)
    keys.revoke(found.id)
    keys.adopt(token, "deployment", "admin", "admin")
    assert keys.find(token) is None
    with pytest.raises(ValueError, match="another one already"):
        keys.adopt(token[:-1] + ("A" if token[-1] != "A" else "B"), "deployment", "admin", "admin")
    with pytest.raises(ValueError, match="no key: it looks like esp_"):
        keys.adopt("secret", "deployment", "admin", "admin")


def test_who_is_not_guarded_is_not_served(tmp_path: Path) -> None:
    ended = espalier("serve", "api", "--home", tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert ended.returncode == 1
    assert "without keys the service answers this machine only" in ended.stderr
    (tmp_path / "key").write_text("nonsense")
    ended = espalier("serve", "api", "--home", tmp_path, "--admin-key-file", tmp_path / "key")
    assert ended.returncode == 1
    assert "make one with: espalier keys token" in ended.stderr
