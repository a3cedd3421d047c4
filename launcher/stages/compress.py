"""Every recipe on every candidate's dense model, and the variants' files put together. Torch-free."""

import time
from typing import Any

from compression.allocation import Allotment
from compression.recipe import Recipe, grid
from compression.results import VariantFile
from launcher.context import JobContext
from launcher.journal import StageRecord, hash_inputs
from launcher.stages.planning import settled_plan
from launcher.stages.prepare import STAGE as PREPARE
from launcher.stages.work import Dense, GridWork, run_works
from parallelism.checkpoint_store import read_info

STAGE = "compress"


def dense_candidates(job: JobContext) -> list[Dense]:
    """The candidates whose dense model is there, in the order of the spec."""
    given = {source.name: source for source in settled_plan(job).sources}
    found = []
    for spec in job.spec.candidates:
        record = job.journal.stage(f"train/{spec.name}")
        if spec.name in given:
            source = given[spec.name]
            found.append(Dense(spec.name, source.source, source.model, _given_inputs(job, source.fingerprint)))
        elif record and spec.name not in job.failures:
            checkpoint = record.outputs["checkpoint"]
            found.append(Dense(spec.name, checkpoint, read_info(checkpoint).model, record.inputs_hash))
    return found


def _given_inputs(job: JobContext, fingerprint: str) -> str:
    """The text matters as well: it is what the model is calibrated and measured on."""
    prepared = job.journal.stage(PREPARE)
    assert prepared is not None
    return hash_inputs("source", fingerprint, prepared.inputs_hash)


def compress(job: JobContext) -> None:
    """Compress all layers of all candidates side by side; a layer that is committed is not made again."""
    recipes = [recipe for recipe in grid(job.spec.compression) if not recipe.recovered]
    works = [
        GridWork(job, stage_of(dense), dense, recipes, str(job.journal.candidate_dir(dense.candidate)))
        for dense in dense_candidates(job)
        if not job.journal.stage_done(stage_of(dense), _inputs(job, dense, recipes))
    ]
    if not works:
        return
    with job.stage(STAGE):
        started = time.monotonic()
        run_works(job, works)
        for work in works:
            outputs: dict[str, Any] = {"variants": [file.model_dump(mode="json") for file in work.variants()]}
            if work.allotment:
                outputs["allotment"] = work.allotment.model_dump(mode="json")
            seconds = (time.monotonic() - started) / len(works)
            job.journal.commit_stage(work.stage, _inputs(job, work.dense, recipes), outputs, seconds)


def stage_of(dense: Dense) -> str:
    """Name of the candidate's own stage."""
    return f"{STAGE}/{dense.candidate}"


def compressed(job: JobContext, dense: Dense) -> StageRecord:
    """The record of a candidate's compression. An assertion: the stage runs before whoever asks."""
    record = job.journal.stage(stage_of(dense))
    assert record is not None
    return record


def allotment_of(record: StageRecord) -> Allotment:
    """What was decided for the allocated recipes of a candidate."""
    return Allotment.model_validate(record.outputs.get("allotment", {"allocations": {}}))


def variant_files(record: StageRecord) -> list[VariantFile]:
    """The variants' files of one candidate, the dense one first."""
    return [VariantFile.model_validate(row) for row in record.outputs["variants"]]


def _inputs(job: JobContext, dense: Dense, recipes: list[Recipe]) -> str:
    calibration = job.spec.compression.calibration.model_dump(mode="json")
    rows = [recipe.model_dump(mode="json") for recipe in recipes]
    return hash_inputs(STAGE, dense.inputs, dense.source, rows, calibration)
