"""What MLflow's pages say in words of a job, its candidates and variants: Markdown, from the result document.

Torch-free.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compression.card import recipe_in_words
from compression.report import short_bytes, short_number
from parallelism.layout import layout_text

ABOUT = """Jobs of Espalier: candidates trained under one budget, compressed, and held against each other.

- A run at the top is a **job**. Its artifacts are the spec, the plan, the result and the figure of the frontier.
- Below it is a run per **candidate**: loss, learning rate, speed against the training step. `tokens`, `flops` and
  `device_hours` are metrics of the same steps, so that each can be the x-axis of a chart.
- Below that is a run per **variant**: recipe, quality, size. Those on the frontier have the tag
  `espalier.on_frontier` = `true`.
"""

Row = Mapping[str, Any]


def beginning(name: str, job_id: str) -> str:
    """Of a job that is under way."""
    return f"## {name}\n\nJob `{job_id}` is under way."


def summary(name: str, state: str, result: Row) -> str:
    """Of a job at rest: what came out, the frontier, the candidates."""
    error = [f"**{result['error']}**"] if result.get("error") else []
    variants, candidates = result.get("variants") or [], result.get("candidates") or []
    return "\n\n".join(
        [
            f"## {name}: {state}",
            *error,
            *_verdict(variants),
            *_titled("### Frontier", _variants_table([row for row in variants if row.get("on_frontier")])),
            *_titled("### Candidates", _candidates_table(candidates)),
        ]
    )


def candidate_text(row: Row, settings: Row, variants: Sequence[Row]) -> str:
    """Of a candidate: what it is (``settings``: model or source), what training brought, its variants."""
    steps, burnt, lost = row.get("steps"), row.get("device_seconds"), row.get("lost_device_seconds") or 0.0
    hours, wasted = short_number((burnt or 0.0) / 3600), short_number(lost / 3600)
    facts = {
        "model": _model(settings),
        "parameters": _number(row.get("parameters")),
        "layout": layout_text(row.get("layout")),
        "trained": f"{steps:,} steps, {row['tokens']:,} tokens, {short_number(row['flops'])} FLOPs" if steps else "",
        "device hours": f"{hours}, {wasted} of them lost in restarts" if burnt else "",
        "held-out loss": _number(row.get("validation_loss")),
        "checkpoint": f"`{row['checkpoint']}`" if row.get("checkpoint") else "",
        "error": row.get("error") or "",
    }
    return "\n\n".join([_facts_table(facts), *_titled("### Variants", _variants_table(variants))])


def variant_text(row: Row) -> str:
    """Of a variant: what was done to the candidate, and what is left of it."""
    quality, exported = row["quality"], row.get("export_bytes")
    facts = {
        "recipe": recipe_in_words(row["recipe"]),
        quality["metric"]: _number(quality["value"]),
        "compact file": f"{short_bytes(row['bytes'])} ({row['bytes']:,} bytes)",
        "bits per parameter": f"{row['bits_per_parameter']:.2f}",
        "linear weights set to zero": f"{row['sparsity']:.0%}",
        "on the frontier": "yes" if row.get("on_frontier") else "no",
        "export": short_bytes(exported) if exported else "",
        "path": f"`{row['path']}`" if row.get("path") else "",
    }
    return _facts_table(facts)


def _verdict(variants: Sequence[Row]) -> list[str]:
    """What came out, in a sentence; nothing before there are variants."""
    if not variants:
        return []
    chosen = sorted((row for row in variants if row.get("on_frontier")), key=lambda row: row["bytes"])
    if not chosen:
        return [f"{len(variants)} variants."]
    counts = f"{len(variants)} variants, {len(chosen)} of them on the frontier"
    return [f"{counts}: the smallest is {_named(chosen[0])}, the best is {_named(chosen[-1])}."]


def _named(row: Row) -> str:
    quality = f"{row['quality']['metric']} {_number(row['quality']['value'])}"
    return f"`{row['name']}` ({short_bytes(row['bytes'])}, {quality})"


def _model(settings: Row) -> str:
    if settings.get("source"):
        return f"`{settings['source']}`"
    model = settings.get("model") or {}
    shape = [f"{name} {model[name]}" for name in ("style", "layers", "hidden", "heads") if name in model]
    return ", ".join([str(model.get("family", "")), *shape])


def _variants_table(variants: Sequence[Row]) -> list[str]:
    ordered = sorted(variants, key=lambda row: row["bytes"])
    rows = [
        (
            row["name"],
            short_bytes(row["bytes"]),
            _number(row["quality"]["value"]),
            f"{row['bits_per_parameter']:.2f}",
            f"{row['sparsity']:.0%}",
            "★" if row.get("on_frontier") else "",
        )
        for row in ordered
    ]
    metric = ordered[0]["quality"]["metric"] if ordered else ""
    return _table(("variant", "size", metric, "bits per parameter", "zeros", "frontier"), rows)


def _candidates_table(candidates: Sequence[Row]) -> list[str]:
    rows = [
        (
            row["name"],
            _number(row.get("parameters")),
            layout_text(row.get("layout")),
            _number(row.get("steps")),
            _number(row.get("tokens")),
            _number(row.get("validation_loss")),
        )
        for row in candidates
    ]
    return _table(("candidate", "parameters", "layout", "steps", "tokens", "validation loss"), rows)


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table; none without rows. The first column is text, the others are numbers."""
    if not rows:
        return []
    return [_line(titles), _line((":---", *["---:"] * (len(titles) - 1))), *(_line(row) for row in rows)]


def _facts_table(facts: Mapping[str, str]) -> str:
    return "\n".join([_line(("", "")), _line(("---", "---")), *(_line(fact) for fact in facts.items() if fact[1])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _titled(title: str, lines: Sequence[str]) -> list[str]:
    return [title, "\n".join(lines)] if lines else []


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value if value is not None else "–")
