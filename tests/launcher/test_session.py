"""Starting Ray: a start that fails or hangs is told from a fault of the software."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.policy import TEMPORARY_EXIT_CODE
from launcher.session import RayStartError, _Start

HANGS = "import time; from launcher.session import _Start\nwith _Start(0.1):\n    time.sleep(60)"


def test_whatever_ray_raises_is_a_failed_start() -> None:
    with pytest.raises(RayStartError, match="Ray did not start: The current node timed out"), _Start(60):
        raise Exception("The current node timed out")
    with pytest.raises(ValueError, match="too long"), _Start(60):
        raise ValueError("ray-dir is too long")


def test_a_start_that_hangs_ends_the_process_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == TEMPORARY_EXIT_CODE
    assert done.stderr.strip().endswith("Ray did not start within 0.1 s")
