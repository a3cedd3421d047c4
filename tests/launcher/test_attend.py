"""A coordinator elsewhere is stopped through a shared file; a node of Ray knows what to start."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from launcher.attend import ask_to_stop, attend
from launcher.journal import Journal
from launcher.ray_node import Node, _earlier_dirs, listens, parse
from tests.services.running import ROOT, until

PATIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def _when_up(ready: Path, file: Path, now: bool) -> threading.Thread:
    def ask() -> None:
        while not ready.exists():
            threading.Event().wait(0.05)
        ask_to_stop(file, now=now)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("now", "code"), [(False, 5), (True, 128 + signal.SIGKILL)])
def test_a_file_stands_for_a_signal(now: bool, code: int, tmp_path: Path) -> None:
    ready, file = tmp_path / "ready", tmp_path / "cluster" / "stop"
    before = signal.getsignal(signal.SIGTERM)
    _when_up(ready, file, now)
    assert attend([sys.executable, "-c", PATIENT, str(ready)], file) == code
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_without_what_it_needs_is_ended(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    assert attend([sys.executable, "-c", PATIENT, str(ready)], tmp_path / "stop", lambda: not ready.exists()) == 137


def test_its_own_end_is_passed_on(tmp_path: Path) -> None:
    assert attend([sys.executable, "-c", "import sys; sys.exit(75)"], tmp_path / "stop") == 75


def _node(name: str) -> Node:
    arguments = f"/jobs/x --name {name} --head n1 --address 127.0.0.1:20007 --nodes 2 --cpus 4 --gpus 2 --devices 3"
    return parse([*arguments.split(), "--ray-dir", "/tmp/esp-7.0", "--stop-file", "/jobs/x/cluster/stop.7.0"])


def test_the_head_starts_ray_and_the_coordinator_and_others_join_it() -> None:
    head, other = _node("n1"), _node("n2")
    assert (head.is_head, other.is_head) == (True, False)
    assert {"--head", "--port=20007", "--temp-dir=/tmp/esp-7.0", "--num-gpus=2"} <= set(head.ray_command())
    assert "--address=127.0.0.1:20007" in other.ray_command()
    assert "--head" not in other.ray_command()
    told = " ".join(head.coordinator_command())
    assert told.endswith("-m launcher.coordinator /jobs/x --address 127.0.0.1:20007 --nodes 2 --devices 3")


def test_nobody_listens_where_nobody_is() -> None:
    assert not listens("127.0.0.1:9")


ATTENDED = """
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(600)
"""


def test_the_command_ends_with_whoever_attends_it(tmp_path: Path) -> None:
    """A batch system kills what it knows of, and that may be the parent alone."""
    written = tmp_path / "pid"
    command = [sys.executable, "-c", ATTENDED, str(written)]
    attending = subprocess.Popen([sys.executable, "-m", "launcher.attend", str(tmp_path), "s", *command], cwd=ROOT)
    until(lambda: written.exists() and written.read_text(), 60)
    attended = psutil.Process(int(written.read_text()))
    attending.kill()
    attending.wait()
    psutil.wait_procs([attended], timeout=60)
    assert not attended.is_running()


def test_what_earlier_lives_left_behind_is_known() -> None:
    assert _earlier_dirs(Path("/tmp/esp-7.2")) == [Path("/tmp/esp-7.0"), Path("/tmp/esp-7.1")]
    assert _earlier_dirs(Path("/tmp/esp-7.0")) == _earlier_dirs(Path("/tmp/esp-x")) == []


def test_output_goes_on_in_the_log_and_its_end_to_where_it_would_have_gone(tmp_path: Path) -> None:
    log = Journal(tmp_path).log_path("coordinator")
    log.write_text("before\n", encoding="utf-8")
    command = [sys.executable, "-m", "launcher.attend", str(tmp_path), "s", "sh", "-c"]
    ended = [
        subprocess.run([*command, script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        for script in ("echo well", "echo badly >&2; exit 7")
    ]
    assert [one.returncode for one in ended] == [0, 7]
    assert log.read_text(encoding="utf-8") == "before\nwell\nbadly\n"
    assert (ended[0].stdout + ended[0].stderr, ended[1].stdout) == ("", "")
    assert ended[1].stderr.endswith("badly\n\n")
