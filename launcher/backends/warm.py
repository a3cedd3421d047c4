"""Imported last by workers that Ray starts early (:mod:`launcher.backends.spare`): says that they are ready.

Torch-free; elsewhere the import does nothing.
"""

import os
from pathlib import Path

from launcher.backends.spare import FOLDER, WARM

if FOLDER in os.environ:
    (Path(os.environ[FOLDER]) / f"{WARM}{os.getpid()}").touch()
