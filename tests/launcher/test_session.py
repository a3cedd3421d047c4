"""Starting Ray: a start that fails or hangs is told from a fault of the software."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.actors import session
from launcher.actors.session import RayStartError, _await_nodes, _Start, measure_room
from launcher.policy import TEMPORARY_EXIT_CODE

HANGS = "import time; from launcher.actors.session import _Start\nwith _Start(0.1):\n    time.sleep(60)"


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


class Nodes:
    """Ray's list of nodes, as somebody who asks again and again finds it; the last answer stays."""

    def __init__(self, *answers: Sequence[dict[str, float]]) -> None:
        self._answers = list(answers)

    def __call__(self) -> list[dict[str, Any]]:
        resources = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return [{"Alive": True, "Resources": one} for one in resources]


HEAD: dict[str, float] = {"node:__internal_head__": 1.0}
CPUS, GPUS = {"CPU": 5.0}, {"CPU": 8.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("resources", "nodes", "devices", "gpus"),
    [
        ([CPUS], 1, 2, False),
        ([CPUS, CPUS], 2, 4, False),
        ([HEAD, CPUS], 3, 6, False),
        ([HEAD, GPUS], 2, 4, True),
        ([HEAD, {"CPU": 4.0}, GPUS], 2, 2, True),
        ([HEAD], 2, 0, False),
    ],
)
def test_a_cluster_counts_as_whole_while_nodes_are_away(
    monkeypatch: pytest.MonkeyPatch, resources: list[dict[str, float]], nodes: int, devices: int, gpus: bool
) -> None:
    monkeypatch.setattr("ray.nodes", Nodes(resources))
    room = measure_room(2, None, nodes)
    assert (room.devices, room.gpus) == (devices, gpus)
    assert measure_room(2, 1, nodes).devices == min(1, devices)


def test_a_head_without_processors_is_no_node_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.nodes", Nodes([HEAD], [HEAD, CPUS], [HEAD, CPUS, CPUS]))
    _await_nodes(2, pytest.fail, lambda: None)


def test_one_node_is_enough_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "NODES_SECONDS", 0.5)
    monkeypatch.setattr("ray.nodes", Nodes([HEAD, CPUS]))
    _await_nodes(2, pytest.fail, lambda: None)


def test_where_there_is_no_node_it_is_said_until_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(session, "NODES_SECONDS", 0.1)
    monkeypatch.setattr(session, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr("ray.nodes", Nodes([HEAD]))
    _await_nodes(2, told.append, lambda: told)
    assert told == ["Ray's nodes: 0 of 2 are up"]
