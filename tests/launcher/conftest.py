"""A small Ray cluster inside the test process, as a coordinator would start it for itself."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.environment import own_cluster

# Ray reads its environment when it is imported, which the imports below do.
os.environ.update(own_cluster())

from launcher.actors.session import OWN, Room, ray_session


@pytest.fixture(scope="package")
def room() -> Iterator[Room]:
    """Four devices of one thread; the machine may have fewer cores, which the toy ranks do not mind."""
    temp_dir = Path(tempfile.mkdtemp(prefix="esp-", dir="/tmp"))
    with ray_session(OWN, devices=4, threads=1, temp_dir=temp_dir) as found:
        yield found
    shutil.rmtree(temp_dir, ignore_errors=True)
