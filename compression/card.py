"""The model card of an export. Torch-free."""

from collections.abc import Mapping
from typing import Any

from compression.report import short_number
from compression.results import ExportResult


def model_card(export: ExportResult, facts: Mapping[str, Any]) -> str:
    """Markdown with lineage, recipe, quality, sizes and checksums, headed by what the Hugging Face hub reads."""
    rows = {
        "variant": facts["variant"],
        **{key.replace("_", " "): value for key, value in facts["lineage"].items()},
        "recipe": recipe_in_words(facts["recipe"]),
        **_trained(facts["trained"]),
        "parameters": _number(facts["parameters"]),
        "linear weights set to zero": f"{facts['sparsity']:.1%}",
        "compact file": f"{_number(facts['compact_bytes'])} bytes",
        "bits per parameter": f"{facts['bits_per_parameter']:.2f} (compact file), {_bits(export):.2f} (this export)",
        "this export": f"{_number(export.export_bytes)} bytes, {export.format}, to be computed in {export.dtype}",
        **_mask(facts),
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

Trained and compressed by Espalier.{_dequantised(export, facts["recipe"])}

| | |
|---|---|
{table}

| file | SHA-256 |
|---|---|
{sums}
"""


def _bits(export: ExportResult) -> float:
    return 8 * export.export_bytes / export.parameters


def _trained(trained: Mapping[str, Any]) -> dict[str, str]:
    if not trained:
        return {}
    flops = short_number(trained["flops"])
    return {"trained": f"{trained['step']:,} steps, {trained['tokens']:,} tokens, {flops} FLOPs"}


def recipe_in_words(recipe: Mapping[str, Any]) -> str:
    """What a recipe, given as it stands in documents, does to a model."""
    parts = []
    if structure := recipe.get("structure"):
        removed = [f"{share:.0%} of the {part}" for part, share in structure.items() if share]
        parts.append(f"{' and '.join(removed)} removed")
    if prune := recipe.get("prune"):
        by_layer = ", shared out by sensitivity" if prune.get("allocation") == "sensitivity" else ""
        pattern = f" ({prune['pattern']})" if prune.get("pattern") else ""
        parts.append(f"{prune['method']} pruning to {prune['sparsity']:.0%} zeros{pattern}{by_layer}")
    if quantize := recipe.get("quantize"):
        parts.append(_quantization(quantize))
        parts.append(f"embeddings at {recipe['embedding_bits']} bits")
    if recipe.get("recovered"):
        parts.append("recovered by finetuning")
    return "; ".join(parts) or "none (dense bfloat16)"


def _quantization(quantize: Mapping[str, Any]) -> str:
    group = f"groups of {quantize['group_size']}" if quantize.get("group_size") else "one scale per channel"
    kind = "symmetric" if quantize["symmetric"] else "asymmetric"
    if quantize.get("number") == "fp8":
        width = "FP8 e4m3"
    elif quantize.get("bits"):
        width = f"{quantize['bits']} bits"
    elif quantize.get("average_bits"):
        width = f"{quantize['average_bits']:g} bits on average"
    else:
        width = f"{_number(quantize['target_bytes'])} bytes in all"
    activations = ", activations of 8 bits" if quantize.get("activation_bits") == 8 else ""
    return f"{quantize['method']} to {width}, {group}, {kind}{activations}"


def _dequantised(export: ExportResult, recipe: Mapping[str, Any]) -> str:
    """What a reader has to know of the numbers in the files."""
    if not recipe.get("quantize"):
        return ""
    if export.format != "safetensors":
        outer = " Embeddings are written dequantised." if recipe["embedding_bits"] != 16 else ""
        return f" The linear layers hold their codes (compressed-tensors, {export.format}).{outer} {_EXACT}"
    reason = f" ({export.note})" if export.note else ""
    return (
        f" The quantised weights are written dequantised{reason}: each is exactly the value that its code stands for."
    )


_EXACT = (
    "Computed in float32, every weight is exactly the one that was measured; scales are float16 numbers, which bfloat16"
    " cannot hold."
)


def _mask(facts: Mapping[str, Any]) -> dict[str, str]:
    if "mask" not in facts:
        return {}
    compact, mask = facts["compact_file"], facts["mask"]
    return {"zeros": f"{mask['pattern']}; without them in `{compact['path']}`, SHA-256 `{compact['sha256']}`"}


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
