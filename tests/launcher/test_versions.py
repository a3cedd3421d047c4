"""Sides of a dispatch that differ are told before anything is done."""

from pathlib import Path

import pytest

from launcher.actors import versions
from launcher.actors.versions import (
    DOCUMENT,
    VersionsDiffer,
    check_dispatched,
    check_versions,
    note_dispatch,
    versions_here,
)
from launcher.backends import ray as ray_backend
from launcher.backends.local import LocalBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.finished import small_job

TOY = "tests.launcher.toy_coordinator"


def _job(folder: Path) -> tuple[Home, Journal]:
    home = Home(folder / "home")
    return home, create_job(JobSpec.model_validate(small_job(folder / "text")), home)


def test_every_difference_is_named_with_what_to_do() -> None:
    check_versions(versions_here(), "node n1")
    with pytest.raises(VersionsDiffer) as told:
        check_versions({"espalier": "9.9", "python": versions_here()["python"], "ray": "1.0"}, "node n1")
    text = str(told.value)
    mine = versions_here()["espalier"]
    assert text.startswith(f"node n1 has espalier {mine} (the job was dispatched with 9.9), ray ")
    assert "python" not in text.partition(":")[0]
    assert "install the same on both sides" in text


def test_a_job_that_was_dispatched_before_this_was_noted_is_taken(tmp_path: Path) -> None:
    _, journal = _job(tmp_path)
    check_dispatched(journal, "here")
    note_dispatch(journal)
    check_dispatched(journal, "here")
    assert journal.document(DOCUMENT) == {"versions": versions_here()}


def test_a_coordinator_of_another_version_refuses_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, journal = _job(tmp_path)
    monkeypatch.setattr(versions, "code_version", lambda: "9.9")  # here, and not in the coordinator's process
    assert run_job(home, journal.job_id, LocalBackend(TOY)) is JobState.FAILED
    view = journal.view()
    assert "(the job was dispatched with 9.9)" in view.error
    assert view.epoch == 1  # not tried again


def test_a_cluster_with_another_ray_is_refused_before_the_job_is_submitted() -> None:
    ray_backend._check_ray("http://head:8265", versions_here()["ray"])
    with pytest.raises(ValueError, match=r"http://head:8265 has Ray 1\.0, and this side has"):
        ray_backend._check_ray("http://head:8265", "1.0")
