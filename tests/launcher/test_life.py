"""How long a process lived is told by its log, whatever ended it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher.life import SIGN_SECONDS, last_sign

CODE = """
import sys, time
from pathlib import Path
from launcher.life import show_life
show_life(Path(sys.argv[1]))
time.sleep(600)
"""


def test_the_last_sign_is_from_shortly_before_the_end(tmp_path: Path) -> None:
    log = tmp_path / "rank.log"
    log.touch()
    os.utime(log, (1.0, 1.0))
    process = subprocess.Popen([sys.executable, "-c", CODE, str(log)], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 60
        while last_sign([log]) == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        begun = last_sign([log])
        while last_sign([log]) == begun:  # and it goes on
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    ended = time.time()
    time.sleep(1.5 * SIGN_SECONDS)
    assert begun < last_sign([log]) <= ended
    assert log.read_bytes() == b""


def test_the_last_of_several_counts_and_logs_may_be_missing(tmp_path: Path) -> None:
    logs = [tmp_path / f"rank{rank}.log" for rank in range(3)]
    assert last_sign(logs) == 0.0
    for log, changed in zip(logs, (50.0, 70.0), strict=False):
        log.touch()
        os.utime(log, (changed, changed))
    assert last_sign(logs) == 70.0
