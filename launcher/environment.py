"""The environment of the processes a job starts. Does not import Ray, which reads its environment on import."""

import ctypes
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SIGNAL_WHEN_PARENT_DIES = 1
"""``PR_SET_PDEATHSIG`` of Linux."""
LONGEST_TEMP_DIR = 17
"""Ray's sockets lie below it, and AF_UNIX paths are short: `/esp-XXXXXXXX` follows, up to a session's limit."""


def short_temp_dir() -> str:
    """Where a Ray cluster of this machine's own can have its files."""
    found = tempfile.gettempdir()
    return found if len(os.fsencode(found)) <= LONGEST_TEMP_DIR else "/tmp"


def own_cluster() -> dict[str, str]:
    """Environment for a process that runs a cluster of its own, to be set before ``ray`` is imported.

    Everything listens on 127.0.0.1, asks for a token that only this job knows, and reports nothing to anybody.
    """
    return {
        **shared_cluster(),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Helpers of Ray that lose the head give up after seconds instead of a minute.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        # Ray's name for "this cluster is one machine": all its servers bind the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "GLOO_SOCKET_IFNAME": loopback_interface(),
    }


def shared_cluster() -> dict[str, str]:
    """Environment of a job's own cluster, on whichever machines; the token is given apart."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        # A node whose server is gone is missed after five seconds instead of fifteen; one that is only slow has 50 s.
        "RAY_health_check_period_ms": "1000",
    }


def loopback_interface() -> str:
    """The name of the loopback network interface."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else "lo"


def default_devices(threads: int) -> int:
    """Ranks that this machine carries without sharing cores."""
    return max(1, len(os.sched_getaffinity(0)) // threads)


def python_environment() -> dict[str, str]:
    """The environment of a child process that runs this project's code."""
    return {**os.environ, "PYTHONPATH": python_path()}


def python_path() -> str:
    """``PYTHONPATH`` for child processes: the code that runs here first, then what this process was given."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """``preexec_fn`` for a child that is sent this signal when the calling thread ends, however it ends (on Linux)."""
    parent = os.getpid()

    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(SIGNAL_WHEN_PARENT_DIES, int(number))
            if os.getppid() != parent:  # it ended before this was asked for
                os._exit(1)

    return ask
