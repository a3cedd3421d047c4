"""The real coordinator with a toy trainer: ``python -m tests.launcher.toy_coordinator JOURNAL_DIR --address own …``."""

import sys
from pathlib import Path

from launcher.actors.gang import CandidateRun
from launcher.actors.workers import GroupShape
from launcher.context import JobContext
from launcher.coordinator import coordinate, parse
from launcher.stages.training import failures, train_candidates
from parallelism.budget import Burnt
from parallelism.checkpoint_store import CheckpointInfo
from parallelism.layout import Layout
from parallelism.models.gpt.config import GPTConfig
from parallelism.training import TrainingConfig, TrainTask


def train(job: JobContext) -> None:
    """Every candidate with the toy trainer; done ones are not trained again."""
    runs = [
        _run(job, spec.name) for spec in job.spec.candidates if not job.journal.stage_done(f"train/{spec.name}", "")
    ]

    def trained(run: CandidateRun) -> None:
        assert run.result is not None
        job.journal.commit_stage(f"train/{run.name}", "", run.result.model_dump(mode="json"), 0.0)

    train_candidates(job, runs, trained)
    job.failures.update(failures(runs))


def _run(job: JobContext, name: str) -> CandidateRun:
    def make_task(root: Path, resumed: CheckpointInfo | None, burnt: Burnt) -> TrainTask:
        return TrainTask(
            name=name,
            seed=1,
            model=GPTConfig(layers=1, hidden=16, heads=2),
            layout=Layout(),
            training=TrainingConfig(),
            budget=job.spec.budget,
            data_dir="",
            sequence_length=8,
            checkpoint_dir=str(root),
            checkpoint=job.spec.execution.checkpoint_every,
            resume_from=str(resumed.path) if resumed else None,
            epoch=job.journal.epoch,
            burnt_device_seconds=burnt.device_seconds,
            burnt_wall_seconds=burnt.wall_seconds,
        )

    layout = next(spec.layout for spec in job.spec.candidates if spec.name == name) or Layout()
    return CandidateRun(
        job.journal,
        name,
        GroupShape(layout.world_size, layout.tensor, job.room.threads),
        make_task,
        max_restarts=job.spec.execution.max_restarts,
        stall_seconds=job.spec.execution.stall_seconds,
        function="tests.launcher.toys:pretend_to_train",
        connected=False,
    )


if __name__ == "__main__":
    sys.exit(coordinate(parse(), [train]))
