"""The plan that training follows, made once: what a restart computed anew could differ in a last digit. Torch-free."""

from typing import Any

from launcher.cluster import Cluster, local_cluster
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.plan import CandidatePlan, Plan, make_plan
from launcher.session import Room
from launcher.spec import CandidateSpec, JobSpec
from launcher.stages.prepare import STAGE as PREPARE
from parallelism.checkpoint_store import read_model

STAGE, DOCUMENT = "plan", "plan"


def plan(job: JobContext) -> None:
    """Settle every candidate's model, layout and batch.

    The plan that the job was submitted with stands, as long as it fits the tokenizer and the cluster. On a smaller
    cluster candidates get other layouts, but the same model, batch and learning rate, so that training can go on.
    """
    prepared = job.journal.stage(PREPARE)
    assert prepared is not None
    vocab_size: int = prepared.outputs["vocab_size"]
    inputs = hash_inputs(STAGE, prepared.inputs_hash, job.spec.model_dump(mode="json"), job.room.devices)
    if job.journal.stage_done(STAGE, inputs):
        return
    with job.stage(STAGE) as clock:
        settled = read_plan(job.journal.document(DOCUMENT))
        if settled is None or not _suits(settled, vocab_size, job.room):
            cluster = _cluster(job.spec, job.room)
            settled = make_plan(_with_settled_training(job.spec, settled, vocab_size), cluster, vocab_size)
        document = settled.model_dump(mode="json")
        job.journal.write_document(DOCUMENT, document)
        job.journal.commit_stage(STAGE, inputs, {"plan": document}, clock.seconds())


def candidate_plans(job: JobContext) -> list[CandidatePlan]:
    """The settled plan, candidate by candidate."""
    record = job.journal.stage(STAGE)
    assert record is not None
    settled = read_plan(record.outputs["plan"])
    assert settled is not None
    return settled.candidates


def read_plan(document: dict[str, Any] | None) -> Plan | None:
    """A plan from its JSON document, every model as its family's class."""
    if document is None:
        return None
    rows = [row | {"model": read_model(row["model"])} for row in document["candidates"]]
    return Plan.model_validate(document | {"candidates": rows})


def _suits(settled: Plan, vocab_size: int, room: Room) -> bool:
    return all(
        candidate.model.vocab_size == vocab_size and candidate.layout.world_size <= room.devices
        for candidate in settled.candidates
    )


def _with_settled_training(spec: JobSpec, settled: Plan | None, vocab_size: int) -> JobSpec:
    """The spec with ``auto`` replaced by what was settled before, but for what depends on the layout."""
    if settled is None or any(candidate.model.vocab_size != vocab_size for candidate in settled.candidates):
        return spec
    candidates = [
        _settled_candidate(candidate, planned)
        for candidate, planned in zip(spec.candidates, settled.candidates, strict=True)
    ]
    return spec.model_copy(update={"candidates": candidates})


def _settled_candidate(candidate: CandidateSpec, planned: CandidatePlan) -> CandidateSpec:
    training = planned.training.model_copy(update={"micro_batch": candidate.training.micro_batch})
    return candidate.model_copy(update={"training": training})


def _cluster(spec: JobSpec, room: Room) -> Cluster:
    local = local_cluster(spec)
    return local.model_copy(
        update={"devices": room.devices, "devices_per_node": min(room.devices, local.devices_per_node)}
    )
