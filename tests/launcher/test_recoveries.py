"""Recovery: what the planner says of it before a job starts, and that the job does what was planned."""

from typing import Any

import pytest

from compression.recipe import grid
from compression.reduced import reduced_config
from launcher.jobs import Home, create_job, run_job
from launcher.journal import Journal
from launcher.planning.cluster import Cluster
from launcher.planning.plan import CandidatePlan, Plan, make_plan, read_plan
from launcher.planning.recoveries import RecoveryPlan
from launcher.problems import SpecError
from launcher.result import result_document
from launcher.spec import JobSpec
from launcher.states import JobState
from parallelism.accounting import train_flops_per_sequence
from parallelism.layout import Layout
from parallelism.memory import Companions, memory_by_stage
from tests.launcher.made import cpus, spec_document

VOCABULARY, LENGTH = 4096, 256
MIDDLE = {"layers": 8, "hidden": 512, "heads": 8}
GRID = {"quantize": {"methods": ["rtn"], "bits": [4], "group_size": 64}}
FRACTION = 0.1


def planned(
    cluster: Cluster, recover: dict[str, Any], budget: dict[str, float], grid: dict[str, Any] = GRID, **candidate: Any
) -> Plan:
    document = spec_document(
        data={"train": ["builtin:python-stdlib"], "sequence_length": LENGTH},
        budget=budget,
        candidates=[{"name": "one", "model": MIDDLE} | candidate],
        compression=grid | {"recover": {"budget_fraction": FRACTION} | recover},
    )
    return make_plan(JobSpec.model_validate(document), cluster, VOCABULARY)


def only(plan: Plan) -> tuple[CandidatePlan, RecoveryPlan]:
    (candidate,) = plan.candidates
    (recovery,) = candidate.recoveries
    return candidate, recovery


def test_teacher_and_rounded_weights_are_counted() -> None:
    """By hand: 4 bytes per parameter of the teacher, its logits and one of its layers, 4 per linear weight."""
    cluster, budget = cpus(1), {"tokens": 1e7}
    candidate, plain = only(planned(cluster, {}, budget))
    _, taught = only(planned(cluster, {"distill": True}, budget))
    _, rounded = only(planned(cluster, {"quantization_aware": True}, budget))
    assert plain.memory.teacher_weights == plain.memory.teacher_activations == plain.memory.rounded_weights == 0
    assert taught.memory.teacher_weights == 4 * candidate.parameters
    tokens = plain.training.micro_batch * LENGTH
    assert taught.memory.teacher_activations >= tokens * candidate.model.padded_vocab_size * 4
    linear = 8 * sum(rows * columns for rows, columns in candidate.model.linear_shapes().values())
    assert rounded.memory.rounded_weights == 4 * linear
    assert taught.memory_bytes > plain.memory_bytes + taught.memory.teacher_weights
    assert rounded.memory_bytes == plain.memory_bytes + 4 * linear


def test_tensor_ranks_share_the_teacher_and_pipeline_stages_keep_its_logits() -> None:
    candidate, _ = only(planned(cpus(1), {}, {"tokens": 1e7}))
    training = candidate.training.model_copy(update={"global_batch": 8, "micro_batch": 2})
    companions = Companions(candidate.model, rounded=True)

    def memory(**layout: int) -> Any:
        """Of the last stage."""
        return memory_by_stage(candidate.model, Layout(**layout), training, LENGTH, "cpu", companions)[-1]

    whole, tensor, pipeline = memory(), memory(tensor=2), memory(pipeline=2)
    assert tensor.rounded_weights == whole.rounded_weights // 2
    assert tensor.teacher_weights == pytest.approx(whole.teacher_weights / 2, rel=0.01)
    logits = 2 * LENGTH * candidate.model.padded_vocab_size * 4
    assert pipeline.teacher_activations == 4 * logits  # the last stage keeps those of all four micro-batches
    assert whole.teacher_activations == max(logits, whole.activations // 8)  # or one layer while it is computed


def test_a_teachers_forward_pass_is_in_flops_and_seconds() -> None:
    budget = {"flops": 1e15}
    candidate, alone = only(planned(cpus(1), {}, budget))
    _, taught = only(planned(cpus(1), {"distill": True}, budget))
    model, batch = candidate.model, taught.training.global_batch
    assert alone.flops_per_token * LENGTH == train_flops_per_sequence(model, LENGTH)
    assert taught.flops_per_token == pytest.approx(alone.flops_per_token * 4 / 3)
    assert taught.flops <= FRACTION * 1e15 < taught.flops + batch * LENGTH * taught.flops_per_token
    assert taught.step_parts["teacher"] == pytest.approx(taught.step_parts["compute"] / 3, rel=0.05)
    assert taught.step_seconds == pytest.approx(sum(taught.step_parts.values()))


def test_time_and_disk_of_recoveries_are_part_of_the_plans() -> None:
    budget, recover = {"tokens": 1e7}, {"distill": True}
    with_it = planned(cpus(1), recover, budget, {"prune": {"methods": ["magnitude"], "sparsity": [0.5, 0.7]}})
    (candidate,) = with_it.candidates
    assert [one.recipe for one in candidate.recoveries] == ["magnitude-s50-recovered", "magnitude-s70-recovered"]
    assert with_it.seconds == pytest.approx(candidate.seconds + sum(one.seconds for one in candidate.recoveries))
    keep = candidate.checkpoint.keep + 1
    for one in candidate.recoveries:
        assert one.disk_bytes == (4 + keep * 12) * candidate.parameters
        assert one.budget.limit == FRACTION * 1e7
    assert with_it.disk_bytes >= keep * candidate.checkpoint_bytes + sum(one.disk_bytes for one in candidate.recoveries)
    assert read_plan(with_it.model_dump(mode="json")) == with_it


def test_a_recovery_that_does_not_fit_at_its_candidates_layout_gets_another_one() -> None:
    """1.22 GiB hold the training on one device, but no teacher beside it."""
    cluster = cpus(2, 1.22)
    candidate, alone = only(planned(cluster, {}, {"tokens": 1e7}, layout={}))
    assert candidate.layout == alone.layout == Layout()
    candidate, taught = only(
        planned(cluster, {"distill": True, "quantization_aware": True}, {"tokens": 1e7}, layout={})
    )
    assert candidate.layout == Layout()
    assert taught.layout.world_size == 2
    assert taught.training.learning_rate == alone.training.learning_rate


def test_a_recovery_that_fits_nowhere_is_refused_with_what_would_work() -> None:
    cluster = cpus(1, 1.22)
    recover = {"distill": True, "quantization_aware": True}
    with pytest.raises(SpecError) as caught:
        planned(cluster, recover, {"tokens": 1e7}, training={"global_batch": 16, "precision": "fp32"})
    (problem,) = caught.value.problems
    assert problem.field == "compression.recover"
    assert "recovering rtn-w4g64 of candidate 'one' fits on 1 devices at no layout" in problem.message
    assert "set compression.recover.distill: false" in problem.message
    less = planned(cluster, recover | {"distill": False}, {"tokens": 1e7}, training={"global_batch": 16})
    assert less.candidates[0].recoveries[0].memory.teacher_weights == 0


def test_groups_that_tensor_ranks_cannot_round_are_not_spread_so() -> None:
    """Columns of mlp.down are divided by tensor parallelism: 1376 over two ranks are no multiple of 32."""
    model = {"layers": 2, "hidden": 512, "heads": 8, "ffn_hidden": 1376}
    grid = {"quantize": {"methods": ["rtn"], "bits": [4], "group_size": 32}}
    both = {"layout": {"tensor": 2}, "model": model}
    _, rounded = only(planned(cpus(2), {"quantization_aware": True}, {"tokens": 1e7}, grid, **both))
    _, plain = only(planned(cpus(2), {}, {"tokens": 1e7}, grid, **both))
    assert (plain.layout.tensor, rounded.layout.tensor) == (2, 1)


def test_a_share_that_buys_no_step_is_refused() -> None:
    with pytest.raises(SpecError) as caught:
        planned(cpus(1), {"budget_fraction": 1e-6}, {"tokens": 1e7})
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("compression.recover.budget_fraction", 1e-6)
    assert "the budget leaves 10 tokens for training and one step of 1 sequences needs 256" in problem.message


WORDS = ["tree", "branch", "leaf", "espalier", "frame", "garden", "prune", "grow", "wall", "fruit"]
CANDIDATE = {"name": "small", "model": {"family": "gpt", "layers": 2, "hidden": 32, "heads": 2}}
RECOVERED = {
    "structure": {"layers": [0.5]},
    "prune": {"methods": ["wanda"], "sparsity": [0.5]},
    "quantize": {"methods": ["gptq"], "bits": [4], "group_size": 16},
    "recover": {"budget_fraction": 0.1, "distill": True, "quantization_aware": True},
    "calibration": {"sequences": 40},
}


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory) -> Journal:
    """A whole small job whose variants are recovered, on one device."""
    folder = tmp_path_factory.mktemp("recovered")
    (folder / "text.txt").write_text("\n".join(" ".join(WORDS[i % 7 :: 1 + i % 3]) for i in range(3000)))
    document = {
        "name": "tiny",
        "data": {
            "train": [str(folder / "text.txt")],
            "validation": 0.1,
            "documents": "line",
            "tokenizer": {"kind": "bytes"},
            "sequence_length": 32,
        },
        "budget": {"tokens": 40_000},
        "candidates": [CANDIDATE],
        "compression": RECOVERED,
        "evaluation": {"tokens": 1024},
        "export": {"variants": "none"},
        "execution": {"devices": 1, "checkpoint_every": {"steps": 20}},
    }
    home = Home(folder / "home")
    journal = create_job(JobSpec.model_validate(document), home)
    assert run_job(home, journal.job_id) is JobState.SUCCEEDED, journal.view().error
    return journal


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_a_job_recovers_what_was_planned_and_no_more(recovered: Journal) -> None:
    plan = read_plan(recovered.document("plan"))
    (candidate,) = plan.candidates
    names = [recipe.name for recipe in grid(recovered.spec().compression) if recipe.recovered]
    assert [one.recipe for one in candidate.recoveries] == names
    assert len(names) == 3
    view = recovered.view()
    for one in candidate.recoveries:
        (gang,) = view.candidate(f"small/{one.recipe}").gangs
        assert gang.ended == "budget"
        assert gang.step == one.steps
        assert gang.world_size == one.layout.world_size
    start = view.candidate("small/gptq-w4g16-recovered").start
    model = candidate.model
    assert start["flops_per_token"] * 32 == pytest.approx(train_flops_per_sequence(model, 32, model))
    halved = reduced_config(model, next(one for one in grid(recovered.spec().compression) if one.structure).structure)
    assert view.candidate("small/layers-s50-recovered").start["parameters"] == halved.parameter_count()
    measured = {row["name"] for row in result_document(recovered)["variants"]}
    assert {f"small/{name}" for name in names} < measured


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_nothing_of_the_calibration_stays(recovered: Journal) -> None:
    assert not [path for path in recovered.directory.rglob("statistics") if any(path.iterdir())]
