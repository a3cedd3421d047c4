"""Folders that nobody else has put anything into."""

import os
from pathlib import Path

import pytest

from parallelism.private import private_folder


def test_a_folder_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    folder = private_folder(tmp_path / "own")
    (folder / "kept").touch()
    folder.chmod(0o777)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    assert (folder / "kept").exists()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="set TMPDIR to a folder of your own"):
        private_folder(tmp_path / "link")


def test_somebody_else_s_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    me = os.getuid()
    monkeypatch.setattr("parallelism.private.os.getuid", lambda: me + 1)
    with pytest.raises(PermissionError, match="is somebody else's"):
        private_folder(tmp_path / "theirs")
