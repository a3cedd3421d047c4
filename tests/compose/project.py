"""The service of docker-compose.yml on the tests' engine, from a clone of the repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.client import Client
from tests.compose.engine import Engine, call, make_stand_ins
from tests.services.running import ROOT

API, MLFLOW = "http://127.0.0.1:8700", "http://127.0.0.1:5000"
UP_SECONDS = 300.0
SERVICES = ("api", "dispatcher", "mlflow", "object-store", "postgres", "ray-head", "ray-worker")
LABEL = "com.docker.compose"


@dataclass(frozen=True)
class Project:
    """One that is up."""

    engine: Engine
    clone: Path

    def build(self, name: str, *options: str) -> None:
        """Build one of our images. Builds see the network of this machine; the file's would be on the engine's own."""
        dockerfile, tag = f"deploy/docker/{name}.Dockerfile", f"espalier-{name}:0.1.0"
        self.engine.docker(
            "build", "--network", "host", *options, "--file", dockerfile, "--tag", tag, ".", cwd=self.clone
        )

    def compose(self, *arguments: str, seconds: float = 2400.0) -> str:
        """Run docker-compose in the clone."""
        return call(["docker-compose", "--ansi", "never", *arguments], self.engine.environment, self.clone, seconds)

    def up(self) -> None:
        """Bring it up and wait until every part is well."""
        self.compose("up", "--detach", "--no-build")
        self.until(self.is_whole, UP_SECONDS)

    def is_whole(self, without: Mapping[str, int] = {}) -> bool:
        """Whether every container is well, none of them by a process that was killed, and a dispatcher leads."""
        states = self.states()
        known = set(states) == set(SERVICES) and all(states[name]["Pid"] != pid for name, pid in without.items())
        return known and all(map(well, states.values())) and self._is_ready()

    def _is_ready(self) -> bool:
        try:
            self.client().ready()
        except (OSError, ValueError):  # nobody answers, or somebody who says what is missing
            return False
        return True

    def inside(self, service: str, *command: str, user: str | None = None) -> str:
        """Run something in a service's container; its output."""
        options = ["--user", user] if user else []
        return self.engine.docker("exec", *options, self._containers()[service]["Id"], *command)

    def states(self) -> dict[str, dict[str, Any]]:
        """Of the container of every service."""
        return {service: found["State"] for service, found in self._containers().items()}

    def _containers(self) -> dict[str, dict[str, Any]]:
        mine = f"label={LABEL}.project={self.clone.name}"
        names = self.engine.docker("ps", "--all", "--quiet", "--filter", mine).split()
        documents = json.loads(self.engine.docker("inspect", *names)) if names else []
        return {document["Config"]["Labels"][f"{LABEL}.service"]: document for document in documents}

    def kill(self, service: str) -> int:
        """End a container as a crash does: the engine takes its own ``kill`` for a wish, and would not restart it."""
        process: int = self.states()[service]["Pid"]
        assert process, f"{service} does not run: {self.logs()}"
        os.kill(process, signal.SIGKILL)
        return process

    def client(self) -> Client:
        """As the administrator whose key was made with the secrets."""
        key = (self.clone / "deploy" / "compose" / "secrets" / "admin-key").read_text(encoding="ascii").strip()
        return Client(API, key)

    def logs(self) -> str:
        """The end of what every part said."""
        return self.compose("logs", "--tail", "20")

    def until(self, condition: Callable[[], object], seconds: float, tell: Callable[[], str] = str) -> None:
        """Wait for something; where it does not come, ``tell`` is asked for what there is to know of it."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{tell()}\n{self.compose('ps')}\n{self.logs()}"
            time.sleep(0.5)


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
    with ThreadPoolExecutor(2) as pool:  # downloads of one while the other compiles
        builds = [pool.submit(project.build, "worker", "--build-arg", "TORCH_OPTIONS=")]
        builds += [pool.submit(make_stand_ins, engine), pool.submit(project.build, "api")]
    for build in builds:
        build.result()
    try:
        project.up()
        yield project
    finally:
        project.compose("down", "--volumes", "--timeout", "20")
