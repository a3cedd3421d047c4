"""The service of docker-compose.yml on the tests' engine, from a clone of the repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.client import Client
from tests.compose.engine import Engine, call
from tests.services.running import ROOT

API, MLFLOW = "http://127.0.0.1:8700", "http://127.0.0.1:5000"
UP_SECONDS = 300.0
SERVICES = ("api", "dispatcher", "mlflow", "object-store", "postgres", "ray-head", "ray-worker")


@dataclass(frozen=True)
class Project:
    """One that is up."""

    engine: Engine
    clone: Path

    def compose(self, *arguments: str, seconds: float = 2400.0) -> str:
        """Run docker-compose in the clone."""
        return call(["docker-compose", "--no-ansi", *arguments], self.engine.environment, self.clone, seconds)

    def up(self) -> None:
        """Bring it up and wait until every part is well."""
        self.compose("up", "--detach", "--no-build")
        self.until(lambda: set(self.states()) == set(SERVICES) and all(map(well, self.states().values())), UP_SECONDS)

    def container(self, service: str) -> str:
        """The container of a service."""
        return self.compose("ps", "--quiet", service).strip()

    def states(self) -> dict[str, dict[str, Any]]:
        """Of the container of every service."""
        found = {}
        for service in SERVICES:
            container = self.container(service)
            if container:
                (document,) = json.loads(self.engine.docker("inspect", container))
                found[service] = document["State"]
        return found

    def kill(self, service: str) -> None:
        """End a container as a crash does: the engine takes its own ``kill`` for a wish, and would not restart it."""
        os.kill(self.states()[service]["Pid"], signal.SIGKILL)

    def client(self) -> Client:
        """As the administrator whose key was made with the secrets."""
        key = (self.clone / "deploy" / "compose" / "secrets" / "admin-key").read_text(encoding="ascii").strip()
        return Client(API, key)

    def logs(self) -> str:
        """The end of what every part said."""
        return self.compose("logs", "--tail", "40")

    def until(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait for something."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{self.compose('ps')}\n{self.logs()}"
            time.sleep(1.0)


def well(state: dict[str, Any]) -> bool:
    """Whether a container runs and its check, where it has one, succeeds."""
    return state["Status"] == "running" and state.get("Health", {}).get("Status", "healthy") == "healthy"


@contextmanager
def bring_up(engine: Engine, clone: Path) -> Iterator[Project]:
    """Images built, secrets made, everything up inside the block; afterwards nothing of it is left."""
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "__pycache__", "secrets", "*.egg-info"))
    shutil.copy(ROOT / ".dockerignore", clone)
    subprocess.run([sys.executable, "deploy/compose/make_secrets.py"], cwd=clone, check=True)
    project = Project(engine, clone)
    # The file builds on the engine's usual network; here, builds see what this machine sees.
    for name in ("api", "worker"):
        dockerfile = f"deploy/docker/{name}.Dockerfile"
        options = ["--network", "host", "--build-arg", "TORCH_OPTIONS="] if name == "worker" else ["--network", "host"]
        engine.docker("build", *options, "--file", dockerfile, "--tag", f"espalier-{name}:0.1.0", ".", cwd=clone)
    try:
        project.up()
        yield project
    finally:
        project.compose("down", "--volumes", "--timeout", "20")
