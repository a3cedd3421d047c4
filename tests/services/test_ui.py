"""MLflow's interface on a home's store: it answers, on this machine only, and leaves nothing behind."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from services.ui import HOST, choose_port, mlflow_server
from tests.ports import free_ports


@pytest.mark.timeout(240)
def test_server_answers_on_the_loopback_and_ends_whole(tmp_path: Path) -> None:
    port, before = free_ports(1)[0], set(psutil.Process().children(recursive=True))
    with mlflow_server(tmp_path, port) as address:
        with urllib.request.urlopen(address, timeout=30) as page:
            assert b"MLflow" in page.read()
        listening = [
            c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == port and c.status == "LISTEN"
        ]
        assert {connection.laddr.ip for connection in listening} == {HOST}
        # Other tests may have left a server that forks ranks.
        started = set(psutil.Process().children(recursive=True)) - before
    assert len(started) > 1
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    assert (tmp_path / "mlflow" / "mlflow.db").exists()


def test_a_server_does_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    """Seen on a command that is quicker to start: a shell with a child of its own stands for the server."""
    starts = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'services.keeper', str(os.getpid()), *sys.argv[1:]]\n"
        "subprocess.Popen(command)\n"
        "time.sleep(300)\n"
    )
    server = ["sh", "-c", "sleep 301 & wait"]
    owner = subprocess.Popen([sys.executable, "-c", starts, *server])
    try:
        kept = _wait_for_names(psutil.Process(owner.pid), {"sh", "sleep"})
    finally:
        owner.kill()
        owner.wait()
    _, alive = psutil.wait_procs(kept, timeout=30)
    assert alive == []


def test_a_command_ends_when_its_keeper_is_killed() -> None:
    """As MLflow's does, which passes the signal on to its server: the port is free for the next one."""
    keeper = subprocess.Popen([sys.executable, "-m", "services.keeper", str(os.getpid()), "sleep", "302"])
    try:
        kept = _wait_for_names(psutil.Process(keeper.pid), {"sleep"})
    finally:
        keeper.kill()
        keeper.wait()
    _, alive = psutil.wait_procs(kept, timeout=30)
    assert alive == []


def _wait_for_names(process: psutil.Process, names: set[str]) -> list[psutil.Process]:
    """What the process has started, once processes of these names are among it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = process.children(recursive=True)
        if names <= {one.name() for one in found}:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{names} were not started")


def test_taken_port_is_refused_with_a_remedy() -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(ValueError, match="name another one with --port"):
            choose_port(taken.getsockname()[1])


def test_a_free_port_is_taken_as_asked() -> None:
    port = free_ports(1)[0]
    assert choose_port(port) == port
