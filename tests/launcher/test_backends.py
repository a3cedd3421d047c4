"""What every back-end does, of this machine and of a Ray cluster of two nodes; and what is the Ray cluster's own."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import BackendUnavailable, Phase
from launcher.backends.local import LocalBackend
from launcher.backends.ray import JobsApi, RayBackend, submission_id
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.planning.clusters import cluster_of, placement_problems
from launcher.result import result_document
from launcher.spec import JobSpec
from launcher.states import JobState
from tests.finished import FinishedJob
from tests.launcher.conformance import (
    MANY,
    QUICK,
    BackendContract,
    Place,
    make_place,
)
from tests.launcher.fingerprint import fingerprint
from tests.launcher.made import new_journal, spec_document
from tests.launcher.ray_cluster import CPUS, RayCluster, ray_cluster

RAY = {"backend": "ray"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as found:
        yield found


@pytest.fixture(params=["local", "ray"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A back-end that needs nothing to be installed."""
    if request.param == "local":
        return make_place(LocalBackend, tmp_path, {}, seconds=60)
    return _ray_place(request.getfixturevalue("cluster"), tmp_path)


def _ray_place(cluster: RayCluster, folder: Path) -> Place:
    place = make_place(RayBackend, folder, RAY, seconds=90)
    _offer(cluster, place.home)
    return place


def _offer(cluster: RayCluster, home: Home) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / "profiles.yaml").write_text(cluster.profile(), encoding="utf-8")


def test_a_job_on_a_cluster_of_two_nodes_has_the_weights_of_one_machine(
    cluster: RayCluster, finished: FinishedJob, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    _offer(cluster, home)
    (large,) = [one for one in finished.spec["candidates"] if one["name"] == "large"]
    changes: dict[str, Any] = {"candidates": [large], "compression": {}, "export": {"variants": "none"}}
    spec = JobSpec.model_validate(finished.spec | changes | {"execution": {"devices": 2, **RAY}})
    assert list(placement_problems(spec, home.root)) == []
    journal = create_job(spec, home)
    assert run_job(home, journal.job_id) is JobState.SUCCEEDED, Journal(journal.directory).view().error
    (row,) = result_document(journal)["candidates"]
    assert fingerprint(row["checkpoint"]) == finished.fingerprints["large"]
    ranks = [event for event in journal.events() if event["kind"] == "process_started" and event["role"] == "rank"]
    assert len({event["node_id"] for event in ranks}) == 1  # tensor parallelism stays inside a node
    rows = JobsApi(cluster.address, cluster.token_file).list()
    assert submission_id(journal.job_id, 1) in {row["submission_id"] for row in rows}


def test_a_submission_s_id_follows_from_the_job_and_is_taken_once(cluster: RayCluster, tmp_path: Path) -> None:
    place = _ray_place(cluster, tmp_path)
    journal, first, second = place.journal(MANY), RayBackend(QUICK), RayBackend(QUICK)
    handle = first.submit(journal)
    try:
        assert handle["submission"] == submission_id(journal.job_id, 1)
        assert second.submit(journal) == handle  # before its epoch is claimed there is one submission
        mine = [row for row in JobsApi(cluster.address, cluster.token_file).list() if journal.job_id in str(row)]
        assert len(mine) == 1
        assert mine[0]["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "660"
    finally:
        first.stop(handle, 0)


def test_a_job_that_somebody_stopped_at_the_cluster_is_not_started_again(cluster: RayCluster, tmp_path: Path) -> None:
    _, backend, handle = _ray_place(cluster, tmp_path).running()
    JobsApi(cluster.address, cluster.token_file).stop(handle["submission"])
    _ray_place(cluster, tmp_path).until(lambda: backend.status(handle).phase is Phase.ENDED)
    status = backend.status(handle)
    assert status.final
    assert "STOPPED" in status.reason


def test_a_wrong_token_is_told_with_a_remedy(cluster: RayCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64, encoding="ascii")
    place = _ray_place(replace(cluster, token_file=wrong), tmp_path)
    with pytest.raises(ValueError, match=r"refuses the token .*the operator names the right one as ray\.token_file"):
        RayBackend(QUICK).submit(place.journal(MANY))


def test_a_cluster_that_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    journal = new_journal(tmp_path / "home" / "jobs", execution=RAY)
    _offer(RayCluster("http://127.0.0.1:9", tmp_path / "none"), Home(tmp_path / "home"))
    (tmp_path / "none").write_text("0", encoding="ascii")
    with pytest.raises(BackendUnavailable, match="does not answer"):
        RayBackend(QUICK).submit(journal)
    handle = {"submission": "x", "address": "http://127.0.0.1:9", "token_file": None, "stop_file": ""}
    status = RayBackend(QUICK).status(handle)
    assert status.phase is Phase.WAITING
    assert "the Ray cluster at http://127.0.0.1:9 does not answer" in status.reason


def test_what_a_job_gets_wrong_about_a_ray_cluster_is_told(tmp_path: Path) -> None:
    spec = JobSpec.model_validate(spec_document(execution=RAY))
    (problem,) = placement_problems(spec, tmp_path)
    assert (problem.field, problem.what) == ("execution.profile", "it says of no Ray cluster")
    _offer(RayCluster("http://127.0.0.1:9", tmp_path / "token"), Home(tmp_path))
    data = spec_document()["data"] | {"train": ["text/*.txt", "/text/*.txt"]}
    wrong = JobSpec.model_validate(spec_document(data=data, execution=RAY | {"threads_per_rank": 4}))
    assert {problem.field for problem in placement_problems(wrong, tmp_path)} == {
        "data.train.0",
        "execution.threads_per_rank",
    }
    cluster = cluster_of(spec, tmp_path)
    assert (cluster.devices, cluster.devices_per_node) == (2 * CPUS, CPUS)


class TestBackends(BackendContract):
    """On this machine, and on a Ray cluster."""
