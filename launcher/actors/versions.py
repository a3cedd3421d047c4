"""What both sides of a dispatch have to have alike: espalier, Python, Ray. Torch-free.

Whoever dispatches a job notes its own versions in the journal; the coordinator, wherever it runs, holds its own against
them before it does anything else, and every worker's process those of its node.
"""

import platform
from collections.abc import Mapping
from importlib.metadata import version

from launcher.journal import Journal, code_version

DOCUMENT = "dispatched"


class VersionsDiffer(ValueError):
    """Two sides of a dispatch could not work on one job."""


def versions_here() -> dict[str, str]:
    """Of this process; of Python, what decides whether pickles and wheels fit."""
    return {
        "espalier": code_version(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "ray": version("ray"),
    }


def note_dispatch(journal: Journal) -> None:
    """Leave this side's versions in the journal, for the coordinator that is about to be started."""
    journal.write_document(DOCUMENT, {"versions": versions_here()})


def check_dispatched(journal: Journal, where: str) -> None:
    """Raise :class:`VersionsDiffer` where this process is not as whoever dispatched the job."""
    document = journal.document(DOCUMENT)
    if document is not None:  # jobs that were dispatched by an older espalier say nothing
        check_versions(document["versions"], where)


def check_versions(expected: Mapping[str, str], where: str) -> None:
    """Raise :class:`VersionsDiffer`, naming each difference and what to do, where this process has others."""
    here = versions_here()
    differing = [
        f"{name} {here.get(name, 'none')} (the job was dispatched with {wanted})"
        for name, wanted in expected.items()
        if here.get(name) != wanted
    ]
    if differing:
        raise VersionsDiffer(
            f"{where} has {', '.join(differing)}: install the same on both sides (the profile names the image, or the "
            "Python, that is used there)"
        )
