"""A service in threads of the test's own process, with a coordinator that needs no cluster."""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import uvicorn

from services.api.app import make_app
from services.dispatcher.loop import Dispatcher
from services.place import FOLDER, PLACE
from services.settings import Settings
from services.store.database import Database
from services.ui import choose_port
from tests.services.running import text_files, tiny_job, until


class Small:
    """An API that can be ended and started again, and a dispatcher, in threads of this process."""

    def __init__(self, home: Path) -> None:
        port = choose_port(0)
        self.settings = Settings(
            home=home, port=port, coordinator="tests.services.quick_coordinator", mlflow="none", poll_seconds=0.1
        )
        self.url = f"http://127.0.0.1:{port}"
        self.database = Database(self.settings.database_url)
        self.database.migrate()
        self.spec = tiny_job(text_files(home / "text"), seed=60)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """The API answers inside the block."""
        config = uvicorn.Config(
            make_app(self.settings), port=self.settings.port, log_config=None, timeout_graceful_shutdown=0
        )
        server = uvicorn.Server(config)
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(server.run)
            until(lambda: server.started or running.done(), 30)
            try:
                yield
            finally:
                server.should_exit = True
        running.result()

    @contextmanager
    def dispatching(self) -> Iterator[None]:
        """A dispatcher leads inside the block."""
        ended = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(Dispatcher(self.settings).run, lambda: "stop" if ended.is_set() else None)
            try:
                yield
            finally:
                ended.set()
        running.result()

    def announce(self) -> Path:
        """Say where it is, as ``espalier up`` does; the file that says so."""
        place = self.settings.home / FOLDER / PLACE
        place.parent.mkdir(exist_ok=True)
        words = {"url": self.url, "pid": os.getpid(), "created": psutil.Process().create_time()}
        place.write_text(json.dumps(words), encoding="utf-8")
        return place
