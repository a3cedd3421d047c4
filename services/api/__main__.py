"""The API's process: ``python -m services.api SETTINGS [--keeper PID]``."""

import os
import sys
import threading
import time

import uvicorn

from services.api.app import make_app
from services.process import parse, say_in_log
from services.settings import Settings

GRACE_SECONDS = 3
"""For requests that are being answered; streams are cut off, and go on at the next server."""


def main() -> int:
    """Entry point of the process."""
    run_api(*parse("services.api"))
    return 0


def run_api(settings: Settings, keeper: int | None = None) -> None:
    """Serve until SIGTERM, or until the parent process ``keeper`` has ended."""
    say_in_log()
    config = uvicorn.Config(
        make_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(config)
    if keeper is not None:
        threading.Thread(target=_follow, args=(server, keeper), daemon=True).start()
    server.run()


def _follow(server: uvicorn.Server, keeper: int) -> None:
    while os.getppid() == keeper:
        time.sleep(1.0)
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
