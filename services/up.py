"""The whole service on one machine: API, dispatcher and MLflow as processes, each started again when it dies."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launcher.environment import python_path
from launcher.jobs import NO_TRACKING
from parallelism.objects import StoreAwayError
from services.foreground import Interrupts
from services.place import FOLDER, LOCK, PLACE, ServiceError
from services.settings import Settings
from services.store.database import Database
from services.store.keys import KeyStore
from services.ui import HOST, choose_port, mlflow_command, mlflow_environment

USUAL_PORT = 8700

START_SECONDS = 60.0
POLL_SECONDS = 0.3
CALM_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 30.0

Say = Callable[[str], None]


@dataclass
class Part:
    """One process of the service."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] | None = None
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    started: float = 0.0
    start_at: float = 0.0

    def start(self) -> None:
        """Start it in a session of its own: Ctrl-C is meant for the keeper, which ends the parts in order."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**(self.environment or os.environ), "PYTHONPATH": python_path()}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.started = time.monotonic()

    def tend(self, say: Say) -> None:
        """Start it again when it has died, after longer and longer pauses when it does so at once."""
        if self.process is None:
            if time.monotonic() >= self.start_at:
                self.start()
            return
        exit_code = self.process.poll()
        if exit_code is None:
            return
        self.deaths = 0 if time.monotonic() - self.started > CALM_SECONDS else self.deaths + 1
        pause = 0.0 if self.deaths <= 1 else min(LONGEST_PAUSE_SECONDS, 2.0 ** (self.deaths - 1))
        say(f"{self.name} has died (exit code {exit_code}); started again" + (f" in {pause:g} s" if pause else ""))
        self.process, self.start_at = None, time.monotonic() + pause

    def end(self, number: signal.Signals, seconds: float) -> None:
        """Ask it to end, and end it by force after ``seconds``."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Embedded:
    """A service that was brought up by this process."""

    settings: Settings
    say: Say
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The API's address."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.settings.port}"

    @property
    def folder(self) -> Path:
        """The service's own files in the home."""
        return self.settings.home / FOLDER

    def start(self) -> None:
        """Bring all parts up; one line for each. Raises :class:`ServiceError` when the API does not answer."""
        path = self.settings.write()
        logs = self.folder / "logs"
        more = [str(path), "--keeper", str(os.getpid())]
        for name, module in (("API", "services.api"), ("dispatcher", "services.dispatcher")):
            self._add(Part(name, [sys.executable, "-m", module, *more], logs / f"{name.lower()}.log"))
        self._wait_for_api()
        self._write_place()
        self.say(f"API         {self.url}")
        self.say(f"dispatcher  process {self._pid('dispatcher')}, {self.settings.devices} devices")
        self.say("Ray         a cluster of its own for each job, on 127.0.0.1")
        if self.settings.mlflow is None and self.settings.mlflow_url:
            port = int(str(self.settings.mlflow_url).rpartition(":")[2])
            command = mlflow_command(self.settings.home, port)
            self._add(Part("MLflow", command, self.settings.home / "mlflow" / "server.log", mlflow_environment()))
            self.say(f"MLflow      {self.settings.mlflow_url} (it takes a few seconds to answer)")
        elif self.settings.mlflow != NO_TRACKING:
            self.say(f"MLflow      {self.settings.mlflow or 'fed, not served: espalier ui shows it'}")

    def tend(self) -> None:
        """Start what has died again."""
        for part in self.parts.values():
            part.tend(self.say)

    def stop(self, impatient: Callable[[], bool] = lambda: False, jobs: bool = True) -> None:
        """End all parts. Running jobs write their checkpoints first, unless somebody is impatient or not ``jobs``."""
        dispatcher = self.parts.get("dispatcher")
        if dispatcher and dispatcher.process and jobs:
            dispatcher.process.send_signal(signal.SIGINT)
            while dispatcher.process.poll() is None and not impatient():
                time.sleep(POLL_SECONDS)
        for name in ("dispatcher", "API", "MLflow"):
            if name in self.parts:
                self.parts[name].end(signal.SIGTERM, 20.0)
        self.parts.clear()
        (self.folder / PLACE).unlink(missing_ok=True)

    def _add(self, part: Part) -> None:
        self.parts[part.name] = part
        part.start()

    def _pid(self, name: str) -> int:
        process = self.parts[name].process
        assert process is not None
        return process.pid

    def _wait_for_api(self) -> None:
        part, deadline = self.parts["API"], time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert part.process is not None
            if part.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self._local_url}/healthz", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)
        last = part.log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        self.stop(jobs=False)
        raise ServiceError(f"the API did not start: {last or 'it said nothing'} (more in {part.log})")

    @property
    def _local_url(self) -> str:
        """An address that this machine reaches the API by, whatever it listens on."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
        return (
            f"http://{anywhere[self.settings.host]}:{self.settings.port}"
            if self.settings.host in anywhere
            else self.url
        )

    def _write_place(self) -> None:
        place = {"url": self._local_url, "pid": os.getpid(), "created": psutil.Process().create_time()}
        (self.folder / PLACE).write_text(json.dumps(place), encoding="utf-8")


def prepare(settings: Settings, port: int | None, serve_mlflow: bool = True) -> Settings:
    """Bring the store up to date, choose ports. Raises :class:`ServiceError` for what must not be served."""
    settings.home.mkdir(parents=True, exist_ok=True)
    check_journals(settings)
    database = Database(settings.database_url)
    database.migrate()
    check_guard(settings, database)
    database.close()
    update: dict[str, Any] = {"port": choose_port(port, settings.port or USUAL_PORT)}
    if settings.mlflow is None and serve_mlflow:
        update["mlflow_url"] = f"http://{HOST}:{choose_port(None)}"
    elif settings.mlflow is not None and settings.mlflow.startswith("http"):
        update["mlflow_url"] = settings.mlflow_url or settings.mlflow
    return settings.model_copy(update=update)


def check_journals(settings: Settings) -> None:
    """Raise :class:`ServiceError` where jobs are to lie in an object store that cannot hold them, or is away."""
    try:
        settings.jobs_home().check()
    except (ValueError, StoreAwayError) as error:
        raise ServiceError(f"journals: {error}") from error


def check_guard(settings: Settings, database: Database) -> None:
    """Raise :class:`ServiceError` where other machines could use the service without a key."""
    if not settings.loopback and settings.oidc is None and not KeyStore(database).any():
        raise ServiceError(
            f"host {settings.host}: without keys the service answers this machine only; create one first, with:"
            " espalier keys create NAME --role admin"
        )


@contextmanager
def embedded(settings: Settings, port: int | None, say: Say, serve_mlflow: bool = True) -> Iterator[Embedded]:
    """A service inside the block; at its end its processes have, too. One for each home.

    Raises :class:`ServiceError`.
    """
    (settings.home / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(settings.home / FOLDER / LOCK, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"a service is up on {settings.home} already") from None
        service = Embedded(prepare(settings, port, serve_mlflow), say)
        say(f"store       {shown(service.settings.database_url)}")
        service.start()
        try:
            yield service
        finally:
            service.stop()


def bring_up(settings: Settings, port: int | None, say: Say) -> None:
    """Serve until SIGINT or SIGTERM; a second one does not wait for checkpoints."""
    with Interrupts().listening() as interrupts, embedded(settings, port, say) as service:
        say("Ctrl-C ends it; running jobs write their checkpoints and go on at the next start")
        while not interrupts.count:
            service.tend()
            time.sleep(POLL_SECONDS)
        say("ending: running jobs write their checkpoints first; interrupt again to leave them running")
        service.stop(impatient=lambda: interrupts.count > 1)
        say("ended")


def shown(database_url: str) -> str:
    """A store's address without its password."""
    from sqlalchemy.engine import make_url

    return make_url(database_url).render_as_string(hide_password=True)
