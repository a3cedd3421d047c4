"""What several back-ends do alike. Torch-free."""

import os
import shlex
from pathlib import Path

from launcher.backends.base import BackendUnavailable
from launcher.journal import Journal
from parallelism import places


def tail(path: Path, lines: int) -> str:
    """The last lines of a log file; nothing where there is none."""
    try:
        if path.exists() or not places.is_mirrored(path):
            with open(path, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 400 * lines))
                content = file.read()
        else:
            content = places.read_bytes(path)
    except FileNotFoundError:
        return ""
    text = content.decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def read_token(path: Path) -> str:
    """A secret from the operator's file. Raises :class:`BackendUnavailable` where it cannot be read just now."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise BackendUnavailable(f"the token in {path} cannot be read: {error.strerror or error}") from error


def working_directory(journal: Journal) -> str:
    """Relative paths of a spec start where it was submitted, as long as that folder exists."""
    folder = journal.facts()["working_directory"]
    return folder if os.path.isdir(folder) else str(journal.directory)


def entry(journal: Journal, working_directory: Path) -> str:
    """Shell that a coordinator elsewhere starts behind: it stands where the job was submitted, or in the job's folder.

    Nodes need not have the former. The latter is made where it holds copies; otherwise a volume that is not there
    would go unnoticed.
    """
    submitted, own = shlex.quote(str(working_directory)), shlex.quote(str(journal.directory))
    made = f"mkdir -p {own} && " if places.is_mirrored(journal.directory) else ""
    return f"{made}{{ cd {submitted} 2> /dev/null || cd {own}; }}"
