"""The API's process: ``python -m services.api SETTINGS [--keeper PID]``."""

import os
import sys
import threading
import time

import uvicorn

from services.api.app import make_app
from services.process import parse, say_in_log

GRACE_SECONDS = 3
"""For requests that are being answered; streams are cut off, and go on at the next server."""


def main() -> int:
    """Entry point of the process."""
    settings, keeper = parse("services.api")
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
    return 0


def _follow(server: uvicorn.Server, keeper: int) -> None:
    while os.getppid() == keeper:
        time.sleep(1.0)
    server.should_exit = True


if __name__ == "__main__":
    sys.exit(main())
