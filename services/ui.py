"""MLflow's own web interface on the store of a home, on this machine only."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.tracking.process import UI_PORT, artifacts_beside, default_uri

HOST = "127.0.0.1"
START_SECONDS = 120.0


def choose_port(wanted: int | None, usual: int = UI_PORT) -> int:
    """The port asked for (0: any free one); without one, the usual port or, where that is taken, a free one.

    Raises ``ValueError`` when the port asked for is taken.
    """
    if wanted:
        if not _is_free(wanted):
            raise ValueError(f"port {wanted} is in use: name another one with --port, or leave --port out")
        return wanted
    if wanted is None and _is_free(usual):
        return usual
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(home: Path, port: int) -> Iterator[str]:
    """A server on the home's store inside the block; yields its address once it answers.

    Raises ``TimeoutError`` with the end of its log.
    """
    command, log_path = mlflow_command(home, port), home / "mlflow" / "server.log"
    with open(log_path, "wb") as log:
        # In a session of its own: Ctrl-C is for us, who let it end in order.
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=mlflow_environment(), start_new_session=True
        )
    try:
        address = f"http://{HOST}:{port}"
        _wait_until_healthy(server, address, log_path)
        yield address
    finally:
        _end(server)


def mlflow_command(home: Path, port: int) -> list[str]:
    """The command line of a server on the home's store that ends with this process; the store's folder is made."""
    uri = default_uri(home)
    artifacts = artifacts_beside(uri)
    assert artifacts is not None, "the home's store is a SQLite file"
    artifacts.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "services.keeper", str(os.getpid())]
    command += [sys.executable, "-m", "launcher.tracking.server", uri]
    return [*command, "--host", HOST, "--port", str(port), "--workers", "1", "--artifacts-destination", str(artifacts)]


def mlflow_environment() -> dict[str, str]:
    """The environment of that server."""
    return os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    last = log_path.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    raise TimeoutError(f"the MLflow server did not start: {last or 'it said nothing'} (more in {log_path})")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask the server's keeper to end it with all its workers, which takes up to its patience."""
    server.terminate()
    server.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True
