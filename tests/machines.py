"""Machines made of this one: network namespaces with addresses and host names of their own. Needs root and Linux.

They share the disk and the numbers of processes. A switch, a namespace as well, joins them with this machine, so that
no rule of its firewall is between them.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil

NETWORKS = 256
NETWORK = "198.18.{}"
"""A range set aside for measurements between devices (RFC 2544); nothing real is there."""
FIRST = 11
_numbers = count(os.getpid())
"""The kernel takes a namespace down a moment after it was deleted: none has the number of the one before."""
NAMESPACES = Path("/run/netns")
ENTER = """set -e
hostname "$0"
mount --bind "$1" /etc/hosts
test -z "$2" || mount -t tmpfs own "$2"
shift 2
exec "$@"
"""
"""Name, file of all machines' addresses, a folder with a file system of its own or nothing, and a command."""
GONE_SECONDS = 30.0


@dataclass(frozen=True)
class Machine:
    """One of them: its host name, the namespace behind it, its address, and the file of everybody's."""

    name: str
    namespace: str
    address: str
    hosts: Path
    private: Path | None = None
    """A folder in which each command, and what it starts, finds nothing but its own files."""

    def command(self, *command: str) -> list[str]:
        """What runs a command there, as the same process."""
        # Not ``ip netns exec``, which hides the control groups.
        into = ["nsenter", f"--net={NAMESPACES / self.namespace}", "unshare", "--uts", "--mount"]
        return [*into, "sh", "-c", ENTER, self.name, str(self.hosts), str(self.private or ""), *command]

    @property
    def outside(self) -> str:
        """The address of the machine that all of this runs on."""
        return f"{self.address.rpartition('.')[0]}.1"

    def processes(self) -> list[int]:
        """Ids of all processes there."""
        return [int(line) for line in _ip("netns", "pids", self.namespace).split()]

    def kill(self) -> list[int]:
        """SIGKILL to every process there, until none is left; which ones they were. Raises ``TimeoutError``."""
        killed: set[int] = set()
        deadline = time.monotonic() + GONE_SECONDS
        while found := [pid for pid in self.processes() if _runs(pid)]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes of {self.name} do not end: {found}")
            for pid in set(found) - killed:
                _send_kill(pid)
            killed |= set(found)
            time.sleep(0.02)
        return sorted(killed)


@contextmanager
def machines(*names: str, private: Path | None = None) -> Iterator[list[Machine]]:
    """So many machines inside the block; what still runs on them at its end is killed."""
    with ExitStack() as stack:
        number, switch = _switch(stack)
        network = NETWORK.format(number)
        _ip("link", "add", switch, "type", "veth", "peer", "name", "outside", "netns", switch)
        stack.callback(_ip, "link", "delete", switch)
        _ip("address", "add", f"{network}.1/24", "dev", switch)
        _ip("link", "set", switch, "up")
        _plug(switch, "outside")
        hosts = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="esp-hosts-"))) / "hosts"
        found = [
            Machine(name, f"{switch}-{name}", f"{network}.{FIRST + i}", hosts, private) for i, name in enumerate(names)
        ]
        lines = ["127.0.0.1 localhost", *(f"{machine.address} {machine.name}" for machine in found)]
        hosts.write_text("\n".join(lines) + "\n", encoding="ascii")
        for machine in found:
            _connect(stack, machine, switch)
        yield found


def _switch(stack: ExitStack) -> tuple[int, str]:
    """A number that nobody else has, and the namespace of a bridge."""
    for number in (next(_numbers) % NETWORKS for _ in range(NETWORKS)):
        name = f"esp{number}"
        if not (NAMESPACES / name).exists():
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError:
                continue  # somebody was faster
            stack.callback(_ip, "netns", "delete", name)
            _ip("-n", name, "link", "add", "bridge", "type", "bridge")
            _ip("-n", name, "link", "set", "bridge", "up")
            return number, name
    raise RuntimeError(f"all {NETWORKS} networks are taken: ip netns delete those that were left behind")


def _connect(stack: ExitStack, machine: Machine, switch: str) -> None:
    _ip("netns", "add", machine.namespace)
    stack.callback(_ip, "netns", "delete", machine.namespace)
    stack.callback(machine.kill)
    _ip(
        "link", "add", "eth0", "netns", machine.namespace, "type", "veth", "peer", "name", machine.name, "netns", switch
    )
    _plug(switch, machine.name)
    _ip("-n", machine.namespace, "address", "add", f"{machine.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", machine.namespace, "link", "set", device, "up")
    # Nothing is behind it: programs learn their own address by asking for the way to some other one.
    _ip("-n", machine.namespace, "route", "add", "default", "dev", "eth0")


def _plug(switch: str, device: str) -> None:
    _ip("-n", switch, "link", "set", device, "master", "bridge")
    _ip("-n", switch, "link", "set", device, "up")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30, check=True).stdout


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send_kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def start(machine: Machine, command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A command there, in a session of its own, with its output at the end of ``log``."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            machine.command(*command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
