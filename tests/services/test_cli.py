"""The command line as a user meets it: real processes, exit codes, what is on stdout and what on stderr."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from launcher.jobs import Home, list_jobs
from launcher.states import JobState
from launcher.tracking.feed import EXPERIMENT, RUN_TAG
from launcher.tracking.process import default_uri
from tests.finished import BATCH, LENGTH, RUN_SECONDS, STEPS, FinishedJob, espalier, small_job
from tests.services.running import ROOT, command

pytestmark = pytest.mark.timeout(2 * RUN_SECONDS)  # the first test that asks for the finished job waits for it

CANDIDATE_FIELDS = {
    "name",
    "parameters",
    "layout",
    "steps",
    "tokens",
    "flops",
    "device_seconds",
    "train_loss",
    "validation_loss",
    "checkpoint",
}
VARIANT_FIELDS = {
    "name",
    "candidate",
    "recipe",
    "quality",
    "metrics",
    "bytes",
    "export_bytes",
    "bits_per_parameter",
    "sparsity",
    "on_frontier",
    "path",
}


def test_run_gives_one_document_with_candidates_and_variants(finished: FinishedJob) -> None:
    result = finished.result
    assert {"version", "job", "state", "attempts", "mlflow_url", "candidates", "variants"} <= set(result)
    assert (result["version"], result["state"], result["attempts"]) == (1, "succeeded", 1)
    assert [row["name"] for row in result["candidates"]] == ["small", "large"]
    for row in result["candidates"]:
        assert set(row) >= CANDIDATE_FIELDS
        # Never more than the budget, and less than one step below it.
        assert 0 <= finished.spec["budget"]["tokens"] - row["tokens"] < BATCH * LENGTH
        assert row["tokens"] == row["steps"] * BATCH * LENGTH
        assert row["steps"] == STEPS
        assert 0 < row["validation_loss"] < 5.6
    assert len(result["variants"]) == 2 * 3
    for row in result["variants"]:
        assert set(row) >= VARIANT_FIELDS
        assert os.path.getsize(row["path"]) == row["bytes"]
    assert any(row["on_frontier"] for row in result["variants"])


def test_progress_is_on_stderr(finished: FinishedJob) -> None:
    for part in ("of the budget", "tokens/s", "small: trained", "large: trained"):
        assert part in finished.ended.stderr


def test_layout_of_two_processes_is_seen_in_the_journal(finished: FinishedJob) -> None:
    started = [event for event in finished.journal.events() if event["kind"] == "process_started"]
    ranks = {(event["candidate"], event["rank"]) for event in started if event["role"] == "rank"}
    assert ranks == {("small", 0), ("large", 0), ("large", 1)}
    assert all(event["pid"] > 0 and event["node"] for event in started)


def test_everything_is_in_mlflow_when_the_command_ends(finished: FinishedJob) -> None:
    client = MlflowClient(default_uri(finished.home))
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = {run.data.tags.get(RUN_TAG, ""): run for run in client.search_runs([experiment.experiment_id])}
    variants = {row["name"] for row in finished.result["variants"]}
    assert set(runs) == {"", "small", "large"} | variants
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert f"/runs/{runs[''].info.run_id}?" in finished.result["mlflow_url"]
    for row in finished.result["candidates"]:
        history = client.get_metric_history(runs[row["name"]].info.run_id, "tokens")
        assert [point.step for point in history] == list(range(1, row["steps"] + 1))
        assert history[-1].value == row["tokens"]
    artifacts = {item.path for item in client.list_artifacts(runs[""].info.run_id)}
    assert {"spec.yaml", "plan.json", "result.json", "frontier.png"} <= artifacts
    for row in finished.result["variants"]:
        assert runs[row["name"]].data.metrics["perplexity"] == pytest.approx(row["metrics"]["perplexity"])


def test_frontier_as_table_document_and_figure(finished: FinishedJob, tmp_path: Path) -> None:
    png = tmp_path / "frontier.png"
    table = espalier("frontier", "last", "--home", finished.home, "--png", png)
    assert table.returncode == 0, table.stderr
    on_frontier = {row["name"] for row in finished.result["variants"] if row["on_frontier"]}
    beaten = {row["name"] for row in finished.result["variants"]} - on_frontier
    assert all(name in table.stdout for name in on_frontier)
    assert not any(f" {name} " in table.stdout for name in beaten)
    assert png.read_bytes().startswith(b"\x89PNG")
    document = json.loads(espalier("frontier", "last", "--home", finished.home, "--json").stdout)
    assert {row["name"] for row in document["variants"]} == on_frontier
    sizes = [row["bytes"] for row in document["variants"]]
    assert sizes == sorted(sizes)


def test_show_and_list_know_the_job(finished: FinishedJob) -> None:
    job = finished.result["job"]
    shown = json.loads(espalier("show", job[:6], "--home", finished.home, "--json").stdout)
    assert shown["job"] == job
    assert shown["processes"] == []
    (row,) = json.loads(espalier("list", "--home", finished.home, "--json").stdout)
    assert (row["job"], row["state"], row["running"]) == (job, "succeeded", False)


def test_finished_job_is_not_continued(finished: FinishedJob) -> None:
    ended = espalier("run", "--continue", "last", "--home", finished.home)
    assert ended.returncode == 2
    assert "nothing to continue" in ended.stderr


def test_ctrl_c_pauses_with_a_checkpoint_and_continue_ends_as_if_nothing_had_happened(
    finished: FinishedJob, tmp_path: Path
) -> None:
    home, job_file = tmp_path / "home", tmp_path / "tiny.yaml"
    # Compression after a pause is no other than without one: what is compared is the training.
    spec = {name: part for name, part in finished.spec.items() if name != "compression"}
    job_file.write_text(yaml.safe_dump(spec | {"export": {"variants": "none"}}), encoding="utf-8")
    process = subprocess.Popen(
        command("run", job_file, "--home", home, "--mlflow", "none"), stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        _wait_for_steps(home, seconds=RUN_SECONDS / 2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=RUN_SECONDS / 2)
    finally:
        process.kill()
    (journal,) = list_jobs(Home(home))
    assert process.returncode == 130, said
    assert journal.state() is JobState.PAUSED
    assert f"espalier run {job_file} --continue {journal.job_id} --home {home}" in said

    ended = espalier(
        "run", job_file, "--continue", "last", "--home", home, "--mlflow", "none", "--json", timeout=RUN_SECONDS
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["attempts"] == 2
    for continued, undisturbed in zip(result["candidates"], finished.result["candidates"], strict=True):
        for field in ("steps", "tokens", "flops", "train_loss", "validation_loss"):
            assert continued[field] == undisturbed[field], field


def _wait_for_steps(home: Path, seconds: float) -> None:
    """Until some candidate has made a step but the job is not over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for journal in list_jobs(Home(home)):
            if any(event["kind"] == "train.step" for event in journal.events()):
                return
        time.sleep(0.1)
    raise TimeoutError("no step was made")


def broken(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(small_job(tmp_path / "text") | changes), encoding="utf-8")
    return path


def test_bad_spec_is_refused_with_code_2_before_anything_is_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ended = espalier("run", broken(tmp_path, budgte=1, seed="x"), "--home", home)
    assert ended.returncode == 2
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 2
    assert "budgte: unknown field; did you mean 'budget'?" in ended.stderr
    assert 'seed: "x": should be a valid integer' in ended.stderr
    assert not home.exists()


def test_spec_that_the_planner_refuses_names_the_field(tmp_path: Path) -> None:
    candidates = [{"name": "odd", "model": {"family": "gpt", "layers": 2, "hidden": 64, "heads": 5}}]
    ended = espalier("plan", broken(tmp_path, candidates=candidates), "--home", tmp_path / "home")
    assert ended.returncode == 2
    assert "candidates.0.model" in ended.stderr


def test_errors_as_json_name_field_and_message(tmp_path: Path) -> None:
    ended = espalier("plan", broken(tmp_path, seed="x"), "--json", "--home", tmp_path)
    assert ended.returncode == 2
    (problem,) = json.loads(ended.stdout)["problems"]
    assert problem["field"] == "seed"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [1\nb: 2\n", "not valid YAML"),
        ("", "the document is empty"),
        ("- 1\n", "the document is a list"),
    ],
)
def test_files_that_are_no_job_files(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content, encoding="utf-8")
    ended = espalier("plan", path, "--home", tmp_path)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_missing_file_and_unknown_job_are_told_in_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (("plan", tmp_path / "none.yaml"), "name a job file that exists"),
        (("show", "nothing"), "is unknown"),
        (("run",), "name a job file"),
    ):
        ended = espalier(*arguments, "--home", tmp_path)
        assert ended.returncode == 2
        assert said in ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    ended = espalier("plan", tmp_path / "none.yaml", "--debug", "--home", tmp_path)
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr


def test_faults_of_the_software_are_two_lines_and_a_traceback_with_debug(tmp_path: Path) -> None:
    script = (
        "import sys, services.cli as cli\n"
        "def list_jobs(home): raise KeyError('lost')\n"
        "cli.list_jobs = list_jobs\n"
        f"sys.argv = ['espalier', 'list', '--home', {str(tmp_path)!r}] + sys.argv[1:]\n"
        "cli.main()\n"
    )
    quiet, loud = (
        subprocess.run([sys.executable, "-c", script, *more], capture_output=True, text=True, cwd=ROOT, timeout=60)
        for more in ([], ["--debug"])
    )
    assert quiet.returncode == loud.returncode == 1
    assert quiet.stderr.splitlines()[0].startswith("internal error: KeyError: 'lost'")
    assert "--debug" in quiet.stderr.splitlines()[1]
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr


def test_presets_are_listed_by_size() -> None:
    rows = json.loads(espalier("presets", "--json").stdout)
    sizes = [row["parameters"] for row in rows]
    assert sizes == sorted(sizes)
    assert {"gpt2-xl", "megatron-8.3b", "turing-nlg-17b"} <= {row["name"] for row in rows}


def test_plan_says_what_a_job_takes_and_starts_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    ended = espalier("plan", broken(tmp_path), "--json", "--home", home)
    assert ended.returncode == 0, ended.stderr
    rows = {row["name"]: row for row in json.loads(ended.stdout)["candidates"]}
    assert rows["large"]["layout"]["tensor"] == 2
    assert rows["small"]["parameters"] < rows["large"]["parameters"]
    assert not (home / "jobs").exists()


def test_commands_load_neither_the_job_store_nor_what_makes_pages() -> None:
    """What `--help`, `list` and `presets` do without takes longer to load than they take to run."""
    script = "import sys, services.cli; print(*{'sqlalchemy', 'alembic', 'jinja2', 'mako'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout.split() == []


def test_version() -> None:
    ended = espalier("--version")
    assert (ended.returncode, ended.stdout.strip()) == (0, "0.1.0")
