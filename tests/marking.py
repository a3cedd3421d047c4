"""Marks for every test of a folder, for the ``conftest.py`` in it."""

from pathlib import Path

import pytest


def mark_folder(items: list[pytest.Item], folder: Path, name: str, timeout_seconds: float) -> None:
    """Give the tests below ``folder`` a marker and a time limit; the hook is given the items of the whole run."""
    for item in items:
        if folder in item.path.parents:
            item.add_marker(name)
            item.add_marker(pytest.mark.timeout(timeout_seconds))
