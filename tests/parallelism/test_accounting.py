"""FLOPs and memory against formulas of the literature and counts by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.memory.bench import RECOVERED
from parallelism.accounting import (
    calibration_flops,
    memory_per_rank,
    non_embedding_parameters,
    train_flops_per_sequence,
    train_flops_per_token,
    training_share,
)
from parallelism.budget import Budget
from parallelism.layout import Layout
from parallelism.memory import parameters_per_rank, stages
from parallelism.models.gpt.config import GPTConfig
from parallelism.presets import resolve_model
from parallelism.training import TrainingConfig

SMALL = GPTConfig(style="gpt2", layers=4, hidden=64, heads=4, vocab_size=1000, context=128)
LLAMA = GPTConfig(style="llama", layers=6, hidden=64, heads=4, kv_heads=2, ffn_hidden=192, vocab_size=1000)
TRAINING = TrainingConfig(global_batch=8, micro_batch=2, learning_rate=1e-3, precision="fp32")


# Narayanan et al. 2021, table 1: layers, hidden, heads, billions of parameters, TFLOP/s per GPU, GPUs, batch.
PUBLISHED = [
    (24, 2304, 24, 1.7),
    (30, 3072, 32, 3.6),
    (36, 4096, 32, 7.5),
    (40, 6144, 48, 18.4),
    (48, 8192, 64, 39.1),
    (60, 10240, 80, 76.1),
    (80, 12288, 96, 145.6),
    (96, 16384, 128, 310.1),
    (105, 20480, 128, 529.6),
    (128, 25600, 160, 1008.0),
]


@pytest.mark.parametrize(("layers", "hidden", "heads", "billions"), PUBLISHED)
def test_flops_and_sizes_of_narayanan(layers: int, hidden: int, heads: int, billions: float) -> None:
    length, vocabulary = 2048, 51200
    model = resolve_model(
        {"style": "gpt2", "layers": layers, "hidden": hidden, "heads": heads, "vocab_size": vocabulary}, None, length
    )
    assert model.parameter_count() / 1e9 == pytest.approx(billions, rel=0.03)
    with_recomputation = (
        96 * length * layers * hidden**2 * (1 + length / (6 * hidden) + vocabulary / (16 * layers * hidden))
    )
    # The output layer is not recomputed: of its 6·s·h·V, 3/4 of F leaves only 4.5.
    exact = 0.75 * with_recomputation + 1.5 * length * hidden * vocabulary
    assert train_flops_per_sequence(model, length) == pytest.approx(exact, rel=1e-12)
    assert train_flops_per_sequence(model, length) == pytest.approx(0.75 * with_recomputation, rel=0.02)


def test_flops_by_hand() -> None:
    # Llama, one token of 16: q 2·64·64, k and v 2·32·64 each, o 2·64·64, gate, up and down 2·192·64 each; scores and
    # their product with v 4·16·64; six layers; output layer 2·64·1024.
    layer = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 192 * 64) + 4 * 16 * 64
    assert train_flops_per_token(LLAMA, 16) == 3 * (6 * layer + 2 * 64 * 1024)


def test_calibration_is_a_forward_pass_and_the_hessians() -> None:
    # Inputs of q, k, v, o, gate and up are 64 wide, that of down 192.
    hessians = 6 * 2 * (6 * 64**2 + 192**2) * 16
    assert calibration_flops(LLAMA, 16, 5) == 5 * (LLAMA.forward_flops(16) + hessians)


def test_parameters_without_embeddings() -> None:
    assert non_embedding_parameters(SMALL) == SMALL.parameter_count() - (1024 + 128) * 64


def test_training_gets_what_the_rest_leaves() -> None:
    assert training_share(Budget(flops=1e12), 1e11, 0.05) == Budget(flops=0.85e12)
    assert training_share(Budget(tokens=1000.0), 0.0) == Budget(tokens=1000.0)
    with pytest.raises(ValueError, match=r"budget\.tokens 1000: .* lower compression\.calibration\.sequences"):
        training_share(Budget(tokens=1000.0), 1024.0)


# Parameters per rank


def replicated(config: GPTConfig) -> int:
    """Parameters that every tensor-parallel rank holds: norms, positions, biases of row-parallel layers."""
    biases = 2 if config.bias else 0
    norms = (2 * config.layers + 1) * config.hidden * (2 if config.bias else 1)
    return norms + config.layers * biases * config.hidden + (config.context * config.hidden if config.bias else 0)


@pytest.mark.parametrize("config", [SMALL, LLAMA, LLAMA.model_copy(update={"tied_embeddings": False})])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("pipeline", [1, 2, 4])
def test_ranks_add_up_to_the_model(config: GPTConfig, tensor: int, pipeline: int) -> None:
    ranks = parameters_per_rank(config, Layout(tensor=tensor, pipeline=pipeline))
    assert len(ranks) == pipeline
    copies = (tensor - 1) * replicated(config)
    if config.tied_embeddings and pipeline > 1:
        copies += 1024 * config.hidden
    assert tensor * sum(ranks) == config.parameter_count() + copies


def test_uneven_and_interleaved_stages() -> None:
    turing = resolve_model({"preset": "turing-nlg-17b"})
    assert [stage.layers for stage in stages(turing, Layout(pipeline=4))] == [20, 20, 19, 19]
    assert [stage.layers for stage in stages(SMALL, Layout(pipeline=2, virtual_pipeline=2))] == [2, 2]


# Memory


def state(**changes: object) -> tuple[int, ...]:
    layout = Layout.model_validate({name: value for name, value in changes.items() if name in Layout.model_fields})
    training = TRAINING.model_copy(update={k: v for k, v in changes.items() if k in TrainingConfig.model_fields})
    estimate = memory_per_rank(SMALL, layout, training, 64)
    parts = (estimate.weights, estimate.gradients, estimate.master_weights, estimate.moments)
    count = SMALL.parameter_count()
    return tuple(round(part / count * 100) for part in parts)


@pytest.mark.parametrize(
    ("changes", "bytes_per_parameter"),
    [
        ({}, (4, 4, 0, 8)),
        ({"precision": "bf16"}, (2, 4, 4, 8)),  # 18: Rajbhandari et al. 2020 count 16 with bf16 gradients
        ({"data": 4}, (4, 4, 0, 2)),
        ({"data": 4, "precision": "bf16"}, (2, 4, 1, 2)),
        ({"data": 4, "distributed_optimizer": False}, (4, 4, 0, 8)),
        ({"engine": "lean"}, (4, 0, 0, 4)),
        ({"engine": "deepspeed", "zero_stage": 1, "data": 4, "precision": "bf16"}, (2, 2, 1, 2)),
        ({"engine": "deepspeed", "zero_stage": 2, "data": 4, "precision": "bf16"}, (2, 0.5, 1, 2)),
        ({"engine": "deepspeed", "zero_stage": 3, "data": 4, "precision": "bf16"}, (0.5, 0.5, 1, 2)),
        ({"engine": "deepspeed", "zero_stage": 3, "data": 4, "precision": "bf16", "offload": "cpu"}, (0.5, 0.5, 0, 0)),
    ],
)
def test_bytes_per_parameter(changes: dict, bytes_per_parameter: tuple) -> None:
    assert state(**changes) == tuple(round(100 * each) for each in bytes_per_parameter)


def test_a_disk_takes_what_the_host_would_hold_but_for_buffers_of_one_parameter() -> None:
    zero = {"engine": "deepspeed", "zero_stage": 3, "data": 4}
    host, disk = (
        memory_per_rank(SMALL, Layout(**zero, offload=offload, offload_dir="disk"), TRAINING, 64)
        for offload in ("cpu", "nvme")
    )
    assert host.offloaded == round(SMALL.parameter_count() * 12 / 4)
    assert disk.offloaded == 0
    largest = SMALL.padded_vocab_size * SMALL.hidden
    assert disk.buffers - host.buffers == largest * 16 / 4
    assert (disk.total - disk.heap) - (host.total - host.heap) == disk.buffers - host.buffers


def activations(config: GPTConfig = LLAMA, sequence_length: int = 64, **changes: object) -> int:
    layout = Layout.model_validate({name: value for name, value in changes.items() if name in Layout.model_fields})
    training = TRAINING.model_copy(update={k: v for k, v in changes.items() if k in TrainingConfig.model_fields})
    return memory_per_rank(config, layout, training, sequence_length).activations


def test_activations_grow_with_tokens_only() -> None:
    once = activations()
    assert activations(sequence_length=128) == 2 * once
    assert activations(micro_batch=4) == 2 * once
    assert activations(global_batch=64) == once
    assert activations(data=2) == once


def test_pipeline_keeps_as_many_micro_batches_as_stages() -> None:
    # Four micro-batches: two stages of half the layers with two in flight on the first hold what one stage holds.
    assert activations(pipeline=2) == pytest.approx(activations(), rel=0.01)
    # One micro-batch: nothing more is in flight.
    assert activations(pipeline=2, global_batch=2) == pytest.approx(activations() / 2, rel=0.01)
    # Interleaved: 2·(p - 1) + (v - 1)·p + 1 = 5 chunks of 3/2 layers instead of 4 (Narayanan et al. 2021).
    deep = LLAMA.model_copy(update={"layers": 12})
    plain, interleaved = activations(deep, pipeline=2), activations(deep, pipeline=2, virtual_pipeline=2)
    assert interleaved / plain == pytest.approx(5 / 4, rel=0.01)


def test_tensor_sequence_parallelism_and_recomputation_save_activations() -> None:
    whole, split = activations(), activations(tensor=2)
    assert whole / 2 < split < whole
    assert activations(tensor=2, sequence_parallel=True) == pytest.approx(whole / 2, rel=0.05)
    assert activations(recompute=True) < whole / 3
    assert activations(precision="bf16") == whole // 2


def test_logits_lie_on_the_last_stage() -> None:
    estimate = memory_per_rank(LLAMA, Layout(), TRAINING, 64)
    assert estimate.logits >= 2 * 64 * 1024 * 4
    assert memory_per_rank(LLAMA, Layout(tensor=2), TRAINING, 64).logits == estimate.logits // 2
    assert sum(estimate.parts().values()) == estimate.total


def test_the_missions_models_fit_where_they_were_trained() -> None:
    # Megatron-LM 8.3B ran at TP8 on V100s of 32 GB; with activation recomputation, micro-batch 8, sequences of 1024.
    megatron = resolve_model({"preset": "megatron-8.3b"})
    training = TrainingConfig(global_batch=512, micro_batch=8, learning_rate=1.5e-4, precision="bf16", recompute=True)
    assert memory_per_rank(megatron, Layout(tensor=8, data=64), training, 1024).total < 32e9
    # One such GPU has no room for it, whatever the batch.
    assert memory_per_rank(megatron, Layout(), training.model_copy(update={"micro_batch": 1}), 1024).total > 32e9


def test_estimates_are_near_the_peaks_measured_on_a_gpu() -> None:
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "gpu.json"
    measured = json.loads(results.read_text(encoding="utf-8"))["memory"]
    length = measured["sequence_length"]
    assert len({case["model"] for case in measured["cases"]}) >= 3
    for case in measured["cases"]:
        model = resolve_model({"preset": case["model"], "context": length})
        batch, engine = case["micro_batch"], case["engine"]
        training = TrainingConfig(
            global_batch=batch if engine == "lean" else 2 * batch,
            micro_batch=batch,
            learning_rate=1e-4,
            precision=case["precision"],
            recompute=case["recompute"],
        )
        estimate = memory_per_rank(model, Layout(engine=engine), training, length, "gpu")
        assert estimate.total == pytest.approx(case["peak_gib"] * 2**30, rel=0.15), case


def test_estimates_of_recoveries_are_near_the_peaks_measured_on_cpus() -> None:
    """Zeros held, weights rounded, a teacher followed; bfloat16 on CPUs takes more than is known of it."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "memory_recovery.json"
    rows = json.loads(results.read_text(encoding="utf-8"))
    cases = {case.name: case for case in RECOVERED}
    assert {row["case"] for row in rows} >= {"gpt2-54m T1 both", "deep-50m P2 both", "wide-84m T2 lean both"}
    for row in rows:
        case = cases[row["case"]]
        far = 0.2 if case.precision == "bf16" else 0.1
        assert case.estimate().total == pytest.approx(row["measured_bytes"], rel=far), row["case"]
