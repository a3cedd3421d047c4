"""Folders in places that all users of a machine share. Torch-free."""

import os
import stat
from pathlib import Path


def private_folder(path: Path) -> Path:
    """Make a folder that nobody else can look into, or take the one that is there.

    Raises ``PermissionError`` where somebody else made it, who could have put anything there.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise PermissionError(f"{path} is somebody else's: remove it, or set TMPDIR to a folder of your own")
    path.chmod(0o700)
    return path
