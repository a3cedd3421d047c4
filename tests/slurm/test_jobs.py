"""Whole jobs on a real Slurm of two nodes: to the end, cancelled, queued again, and with a node gone."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.local import LocalBackend
from launcher.backends.slurm import SlurmBackend
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.result import result_document
from launcher.states import JobState
from services.client import Client
from tests.launcher.fingerprint import fingerprint
from tests.launcher.leftovers import left_behind
from tests.services.running import Running, text_files, tiny_job, up
from tests.slurm.cluster import NODES, RealSlurm, until
from tests.slurm.jobs import EVERY, FAULTY, SLURM, STEPS, Watched, job_spec, random_steps

REQUEUES = 5


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The candidate's row in the result of the job in peace, on one machine, with what its checkpoint holds."""
    return _in_peace(tmp_path_factory.mktemp("undisturbed"), data=1)


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same of the job that is spread over both nodes."""
    return _in_peace(tmp_path_factory.mktemp("undisturbed-pair"), data=2)


def _in_peace(folder: Path, data: int) -> dict[str, Any]:
    home = Home(folder / "home")
    journal = create_job(job_spec(folder, {"backend": "local"}, data), home)
    assert run_job(home, journal.job_id, LocalBackend()) is JobState.SUCCEEDED
    return _row(journal)


def _row(journal: Journal) -> dict[str, Any]:
    (row,) = result_document(journal)["candidates"]
    return row | {"fingerprint": fingerprint(row["checkpoint"])}


def _assert_alike(row: dict[str, Any], calm: dict[str, Any]) -> None:
    for name in ("steps", "tokens", "flops", "train_loss", "validation_loss", "fingerprint"):
        assert row[name] == calm[name], name


def _slurm_job(watched: Watched) -> str:
    """The number that Slurm gave the job."""
    handle = SlurmBackend(fresh_seconds=0.0).find(watched.journal)
    assert handle is not None
    return str(handle["slurm_job"])


def _watched(folder: Path, pace_seconds: float = 0.2, data: int = 1, **slurm: Any) -> Watched:
    spec = job_spec(folder, SLURM | {"slurm": SLURM["slurm"] | slurm}, data)
    return Watched(Home(folder / "home"), spec, SlurmBackend(FAULTY, fresh_seconds=0.3), pace_seconds)


def test_a_job_across_two_nodes_ends_as_on_one_machine(
    slurm: RealSlurm, undisturbed_pair: dict[str, Any], tmp_path: Path
) -> None:
    spec = job_spec(tmp_path, SLURM, data=2)
    watched = Watched(Home(tmp_path / "home"), spec, SlurmBackend(fresh_seconds=0.3))
    assert watched.end() is JobState.SUCCEEDED, watched.view.error
    _assert_alike(_row(watched.journal), undisturbed_pair)
    ranks = {
        event["rank"]: event["node"]
        for event in watched.journal.events()
        if event["kind"] == "process_started" and event["role"] == "rank"
    }
    assert ranks[0] == ranks[1] != ranks[2] == ranks[3]  # tensor parallelism stays inside a node
    assert set(ranks.values()) == set(NODES)
    until(lambda: slurm.state_of("n1") == slurm.state_of("n2") == "idle", 60)
    assert left_behind(watched.journal) == []


def test_scancel_ends_a_job_that_can_be_continued(
    slurm: RealSlurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    watched = _watched(tmp_path)
    watched.until_step(2 * EVERY)
    slurm.call("scancel", _slurm_job(watched))
    assert watched.end() is JobState.FAILED
    assert "CANCELLED" in watched.view.error
    until(lambda: left_behind(watched.journal) == [], 60)
    backend = SlurmBackend(FAULTY, fresh_seconds=0.3)
    assert backend.find(watched.journal) is None
    assert run_job(watched.home, watched.journal.job_id, backend) is JobState.SUCCEEDED
    _assert_alike(_row(watched.journal), undisturbed)


def test_before_the_time_limit_a_checkpoint_is_written_and_the_job_queues_again(
    slurm: RealSlurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Slurm looks at limits twice a minute, and warns as much earlier: 60 to 90 s after the start."""
    watched = _watched(tmp_path, pace_seconds=2.5, time="3", checkpoint_seconds=90)
    watched.until(lambda: any("PENDING" in reason and "BeginTime" in reason for reason in watched.told))
    slurm.call("scontrol", "update", f"jobid={_slurm_job(watched)}", "timelimit=60")  # one warning is enough
    watched.hurry()
    assert watched.end() is JobState.SUCCEEDED, watched.view.error
    first, second = watched.view.candidate("large").gangs
    assert first.epoch < second.epoch
    assert first.ended == "signal"
    assert 0 < first.step < STEPS
    assert second.resumed_step == first.step  # no step is done twice
    assert watched.view.candidate("large").lost_device_seconds == 0
    _assert_alike(_row(watched.journal), undisturbed)


URGENT = ("sbatch", "--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--output=/dev/null")


def test_a_job_that_is_preempted_writes_a_checkpoint_and_goes_on(
    slurm: RealSlurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    watched = _preempted(slurm, tmp_path)
    first, second = watched.view.candidate("large").gangs
    assert first.epoch < second.epoch
    assert first.ended == "signal"
    assert second.resumed_step == first.step  # no step is done twice
    assert watched.view.candidate("large").lost_device_seconds == 0
    _assert_alike(_row(watched.journal), undisturbed)


def test_a_job_that_nobody_warns_of_a_preemption_goes_on_from_its_last_checkpoint(
    slurm: RealSlurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    """Slurm sends SIGTERM to everything then, and the job's own script learns nothing."""
    slurm.configure(preemption="")
    try:
        watched = _preempted(slurm, tmp_path)
    finally:
        slurm.configure()
    assert watched.view.epoch > 1
    _assert_alike(_row(watched.journal), undisturbed)
    until(lambda: left_behind(watched.journal) == [], 60)


def _preempted(slurm: RealSlurm, folder: Path) -> Watched:
    """A job that has ended well, though another one that comes first wanted its nodes for a while."""
    watched = _watched(folder, pace_seconds=1.0)
    watched.until_step(2 * EVERY)
    before = len(watched.told)
    slurm.call(*URGENT, "--wrap=sleep 5")
    watched.until(lambda: any("is PENDING" in reason for reason in watched.told[before:]), 200)
    watched.hurry()
    assert watched.end() is JobState.SUCCEEDED, watched.view.error
    return watched


def test_requeues_at_random_steps_change_nothing_but_the_bill(
    slurm: RealSlurm, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    watched = _watched(tmp_path, pace_seconds=1.0)  # what is told late does not bring the job to its end
    for epoch, step in enumerate(random_steps(REQUEUES, STEPS, seed=20), start=1):
        watched.until_step(step, epoch)
        slurm.call("scontrol", "requeue", _slurm_job(watched))
    assert watched.end(900) is JobState.SUCCEEDED, watched.view.error
    row = _row(watched.journal)
    _assert_alike(row, undisturbed)
    view = watched.view
    assert view.epoch > REQUEUES
    assert len({gang.epoch for gang in view.candidate("large").gangs}) > REQUEUES
    assert result_document(watched.journal)["attempts"] == view.epoch
    assert row["device_seconds"] > undisturbed["device_seconds"]
    until(lambda: left_behind(watched.journal) == [], 60)


@pytest.mark.parametrize("how", ["power", "operator"])
def test_a_job_that_loses_a_node_waits_with_the_reason_and_goes_on(
    slurm: RealSlurm, undisturbed_pair: dict[str, Any], tmp_path: Path, how: str
) -> None:
    """The node's processes are killed, Slurm's daemon too; or Slurm is told that the node is down."""
    watched = _watched(tmp_path, data=2)
    watched.until_step(2 * EVERY)
    before = len(watched.told)
    _take_down(slurm, "n2", how)
    try:
        waiting = re.compile(r"Slurm job \d+ is PENDING: .*(Resources|Nodes|ReqNodeNotAvail|PartitionConfig)")
        watched.until(lambda: any(waiting.match(reason) for reason in watched.told[before:]), 200)
    finally:
        _bring_back(slurm, "n2", how)
    assert watched.end() is JobState.SUCCEEDED, watched.view.error
    assert watched.view.epoch > 1
    _assert_alike(_row(watched.journal), undisturbed_pair)
    until(lambda: left_behind(watched.journal) == [], 60)


def _take_down(slurm: RealSlurm, node: str, how: str) -> None:
    if how == "power":
        slurm.lose_node(node)
    else:
        slurm.call("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


def _bring_back(slurm: RealSlurm, node: str, how: str) -> None:
    if how == "power":
        slurm.start_node(node)
    else:
        slurm.call("scontrol", "update", f"nodename={node}", "state=resume")


@pytest.fixture(scope="module")
def service(slurm: RealSlurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service whose jobs go to Slurm."""
    with up(tmp_path_factory.mktemp("service") / "home", "--mlflow", "none") as running:
        yield running


def test_an_infeasible_request_says_so_through_the_api(service: Running, tmp_path: Path) -> None:
    execution = {"backend": "slurm", "slurm": {"nodes": 2, "partition": "single"}, "devices": 1}
    client: Client = service.client()
    job = client.submit(tiny_job(text_files(tmp_path / "text"), execution=execution))
    until(lambda: "PartitionNodeLimit" in (client.job(job.id).waiting or ""), 60)
    told = client.job(job.id).waiting
    assert "execution.slurm.nodes is more than the partition allows" in told
    client.cancel(job.id)
    until(lambda: client.job(job.id).state == "cancelled", 60)


def test_a_refusal_of_slurm_is_the_job_s_error(service: Running, tmp_path: Path) -> None:
    execution = {"backend": "slurm", "slurm": {"partition": "nowhere"}, "devices": 1}
    client = service.client()
    job = client.submit(tiny_job(text_files(tmp_path / "text"), execution=execution))
    until(lambda: client.job(job.id).state == "failed", 60)
    assert "invalid partition specified" in client.job(job.id).error


def test_the_script_that_render_shows_is_one_that_slurm_takes(slurm: RealSlurm, tmp_path: Path) -> None:
    spec = job_spec(tmp_path, SLURM)
    (tmp_path / "job.yaml").write_text(json.dumps(spec.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    command = [sys.executable, "-m", "services.cli", "render", "slurm", str(tmp_path / "job.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (tmp_path / "job.sh").write_text(ended.stdout, encoding="utf-8")
    tested = subprocess.run(
        ["sbatch", "--test-only", str(tmp_path / "job.sh")], capture_output=True, text=True, timeout=60, check=False
    )
    assert tested.returncode == 0, tested.stderr
    assert "to start at" in tested.stderr
