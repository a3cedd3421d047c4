"""The result document, and the picture of a job that it is made from."""

import json
from pathlib import Path

from launcher.journal import Journal
from launcher.result import result_document
from launcher.states import JobState
from tests.launcher.made import new_journal

MODEL = {"family": "gpt", "layers": 1, "hidden": 16, "heads": 2}


def _gang(journal: Journal, number: int, step: int = 0, resumed: str | None = None) -> None:
    journal.append(
        "gang_started",
        {
            "candidate": "small",
            "gang": number,
            "root": f"/r/{number}",
            "world_size": 2,
            "resumed_from": resumed,
            "resumed_step": step,
        },
    )


def _steps(journal: Journal, steps: list[int], device_seconds: float) -> None:
    rows = [{"step": step, "loss": 5.0 - step / 10, "tokens": step * 8, "flops": step * 1e6} for step in steps]
    journal.append(
        "train.step",
        {
            "candidate": "small",
            "steps": rows,
            "gang_device_seconds": device_seconds,
            "gang_wall_seconds": device_seconds / 2,
        },
    )


def test_a_job_that_has_not_begun_has_gaps(tmp_path: Path) -> None:
    document = result_document(new_journal(tmp_path, candidates=[{"name": "small", "model": MODEL}]))
    assert (document["version"], document["job"], document["state"], document["attempts"]) == (
        1,
        "job-1",
        "submitted",
        0,
    )
    assert document["variants"] == []
    (candidate,) = document["candidates"]
    assert (candidate["steps"], candidate["tokens"], candidate["device_seconds"]) == (0, 0, 0)
    assert candidate["checkpoint"] is None
    json.dumps(document, allow_nan=False)


def test_burnt_work_is_summed_over_groups_and_attempts_and_progress_is_not(tmp_path: Path) -> None:
    first = new_journal(tmp_path, candidates=[{"name": "small", "model": MODEL}])
    first.claim_epoch()
    _gang(first, 1)
    _steps(first, [1, 2, 3], 30.0)
    first.append(
        "train.checkpoint",
        {
            "candidate": "small",
            "step": 3,
            "device_seconds": 31.0,
            "gang_device_seconds": 33.0,
            "gang_wall_seconds": 16.5,
        },
    )
    _steps(first, [4, 5], 50.0)
    second = Journal(first.directory)
    second.claim_epoch()
    restart = {"reason": "coordinator lost", "from_step": 3, "lost_steps": 2, "lost_device_seconds": 19.0}
    # The group ran on after the last thing that was heard of it.
    clocks = {"gang_device_seconds": 51.0, "gang_wall_seconds": 25.5}
    second.append("restart", {"candidate": "small", **restart, **clocks})
    _gang(second, 1, step=3, resumed="/c")
    _steps(second, [4, 5, 6], 42.0)
    second.append(
        "heartbeat", {"candidate": "small", "step": 6, "gang_device_seconds": 44.0, "gang_wall_seconds": 22.0}
    )
    (candidate,) = result_document(first)["candidates"]
    assert candidate["device_seconds"] == 51.0 + 44.0
    assert candidate["lost_device_seconds"] == 19.0
    assert (candidate["steps"], candidate["tokens"], candidate["flops"]) == (6, 48, 6e6)
    assert candidate["restarts"] == 1
    assert candidate["train_loss"] == 5.0 - 0.6
    assert result_document(first)["attempts"] == 2
    view = second.view().candidate("small")
    assert [gang.checkpoint_step for gang in view.gangs] == [3, 3]
    assert [gang.replaced for gang in view.gangs] == [True, False]


def test_variants_come_from_their_events_until_the_report_stands(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    row = {
        "name": "small/dense",
        "candidate": "small",
        "recipe": {"prune": None, "quantize": None, "embedding_bits": 16},
        "quality": {"metric": "perplexity", "value": 12.0, "higher_is_better": False},
        "metrics": {"validation_loss": 2.5},
        "bytes": 100,
        "bits_per_parameter": 16.0,
        "sparsity": 0.0,
        "path": "/v",
    }
    journal.append("variant", row)
    (variant,) = result_document(journal)["variants"]
    assert variant == {"on_frontier": None, "export_bytes": None, **row}
    final = row | {"on_frontier": True, "export_bytes": 250}
    journal.commit_stage("report", "x", {"variants": [final]}, 1.0)
    assert result_document(journal)["variants"] == [final]


def test_the_end_of_a_job_stands_in_its_document(tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    journal.set_state(JobState.RUNNING)
    journal.commit_stage("compress/small/1", "x", {}, 2.0)
    journal.commit_stage("compress/small/2", "x", {}, 3.0)
    journal.append("candidate_failed", {"candidate": "small", "error": "it diverged"})
    journal.set_state(JobState.FAILED, error="1 of 1 candidates failed")
    journal.write_document("tracking/mlflow", {"url": "http://127.0.0.1:5000/#/runs/1"})
    document = result_document(journal)
    assert (document["state"], document["error"]) == ("failed", "1 of 1 candidates failed")
    assert document["candidates"][0]["error"] == "it diverged"
    assert document["stages"] == {"compress": 5.0}
    assert document["mlflow_url"] == "http://127.0.0.1:5000/#/runs/1"
