"""The planner: which layout it takes and why, what a budget buys, and what it refuses."""

import dataclasses
from typing import Any

import pytest

from compression import registry
from launcher.planning.cluster import GIBI, Cluster, gpu_cluster, h100_cluster, read_gpus
from launcher.planning.costs import step_cost
from launcher.planning.plan import CandidatePlan, Plan, make_plan, read_plan
from launcher.problems import SpecError
from launcher.spec import JobSpec
from parallelism.accounting import calibration_flops, train_flops_per_token
from parallelism.layout import Layout
from parallelism.presets import resolve_model
from parallelism.training import TrainingConfig
from tests.launcher.made import cpus, spec_document

VOCABULARY = 4096


def job(model: dict[str, Any], **changes: Any) -> JobSpec:
    """One candidate; changes to the candidate by the names of its fields, all others to the job."""
    candidate = {"name": "one", "model": model}
    candidate |= {name: changes.pop(name) for name in ("layout", "training") if name in changes}
    data = {"train": ["builtin:python-stdlib"], "sequence_length": changes.pop("sequence_length", 256)}
    return JobSpec.model_validate(spec_document(data=data, candidates=[candidate], **changes))


def planned(model: dict[str, Any], cluster: Cluster, **changes: Any) -> CandidatePlan:
    (candidate,) = make_plan(job(model, **changes), cluster, VOCABULARY).candidates
    return candidate


def refusal(model: dict[str, Any], cluster: Cluster, **changes: Any) -> str:
    with pytest.raises(SpecError) as caught:
        planned(model, cluster, **changes)
    return str(caught.value)


MIDDLE = {"layers": 8, "hidden": 512, "heads": 8}


# Which layout


def test_data_parallelism_where_the_batch_is_large_and_the_model_small() -> None:
    chosen = planned(MIDDLE, cpus(), budget={"tokens": 1e8}, training={"global_batch": 64})
    assert chosen.layout == Layout(data=2)
    assert chosen.layout_chosen


def test_tensor_parallelism_where_one_sequence_is_all_there_is() -> None:
    # Nothing to share out over data, and a pipeline of one micro-batch is all bubble.
    chosen = planned(MIDDLE, cpus(), budget={"tokens": 1e8}, training={"global_batch": 1})
    assert chosen.layout == Layout(tensor=2)


def test_pipeline_parallelism_where_links_are_slow_and_the_batch_cannot_be_shared() -> None:
    # 7 micro-batches do not divide over 2 data ranks; all-reduces in every layer cost more than the bubble of 1/7.
    slow = cpus(link_bytes_per_second=2e7, network_bytes_per_second=2e7, link_latency_seconds=5e-3)
    chosen = planned(MIDDLE, slow, budget={"tokens": 1e8}, training={"global_batch": 7, "micro_batch": 1})
    assert chosen.layout == Layout(pipeline=2)


def test_pipeline_parallelism_where_heads_cannot_be_divided_and_memory_is_short() -> None:
    # 25 heads: no tensor parallelism over 2; and the model does not fit twice.
    model = {"preset": "gpt2-xl", "context": 256}
    chosen = planned(model, cpus(2, gibibytes=20), budget={"tokens": 1e8}, training={"global_batch": 8})
    assert chosen.layout.pipeline == 2
    assert chosen.layout.engine == "megatron"


def test_one_device_where_a_second_brings_nothing() -> None:
    tiny = {"layers": 1, "hidden": 32, "heads": 2}
    chosen = planned(tiny, cpus(), budget={"tokens": 1e6}, training={"global_batch": 1}, sequence_length=64)
    assert chosen.layout == Layout()


def test_devices_are_saved_where_device_hours_are_limited() -> None:
    fast = planned(MIDDLE, cpus(), budget={"tokens": 1e8}, training={"global_batch": 64})
    thrifty = planned(MIDDLE, cpus(), budget={"device_hours": 1}, training={"global_batch": 64})
    assert (fast.layout.world_size, thrifty.layout.world_size) == (2, 1)
    assert thrifty.step_seconds < 2 * fast.step_seconds


def test_the_missions_models_on_nodes_of_eight() -> None:
    cluster = h100_cluster(32)
    for preset in ("megatron-8.3b", "turing-nlg-17b"):
        chosen = planned(
            {"preset": preset}, cluster, budget={"tokens": 1e9}, sequence_length=1024, training={"global_batch": 512}
        )
        assert chosen.layout.engine == "megatron"
        assert chosen.layout.tensor <= 8
        assert chosen.memory_bytes + chosen.baseline_bytes < 80 * GIBI
        assert chosen.training.precision == "bf16"
        # Model FLOP/s that a cluster of this kind reaches (Narayanan et al. 2021: 43 to 52 % with recomputation).
        rate = chosen.flops / chosen.steps / chosen.step_seconds / (chosen.layout.world_size * 989e12)
        assert 0.25 < rate < 0.5


def test_tensor_parallel_groups_stay_on_a_node() -> None:
    cluster = h100_cluster(16, devices_per_node=2)
    chosen = planned(
        {"preset": "turing-nlg-17b"},
        cluster,
        budget={"tokens": 1e9},
        sequence_length=1024,
        training={"global_batch": 64},
    )
    assert chosen.layout.tensor <= 2
    assert chosen.layout.pipeline > 1


def test_recomputation_where_activations_do_not_fit_otherwise() -> None:
    model = {"layers": 24, "hidden": 512, "heads": 8}
    training = {"global_batch": 8, "micro_batch": 8}
    roomy = planned(model, cpus(1, 64), budget={"tokens": 1e8}, sequence_length=1024, training=training)
    tight = planned(model, cpus(1, 6), budget={"tokens": 1e8}, sequence_length=1024, training=training)
    assert (roomy.training.recompute, tight.training.recompute) == (False, True)
    assert tight.step_seconds > roomy.step_seconds
    assert any("recomputed" in note for note in tight.notes)
    refused = refusal(
        model, cpus(1, 6), budget={"tokens": 1e8}, sequence_length=1024, training={**training, "recompute": False}
    )
    assert "fits on 1 devices at no layout" in refused


def test_lean_engine_where_nothing_else_fits() -> None:
    # GPT-2 XL on two ranks that share 22 GiB: 16 bytes per parameter are 24.9 GB, eight are 12.5 GB.
    model = {"preset": "gpt2-xl", "heads": 20, "context": 128}
    chosen = planned(model, cpus(2, 11), budget={"tokens": 20 * 128}, sequence_length=128, training={"global_batch": 1})
    assert chosen.layout == Layout(tensor=2, engine="lean")
    assert chosen.training.micro_batch == 1
    assert chosen.memory_bytes < 9 * GIBI
    assert not chosen.checkpoint.asynchronous
    assert any("no other engine fits" in note for note in chosen.notes)
    assert planned(model, cpus(2, 24), budget={"tokens": 20 * 128}, sequence_length=128).layout.engine == "megatron"


def test_lean_engine_takes_a_batch_that_fits_where_the_batch_is_free() -> None:
    model = {"layers": 12, "hidden": 1024, "heads": 16}
    chosen = planned(model, cpus(1, 2.7), budget={"tokens": 1e8})
    assert chosen.layout.engine == "lean"
    assert chosen.training.global_batch == chosen.training.micro_batch < 64


def test_zero_where_gradients_and_weights_must_be_shared() -> None:
    # One layer with one head: neither tensor nor pipeline parallelism can divide it; ZeRO can.
    model = {"layers": 1, "hidden": 4096, "heads": 1, "kv_heads": 1}
    chosen = planned(model, cpus(8, 2.6), budget={"tokens": 1e8}, sequence_length=32, training={"global_batch": 8})
    assert chosen.layout.engine == "deepspeed"
    assert chosen.layout.zero_stage in (2, 3)
    assert chosen.layout.data > 1


def test_every_fixed_part_of_a_layout_is_respected() -> None:
    wanted = Layout(tensor=2, pipeline=2, virtual_pipeline=2)
    chosen = planned(
        MIDDLE,
        cpus(4),
        budget={"tokens": 1e8},
        layout=wanted.model_dump(),
        training={"global_batch": 8, "micro_batch": 2, "learning_rate": 0.01},
    )
    assert chosen.layout == wanted
    assert not chosen.layout_chosen
    assert (chosen.training.global_batch, chosen.training.micro_batch, chosen.training.learning_rate) == (8, 2, 0.01)


# The cost model


def cost(layout: Layout, cluster: Cluster, **training: Any) -> Any:
    config = resolve_model(MIDDLE, VOCABULARY, 256)
    settled = TrainingConfig(
        **{"global_batch": 16, "micro_batch": 2, "learning_rate": 1, "precision": "fp32"} | training
    )
    return step_cost(config, layout, settled, 256, cluster)


def test_the_bubble_is_that_of_the_literature() -> None:
    free = cpus(4, link_bytes_per_second=1e18, link_latency_seconds=0.0)
    one, four = cost(Layout(), free), cost(Layout(pipeline=4), free)
    # (p - 1)/m of 8 micro-batches; a quarter of the layers on each stage, and the output layer on the last.
    assert four.pipeline / (four.compute - 0.01) == pytest.approx(3 / 8, rel=1e-6)
    assert one.pipeline == 0.0
    halved = cost(Layout(pipeline=4, virtual_pipeline=2), free)
    assert halved.pipeline == pytest.approx(four.pipeline / 2, rel=1e-6)


def test_collectives_cost_bytes_and_latency() -> None:
    plain = cpus(2, link_latency_seconds=0.0)
    # 4 per layer and 2 more, 8 layers, 8 micro-batches of 2·256·512 float32; ring of two: 2·(2 - 1)/2 = 1.
    assert cost(Layout(tensor=2), plain).tensor == pytest.approx(8 * (4 * 8 + 2) * 2 * 256 * 512 * 4 / 2e9)
    late = cost(Layout(tensor=2), cpus(2, link_latency_seconds=1e-3)).tensor
    assert late - cost(Layout(tensor=2), plain).tensor == pytest.approx(8 * (4 * 8 + 2) * 1e-3)
    parameters = resolve_model(MIDDLE, VOCABULARY, 256).parameter_count()
    assert cost(Layout(data=2), plain).data == pytest.approx(4 * parameters / 2e9)


def test_groups_that_span_nodes_use_the_network() -> None:
    cluster = cpus(8, devices_per_node=2, network_bytes_per_second=1e8)
    assert cost(Layout(tensor=2, data=2), cluster).data == pytest.approx(
        20 * cost(Layout(tensor=2, data=2), cpus(8)).data, rel=0.01
    )
    assert cost(Layout(tensor=2), cluster).tensor == cost(Layout(tensor=2), cpus(8)).tensor


# What a budget buys


def test_flops_and_tokens_are_never_exceeded_and_less_than_a_step_is_left() -> None:
    for budget in ({"flops": 1e13}, {"tokens": 123456}):
        plan = planned(MIDDLE, cpus(), budget=budget, training={"global_batch": 4})
        spent = {"flops": plan.flops, "tokens": plan.tokens}[next(iter(budget))]
        limit = next(iter(budget.values()))
        assert spent <= limit < spent * (plan.steps + 1) / plan.steps * (1 + 1e-9)
        assert plan.tokens == plan.steps * 4 * 256
        config = resolve_model(MIDDLE, VOCABULARY, 256)
        assert plan.flops_per_token == train_flops_per_token(config, 256)


def test_clock_budgets_pay_for_the_start() -> None:
    layout = {"tensor": 2}
    minute = planned(MIDDLE, cpus(), budget={"wall_clock": 60}, layout=layout, training={"global_batch": 4})
    assert minute.steps == int(55 // minute.step_seconds)
    hours = planned(MIDDLE, cpus(), budget={"device_hours": 2 / 60}, layout=layout, training={"global_batch": 4})
    assert hours.steps == minute.steps
    priced = planned(
        MIDDLE,
        cpus(),
        budget={"cost": 0.10},
        layout=layout,
        training={"global_batch": 4},
        execution={"price_per_device_hour": 3.0},
    )
    assert priced.steps == minute.steps
    assert priced.cost <= 0.10


def test_the_batch_by_rule_follows_what_a_clock_buys() -> None:
    short = planned(MIDDLE, cpus(), budget={"wall_clock": 60})
    long = planned(MIDDLE, cpus(), budget={"wall_clock": 1e6})
    assert isinstance(short.training.global_batch, int)
    assert isinstance(long.training.global_batch, int)
    assert short.training.global_batch < long.training.global_batch
    assert short.steps >= 40


def test_calibration_is_kept_from_the_budget_only_where_a_method_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = {"quantize": {"methods": ["rtn"], "bits": [4]}}
    free = planned(MIDDLE, cpus(), budget={"flops": 1e14}, compression=quantize)
    assert free.budget.limit == 1e14
    needing = dataclasses.replace(registry.QUANTIZATION["rtn"], needs_statistics=True)
    monkeypatch.setitem(registry.QUANTIZATION, "rtn", needing)
    kept = planned(MIDDLE, cpus(), budget={"flops": 1e14}, compression=quantize)
    config = resolve_model(MIDDLE, VOCABULARY, 256)
    assert kept.budget.limit == pytest.approx(1e14 - calibration_flops(config, 256, 128))
    assert "lower compression.calibration.sequences" in refusal(
        MIDDLE, cpus(), budget={"tokens": 1000}, compression=quantize
    )


# What a plan says


def test_a_plan_survives_json_and_adds_up() -> None:
    spec = job(MIDDLE, budget={"tokens": 1e7}, execution={"price_per_device_hour": 2.0})
    plan = make_plan(spec, cpus(), VOCABULARY, text_bytes=10_000_000)
    assert read_plan(plan.model_dump(mode="json")) == plan
    assert isinstance(plan, Plan)
    (candidate,) = plan.candidates
    assert plan.seconds == candidate.seconds
    assert plan.cost == pytest.approx(candidate.device_seconds / 3600 * 2.0)
    assert sum(candidate.step_parts.values()) == pytest.approx(candidate.step_seconds)
    assert sum(candidate.memory.parts().values()) == candidate.memory_bytes


def test_disk_holds_checkpoints_variants_and_data() -> None:
    few = {"checkpoint_every": {"steps": 10, "keep": 1}}
    more = {"checkpoint_every": {"steps": 10, "keep": 3}}
    one, three = (planned(MIDDLE, cpus(), budget={"tokens": 1e7}, execution=each) for each in (few, more))
    assert one.checkpoint_bytes == 12 * one.parameters
    assert three.disk_bytes - one.disk_bytes == 2 * one.checkpoint_bytes
    grid = {"prune": {"methods": ["magnitude"], "sparsity": [0.5, 0.6, 0.7]}}
    varied = planned(MIDDLE, cpus(), budget={"tokens": 1e7}, execution=few, compression=grid)
    assert varied.disk_bytes - one.disk_bytes == 3 * 6 * one.parameters
    spec = job(MIDDLE, budget={"tokens": 1e7})
    assert make_plan(spec, cpus(), VOCABULARY, text_bytes=1000).data_bytes == 1000


def test_notes_warn_of_few_steps_and_many_passes() -> None:
    spec = job(MIDDLE, budget={"tokens": 1e6}, training={"global_batch": 64})
    (candidate,) = make_plan(spec, cpus(), VOCABULARY, text_bytes=100_000).candidates
    assert any("only 61 steps" in note for note in candidate.notes)
    assert any("30 passes over the same text" in note for note in candidate.notes)


# What it refuses


def test_a_model_that_fits_nowhere_is_told_what_would_work() -> None:
    text = refusal({"preset": "turing-nlg-17b"}, cpus(2), budget={"tokens": 1e6}, training={"global_batch": 1})
    assert text.startswith("candidates.0.model: fits on 2 devices at no layout: 16,980,384,512 parameters")
    devices = int(text.split("use ")[1].split(" such devices")[0])
    assert (
        planned(
            {"preset": "turing-nlg-17b"}, cpus(devices), budget={"tokens": 1e6}, training={"global_batch": 1}
        ).layout.world_size
        <= devices
    )
    assert refusal(
        {"preset": "turing-nlg-17b"}, cpus(devices // 2), budget={"tokens": 1e6}, training={"global_batch": 1}
    )


def test_shorter_sequences_are_offered_only_where_they_help() -> None:
    model = {"layers": 2, "hidden": 256, "heads": 4}
    training = {"global_batch": 1, "recompute": False}
    cluster = cpus(1, 1.2)
    text = refusal(model, cluster, budget={"tokens": 1e8}, sequence_length=16384, training=training)
    length = int(text.split("data.sequence_length: ")[1].split(",")[0])
    assert planned(model, cluster, budget={"tokens": 1e8}, sequence_length=length, training=training)
    assert refusal(model, cluster, budget={"tokens": 1e8}, sequence_length=2 * length, training=training)


def test_a_given_layout_that_does_not_fit_is_told_of_one_that_does() -> None:
    model = {"preset": "gpt2-xl", "context": 256}
    text = refusal(model, cpus(2, 20), budget={"tokens": 1e6}, layout={}, training={"global_batch": 8})
    assert text.startswith('candidates.0.layout: "T1×P1×D1": 1,')
    assert "leave layout out: T1×P2×D1" in text


def test_a_budget_smaller_than_a_step_says_what_a_step_takes() -> None:
    text = refusal(MIDDLE, cpus(), budget={"tokens": 1000}, training={"global_batch": 4})
    assert "the budget leaves 1000 tokens for training and one step of 4 sequences needs 1.02e+03" in text
    assert "raise budget.tokens" in text
    assert "raise budget.wall_clock" in refusal(MIDDLE, cpus(), budget={"wall_clock": 3})


def test_all_candidates_are_told_at_once() -> None:
    document = job(MIDDLE, budget={"tokens": 1e6}).model_dump(mode="json")
    document["candidates"] = [
        {"name": "a", "model": MIDDLE, "layout": {"tensor": 3}},
        {"name": "b", "model": MIDDLE},
        {"name": "c", "model": {"preset": "turing-nlg-17b"}},
    ]
    with pytest.raises(SpecError) as caught:
        make_plan(JobSpec.model_validate(document), cpus(4), VOCABULARY)
    fields = [problem.field for problem in caught.value.problems]
    assert set(fields) == {"candidates.0.layout.tensor", "candidates.2.model"}


# The cluster


def test_gpus_are_known_by_name() -> None:
    (hopper, ampere) = read_gpus("NVIDIA H100 80GB HBM3, 81559\nNVIDIA A100-SXM4-40GB, 40960\n")
    assert hopper == ("NVIDIA H100 80GB HBM3", 81559 * 2**20)
    assert gpu_cluster(*hopper, 8).peak_flops == 989e12
    assert gpu_cluster(*ampere, 8).peak_flops == 312e12
    assert gpu_cluster("NVIDIA H100 PCIe", 80 * GIBI, 1).peak_flops == 756e12
    assert gpu_cluster("NVIDIA H200", 141 * GIBI, 16).devices_per_node == 8
    assert gpu_cluster("Some GPU", GIBI, 1).peak_flops < 1e14
    assert read_gpus("No devices were found\n") == []
