"""The batch script of a job, its options, and what Slurm's answers mean."""

import errno
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.backends.base import Phase
from launcher.backends.slurm import home_of, render_job, slurm_job, write_token
from launcher.backends.slurm_options import SlurmOptions
from launcher.backends.slurm_queue import QueuedJob, SlurmRefused, read_queue
from launcher.backends.slurm_rest import properties_of
from launcher.backends.slurm_script import SlurmJob, job_name, render
from launcher.planning.cluster import GIBI
from launcher.planning.clusters import cluster_of, placement_problems
from launcher.problems import SpecError
from launcher.profiles import Container, Profile, SlurmProfile, load_profiles, profile_named
from launcher.spec import JobSpec, parse_spec
from tests.launcher.made import new_journal, spec_document

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

JOB = SlurmJob(
    job_id="tiny-3fa9c1",
    journal=Path("/shared/home/jobs/tiny-3fa9c1"),
    working_directory=Path("/shared/anna's files"),
    log=Path("/shared/home/jobs/tiny-3fa9c1/logs/coordinator.log"),
    token_file=Path("/shared/home/jobs/tiny-3fa9c1/cluster/token"),
    stop_file=Path("/shared/home/jobs/tiny-3fa9c1/cluster/stop"),
    python="/shared/espalier/bin/python",
    python_path="/shared/espalier/code",
    threads_per_rank=4,
    environment={"RAY_AUTH_MODE": "token"},
)
ASKED = SlurmOptions(
    nodes=4,
    gpus_per_node=8,
    memory_gib_per_node=900,
    partition="gpu",
    account="lm-42",
    qos="long",
    time="1-12:00:00",
    constraint="a100&ib",
    checkpoint_seconds=300,
)
OPERATORS = SlurmProfile(
    python="python3.11",
    container=Container(image="/images/espalier.sqsh", mounts=["/shared:/shared", "/etc/slurm:/etc/slurm:ro"]),
    modules=["cuda/12.8", "nccl"],
    directives=["--exclusive"],
    lines=["ulimit -l unlimited"],
    environment={"NCCL_SOCKET_IFNAME": "ib0"},
    pass_environment=["AWS_PROFILE"],
)


@pytest.mark.parametrize(
    ("name", "options", "profile"),
    [("slurm-gpus.sh", ASKED, OPERATORS), ("slurm-plain.sh", SlurmOptions(nodes=2, cpus_per_node=8), SlurmProfile())],
)
def test_script_is_the_golden_one_and_bash_reads_it(name: str, options: SlurmOptions, profile: SlurmProfile) -> None:
    text = render(JOB, options, profile)
    assert text == (GOLDEN / name).read_text(encoding="utf-8")
    assert text == render(JOB, options, profile)
    read = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=30, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def test_what_slurm_is_told_stands_before_the_first_command() -> None:
    """Slurm reads its lines only up to there."""
    lines = render(JOB, ASKED, OPERATORS).splitlines()
    told = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(told) < first_command
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR2@300"} <= set(lines)


def test_half_a_token_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(count: int) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("launcher.backends.slurm.secrets.token_hex", full)
        with pytest.raises(OSError, match="No space"):
            write_token(tmp_path / "token")
    assert list(tmp_path.iterdir()) == []
    write_token(tmp_path / "token")
    assert len((tmp_path / "token").read_text()) == 64


def test_the_token_is_in_a_file_of_its_owner_and_not_in_the_script(tmp_path: Path) -> None:
    journal = new_journal(tmp_path / "home" / "jobs", execution={"backend": "slurm"})
    journal.cluster_dir.mkdir()
    token = journal.cluster_dir / "token"
    write_token(token)
    secret = token.read_text()
    assert len(secret) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    write_token(token)
    assert token.read_text() == secret
    job = slurm_job(journal.spec(), journal, journal.job_id, tmp_path)
    script = render_job(journal.spec(), home_of(journal), job)
    assert secret not in script
    assert str(token) in script
    assert f"#SBATCH --job-name={job_name(journal.job_id)}" in script


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"nodes": 0}, "greater than 0"),
        ({"partition": "gpu\n#SBATCH --uid=0"}, "use letters, digits"),
        ({"account": "a b"}, "use letters, digits"),
        ({"time": 14400}, "write the time in quotes"),  # how YAML reads 4:00:00
        ({"time": "soon"}, "write minutes, MM:SS, HH:MM:SS"),
        ({"constraint": "a100 & $(id)"}, "without blanks"),
        ({"container": "/image"}, "Extra inputs"),
    ],
)
def test_an_option_that_slurm_could_not_read_is_refused(given: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValidationError, match=remedy):
        SlurmOptions.model_validate(given)


def test_a_wrong_option_is_told_by_its_field() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec_document(execution={"backend": "slurm", "slurm": {"time": 14400, "qos": ";"}}))
    problems = {problem.field: problem.message for problem in caught.value.problems}
    assert set(problems) == {"execution.slurm.time", "execution.slurm.qos"}
    assert problems["execution.slurm.time"].startswith("14400: a number is ambiguous; write the time in quotes")


@pytest.mark.parametrize("time", ["90", "30:00", "4:00:00", "2-12", "2-12:30", "2-12:30:00"])
def test_times_that_slurm_reads(time: str) -> None:
    assert SlurmOptions(time=time).time == time


def _spec(**execution: Any) -> JobSpec:
    return JobSpec.model_validate(spec_document(execution={"backend": "slurm", **execution}))


def _write_profiles(home: Path, text: str) -> Path:
    home.mkdir(parents=True, exist_ok=True)
    (home / "profiles.yaml").write_text(text, encoding="utf-8")
    return home


def _problems(spec: JobSpec, home: Path) -> dict[str, str]:
    return {problem.field: problem.message for problem in placement_problems(spec, home)}


def test_what_a_job_gets_wrong_about_its_place_is_told_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = _write_profiles(tmp_path, "default: {slurm: {partitions: [cpu, gpu]}}")
    monkeypatch.setenv("PATH", "")
    wrong = _spec(threads_per_rank=4, slurm={"partition": "vip", "gpus_per_node": 2, "cpus_per_node": 2})
    found = _problems(wrong, home)
    assert found == {
        "execution.backend": '"slurm": sbatch is not on this machine; submit where Slurm\'s commands are,'
        " or the operator names slurmrestd as slurm.rest in the profile",
        "execution.slurm.cpus_per_node": "2: one rank needs 4 (execution.threads_per_rank); use 4 or more",
        "execution.slurm.partition": '"vip": the profile does not offer this partition; use one of cpu, gpu',
        "execution.profile": '"default": it does not say what the GPUs are; the operator adds slurm: {gpu: {name: ...,'
        " memory_gib: ...}} to it in profiles.yaml",
    }
    through_rest = "default: {slurm: {rest: {url: 'http://ctl:6820', user: anna, token_file: /token}}}"
    assert _problems(_spec(), _write_profiles(tmp_path / "rest", through_rest)) == {}
    assert _problems(_spec(profile="nowhere"), home) == {
        "execution.profile": '"nowhere": unknown profile; available: default'
    }


def test_the_planner_sees_the_allocation(tmp_path: Path) -> None:
    text = "big: {slurm: {gpu: {name: NVIDIA H100 80GB HBM3, memory_gib: 80, host_memory_gib: 2048}}}"
    home = _write_profiles(tmp_path, text)
    gpus = cluster_of(_spec(profile="big", slurm={"nodes": 4, "gpus_per_node": 8}), home)
    assert (gpus.device_kind, gpus.devices, gpus.devices_per_node) == ("gpu", 32, 8)
    assert (gpus.memory_bytes_per_device, gpus.host_memory_bytes_per_device) == (80 * GIBI, 256 * GIBI)
    assert gpus.peak_flops == 989e12
    options = {"nodes": 3, "cpus_per_node": 16, "memory_gib_per_node": 64}
    cpus = cluster_of(_spec(threads_per_rank=4, slurm=options), home)
    assert (cpus.device_kind, cpus.devices, cpus.devices_per_node) == ("cpu", 12, 4)
    assert cpus.memory_bytes_per_device == 16 * GIBI


def test_profiles_are_the_operator_s_file(tmp_path: Path) -> None:
    assert load_profiles(tmp_path) == {"default": Profile()}
    home = _write_profiles(tmp_path, "gpu: {slurm: {modules: [cuda]}}")
    assert profile_named(home, "gpu").slurm.modules == ["cuda"]
    with pytest.raises(ValueError, match=r"execution.profile 'cpu' is unknown: .*profiles.yaml has default, gpu"):
        profile_named(home, "cpu")
    _write_profiles(tmp_path, "gpu: {slurm: {moduls: [cuda]}}")
    with pytest.raises(SpecError, match=r"gpu\.slurm\.moduls: unknown field"):
        load_profiles(tmp_path)


def _row(**changes: Any) -> dict[str, Any]:
    return {"job_id": 7, "name": "espalier-x", "job_state": "PENDING", "state_reason": "None"} | changes


OLD_AND_NEW = [
    (
        _row(state_reason="PartitionNodeLimit"),
        (Phase.WAITING, None, False),
        "PartitionNodeLimit (execution.slurm",
    ),
    (_row(job_state="RUNNING", nodes="n[1-2]", start_time=99), (Phase.RUNNING, None, False), "on n[1-2]"),
    (_row(job_state=["RUNNING"], start_time={"set": True, "number": 99}), (Phase.RUNNING, None, False), ""),
    (_row(job_state="COMPLETING", nodes="n1", start_time=99), (Phase.RUNNING, None, False), ""),
    (_row(job_state="FAILED", exit_code=768), (Phase.ENDED, 3, False), "FAILED with exit code 3"),
    (
        _row(job_state=["FAILED"], exit_code={"return_code": {"set": True, "number": 3}, "signal": {}}),
        (Phase.ENDED, 3, False),
        "FAILED with exit code 3",
    ),
    (_row(job_state="FAILED", exit_code=9), (Phase.ENDED, -9, False), "FAILED with exit code -9"),
    (_row(job_state="COMPLETED", exit_code=0), (Phase.ENDED, 0, False), "COMPLETED"),
    (_row(job_state="TIMEOUT", exit_code=0), (Phase.ENDED, None, False), "TIMEOUT"),
    (_row(job_state="NODE_FAIL", exit_code=0), (Phase.ENDED, None, False), "NODE_FAIL"),
    (_row(job_state="CANCELLED", exit_code=0), (Phase.ENDED, None, True), "CANCELLED"),
    (_row(job_state="OUT_OF_MEMORY", exit_code=9), (Phase.ENDED, None, True), "OUT_OF_MEMORY"),
]


@pytest.mark.parametrize(("row", "expected", "told"), OLD_AND_NEW)
def test_slurm_s_states_in_this_project_s_words(row: dict[str, Any], expected: tuple[Any, ...], told: str) -> None:
    (job,) = read_queue(json.dumps({"jobs": [row]}))
    status = job.status()
    assert (status.phase, status.exit_code, status.final) == expected
    assert status.since == (99.0 if status.phase is Phase.RUNNING else 0.0)
    assert told in status.reason


def test_an_unknown_reason_is_shown_as_it_is() -> None:
    job = QueuedJob(7, "x", "PENDING", "SomethingNew", None, 0.0, 0, "")
    assert job.status().reason == "Slurm job 7 is PENDING: SomethingNew"
    assert replace(job, reason="None").status().reason == "Slurm job 7 is PENDING"


def test_what_the_script_asks_for_is_said_in_slurmrestd_s_words() -> None:
    script = render(JOB, ASKED, OPERATORS)
    found = properties_of(script, {"HOME": "/home/anna", "AWS_PROFILE": "lab", "SECRET": "x"})
    assert found == {
        "name": "espalier-tiny-3fa9c1",
        "nodes": [4, 4],
        "tasks_per_node": 1,
        "cpus_per_task": 32,
        "gpus_per_node": "8",
        "memory_per_node": 921600,
        "partition": "gpu",
        "account": "lm-42",
        "qos": "long",
        "time_limit": 36 * 60,
        "constraints": "a100&ib",
        "current_working_directory": "/shared/anna's files",
        "standard_output": "/shared/home/jobs/tiny-3fa9c1/logs/coordinator.log",
        "open_mode": "append",
        "environment": {"HOME": "/home/anna", "AWS_PROFILE": "lab"},
        "requeue": True,
        "exclusive": "true",
    }
    for directive in ("#SBATCH --x11", "#SBATCH -p gpu"):
        with pytest.raises(SlurmRefused, match="slurmrestd takes no"):
            properties_of(directive, {})


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("1:30", 2), ("4:00:00", 240), ("2-12", 3600), ("1-0:30", 1470), ("0-0:0:1", 1)],
)
def test_times_are_whole_minutes_for_slurmrestd(time: str, minutes: int) -> None:
    assert properties_of(f"#SBATCH --time={time}", {}) == {"time_limit": minutes}
