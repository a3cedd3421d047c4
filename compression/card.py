"""The model card of an export. Torch-free."""

from collections.abc import Mapping
from typing import Any

from compression.results import ExportResult


def model_card(export: ExportResult, facts: Mapping[str, Any]) -> str:
    """Markdown with lineage, recipe, quality, sizes and checksums, headed by what the Hugging Face hub reads."""
    rows = {
        "variant": facts["variant"],
        **{key.replace("_", " "): value for key, value in facts["lineage"].items()},
        "recipe": _recipe(facts["recipe"]),
        "trained": "{step:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs".format(**facts["trained"]),
        "parameters": _number(facts["parameters"]),
        "linear weights set to zero": f"{facts['sparsity']:.1%}",
        "compact file": f"{_number(facts['compact_bytes'])} bytes",
        "bits per parameter": f"{facts['bits_per_parameter']:.2f} (compact file)",
        "this export": f"{_number(export.export_bytes)} bytes of {export.dtype}",
        **_quality(facts["quality"]),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    sums = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in export.checksums.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [espalier]
---

# {facts["variant"]}

Trained and compressed by Espalier.{_dequantised(facts["recipe"])}

| | |
|---|---|
{table}

| file | SHA-256 |
|---|---|
{sums}
"""


def _recipe(recipe: Mapping[str, Any]) -> str:
    parts = []
    if prune := recipe.get("prune"):
        parts.append(f"{prune['method']} pruning to {prune['sparsity']:.0%} zeros")
    if quantize := recipe.get("quantize"):
        group = f"groups of {quantize['group_size']}" if quantize.get("group_size") else "one scale per channel"
        kind = "symmetric" if quantize["symmetric"] else "asymmetric"
        parts.append(f"{quantize['method']} to {quantize['bits']} bits, {group}, {kind}")
        parts.append(f"embeddings at {recipe['embedding_bits']} bits")
    return "; ".join(parts) or "none (dense bfloat16)"


def _dequantised(recipe: Mapping[str, Any]) -> str:
    if not recipe.get("quantize"):
        return ""
    return " The quantised weights are written dequantised: each is exactly the value that its code stands for."


def _quality(quality: Mapping[str, Any] | None) -> dict[str, str]:
    if quality is None:
        return {}
    return {
        "held-out loss": f"{quality['validation_loss']:.5f} nats per token over {_number(quality['tokens'])} tokens",
        "perplexity": f"{quality['perplexity']:.4f}",
        "bits per byte": f"{quality['bits_per_byte']:.4f}",
        "next-token accuracy": f"{quality['accuracy']:.2%}",
    }


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
