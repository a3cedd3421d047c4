"""The parts of a model, built rank by rank without memory, add up to the model."""

import json
import subprocess
import sys
from typing import Any

import pytest

from parallelism.layout import Layout
from parallelism.memory import parameters_per_rank
from parallelism.presets import resolve_model

TINY = {"family": "gpt", "layers": 4, "hidden": 64, "heads": 4, "vocab_size": 300, "context": 32}
MEGATRON_LAYER = 12 * 3072**2 + 13 * 3072
TURING_LAYER = 12 * 4256**2 + 13 * 4256


def dry_run(model: dict[str, Any], **layout: Any) -> dict[str, Any]:
    training = {"precision": "bf16", "global_batch": 32, "micro_batch": 1}
    request = {
        "model": resolve_model(model).model_dump(),
        "layout": Layout(**layout).model_dump(),
        "training": training,
        "sequence_length": 1024,
        "device_kind": "gpu",
    }
    command = [sys.executable, "-W", "ignore", "-m", "parallelism.dryrun"]
    ended = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    answer: dict[str, Any] = json.loads(ended.stdout)
    return answer


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ({"style": "llama", "kv_heads": 2}, {"tensor": 2, "pipeline": 2}),
        ({"style": "gpt2", "tied_embeddings": False}, {"tensor": 2, "data": 2}),
        ({"style": "gpt2"}, {"pipeline": 2, "virtual_pipeline": 2}),
        ({"style": "llama", "layers": 5}, {"pipeline": 2}),
    ],
)
def test_parts_add_up(model: dict[str, Any], layout: dict[str, Any]) -> None:
    built = dry_run({**TINY, **model}, **layout)
    assert built["ok"]
    assert built["total"] == resolve_model({**TINY, **model}).parameter_count()


def test_megatron_8_3b_at_32_ranks() -> None:
    """Against a count by hand: 72 layers, vocabulary 51,200, 1,024 positions, final norm."""
    built = dry_run({"preset": "megatron-8.3b"}, tensor=8, pipeline=4)
    assert built["ok"]
    assert built["total"] == 72 * MEGATRON_LAYER + (51200 + 1024) * 3072 + 2 * 3072 == 8_317_040_640
    assert len(built["ranks"]) == 32
    assert {row["layers"] for row in built["ranks"]} == {18}
    estimated = parameters_per_rank(resolve_model({"preset": "megatron-8.3b"}), Layout(tensor=8, pipeline=4))
    assert [row["parameters"] for row in built["ranks"][::8]] == estimated
    # Weights in bf16, gradients, master weights and two moments in fp32: 18 bytes, and activations on top.
    assert all(18 * row["parameters"] < row["memory_bytes"] < 30e9 for row in built["ranks"])


def test_turing_nlg_17b_has_uneven_stages() -> None:
    """78 layers over 4 stages; 28 heads do not divide by 8, and 56 give the same parameters."""
    built = dry_run({"preset": "turing-nlg-17b", "heads": 56}, tensor=8, pipeline=4)
    assert built["ok"]
    assert built["total"] == 78 * TURING_LAYER + (51200 + 1024) * 4256 + 2 * 4256 == 17_180_859_136
    assert [row["layers"] for row in built["ranks"][::8]] == [20, 20, 19, 19]
