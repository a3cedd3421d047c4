"""A job that asks for tasks of lm-evaluation-harness: checked before anything else, scored on the exports."""

from pathlib import Path

import pytest

from launcher.actors.pool import TaskFailed
from launcher.actors.session import Room
from launcher.context import JobContext
from launcher.control import Control
from launcher.journal import Journal
from launcher.spec import JobSpec
from launcher.stages.harness import check_harness
from launcher.stages.line import STAGES
from launcher.states import JobState
from tests.compression import made

QUESTIONS = [("line 1 grows and is", [" cut", " the"], 0), ("line 2", [" is", " grows"], 1)]
CONFIG = made.LLAMA.model_copy(update={"vocab_size": 257, "layers": 1})


def _job(folder: Path, room: Room, tasks: list[str]) -> JobContext:
    checkpoint = made.write_checkpoint(folder / "checkpoint", CONFIG, made.weights(CONFIG))
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {i} grows and is cut {i * i} times" for i in range(500)))
    document = {
        "name": "asked",
        "data": {
            "train": [str(text)],
            "documents": "line",
            "validation": 0.1,
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 24,
        },
        "candidates": [{"name": "given", "source": str(checkpoint)}],
        "compression": {"quantize": {"methods": ["rtn"], "bits": [4], "group_size": 16}},
        "evaluation": {"tokens": 240, "harness": {"tasks": tasks, "include": made.word_task(folder, QUESTIONS)}},
        "export": {"variants": "all"},
    }
    journal = Journal(folder / "job").create(JobSpec.model_validate(document))
    journal.claim_epoch()
    journal.set_state(JobState.STARTING)
    journal.set_state(JobState.RUNNING)
    return JobContext(journal, journal.spec(), room, Control(journal), dict)


@pytest.mark.timeout(600)
def test_scores_of_every_export_stand_in_the_report(tmp_path: Path, room: Room) -> None:
    job = _job(tmp_path, room, ["words"])
    for stage in STAGES:
        stage(job)
    job.pool.close()
    record = job.journal.stage("report")
    assert record is not None
    rows = {row["name"]: row["metrics"] for row in record.outputs["variants"]}
    assert set(rows) == {"given/dense", "given/rtn-w4g16"}
    for metrics in rows.values():
        assert metrics["harness/words/acc"] in (0.0, 0.5, 1.0)
        assert metrics["perplexity"] > 1.0


@pytest.mark.timeout(300)
def test_a_task_that_is_not_known_ends_the_job_before_it_begins(tmp_path: Path, room: Room) -> None:
    job = _job(tmp_path, room, ["words", "worlds"])
    with pytest.raises(TaskFailed, match=r"evaluation\.harness\.tasks words, worlds: .*worlds"):
        check_harness(job)
    job.pool.close()
    assert not list(job.journal.candidate_dir("given").glob("layers/*"))
