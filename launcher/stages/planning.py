"""The plan that training follows, made once: what a restart computed anew could differ in a last digit. Torch-free."""

from collections.abc import Mapping

from launcher.actors.session import Room
from launcher.context import JobContext
from launcher.journal import hash_inputs
from launcher.planning.cluster import Cluster, local_cluster
from launcher.planning.plan import DOCUMENT, LAYOUTS, CandidatePlan, Plan, make_plan, read_plan, with_layouts
from launcher.spec import CandidateSpec, JobSpec
from launcher.stages.prepare import STAGE as PREPARE
from parallelism.layout import Layout

STAGE = "plan"


def plan(job: JobContext) -> None:
    """Settle every candidate's model, layout and batch.

    The plan that the job was submitted with stands, as long as it fits the tokenizer and the cluster. On a smaller
    cluster, or where the owner asked for it since, candidates get other layouts, but the same model, batch and learning
    rate, so that training can go on.
    """
    prepared = job.journal.stage(PREPARE)
    assert prepared is not None
    vocab_size: int = prepared.outputs["vocab_size"]
    wished = {name: Layout.model_validate(row) for name, row in (job.journal.document(LAYOUTS) or {}).items()}
    spec = with_layouts(job.spec, wished)
    inputs = hash_inputs(STAGE, prepared.inputs_hash, spec.model_dump(mode="json"), job.room.devices)
    if job.journal.stage_done(STAGE, inputs):
        return
    with job.stage(STAGE) as clock:
        document = job.journal.document(DOCUMENT)
        settled = read_plan(document) if document else None
        if settled is None or not _suits(settled, vocab_size, job.room) or not _as_wished(settled, wished):
            cluster = _cluster(spec, job.room)
            settled = make_plan(_with_settled_training(spec, settled, vocab_size), cluster, vocab_size)
        plan_document = settled.model_dump(mode="json")
        job.journal.write_document(DOCUMENT, plan_document)
        job.journal.commit_stage(STAGE, inputs, {"plan": plan_document}, clock.seconds())


def candidate_plans(job: JobContext) -> list[CandidatePlan]:
    """The settled plan of those that are trained."""
    return settled_plan(job).candidates


def settled_plan(job: JobContext) -> Plan:
    """The plan that the job follows. An assertion: the stage runs before whoever asks."""
    record = job.journal.stage(STAGE)
    assert record is not None
    return read_plan(record.outputs["plan"])


def _suits(settled: Plan, vocab_size: int, room: Room) -> bool:
    runs = [*settled.candidates, *(one for lineage in settled.lineages for one in lineage.recoveries)]
    known = all(candidate.model.vocab_size == vocab_size for candidate in settled.candidates)
    return known and all(run.layout.world_size <= room.devices for run in runs)


def _as_wished(settled: Plan, wished: Mapping[str, Layout]) -> bool:
    return all(one.layout == wished.get(one.name, one.layout) for one in settled.candidates)


def _with_settled_training(spec: JobSpec, settled: Plan | None, vocab_size: int) -> JobSpec:
    """The spec with ``auto`` replaced by what was settled before, but for what depends on the layout."""
    if settled is None or any(candidate.model.vocab_size != vocab_size for candidate in settled.candidates):
        return spec
    planned = {candidate.name: candidate for candidate in settled.candidates}
    candidates = [
        _settled_candidate(candidate, planned[candidate.name]) if candidate.name in planned else candidate
        for candidate in spec.candidates
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
