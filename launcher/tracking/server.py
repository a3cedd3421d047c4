"""MLflow's server on a SQLite store: ``python -m launcher.tracking.server STORE_URI OPTIONS``, with MLflow's options.

The store is made first, where there is none; then this process becomes the server.
"""

import os
import sys

from launcher.tracking.store import make_store


def main() -> None:
    """Entry point of the process."""
    uri, *options = sys.argv[1:]
    make_store(uri)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, *options]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
