"""Tables for the terminal, from the same documents that ``--json`` prints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from compression.report import mark_frontier, short_bytes, short_number
from compression.results import Variant
from parallelism.layout import layout_text
from services.progress import clock

Row = Mapping[str, Any]


def sized(number_bytes: float | None) -> str:
    """Bytes in the largest unit that leaves at least one digit before the point."""
    return "" if number_bytes is None else short_bytes(number_bytes)


def counted(number: float | None) -> str:
    """A count with its magnitude: 950, 12.3k, 5.2M, 8.3B."""
    if number is None:
        return ""
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def marked_variants(result: Row) -> list[Variant]:
    """The variants measured so far, smallest first, each told whether it is on the frontier of these."""
    return mark_frontier([Variant.model_validate(row) for row in result["variants"]])


def frontier_table(variants: Sequence[Variant], everything: bool = False) -> Table:
    """Quality against size. On the frontier no other variant is both smaller and better."""
    metric = variants[0].quality.metric if variants else "quality"
    table = _table("variant", "size", metric, "bits/param", "sparsity", "frontier")
    for variant in variants:
        if everything or variant.on_frontier:
            table.add_row(
                variant.name,
                sized(variant.bytes),
                f"{variant.quality.value:.2f}",
                f"{variant.bits_per_parameter:.2f}",
                f"{variant.sparsity:.0%}",
                "★" if variant.on_frontier else "",
                style="bold" if everything and variant.on_frontier else "",
            )
    return table


def candidates_table(result: Row) -> Table:
    """What training brought."""
    table = _table("candidate", "params", "layout", "steps", "tokens", "FLOPs", "val. loss", "restarts")
    for row in result["candidates"]:
        if row.get("source"):
            table.add_row(row["name"], counted(row.get("parameters")), "", "given", "", "", "", "")
            continue
        table.add_row(
            row["name"],
            counted(row.get("parameters")),
            layout_text(row.get("layout")),
            f"{row.get('steps') or 0:,}",
            counted(row.get("tokens")),
            short_number(row["flops"]) if row.get("flops") is not None else "",
            f"{row['validation_loss']:.4f}" if row.get("validation_loss") is not None else "",
            str(row.get("restarts") or 0),
        )
    return table


def jobs_table(jobs: Sequence[Row]) -> Table:
    """Every job of a home."""
    table = _table("job", "name", "state", "attempts", "created", numbers=("attempts",))
    for job in jobs:
        table.add_row(job["job"], job["name"], job["state"], str(job["attempts"]), job["created"])
    return table


def presets_table(presets: Sequence[Row]) -> Table:
    """Published models that a spec may name."""
    numbers = ("parameters", "layers", "hidden", "heads")
    table = _table("preset", *numbers, "published in", numbers=numbers)
    for preset in presets:
        table.add_row(
            preset["name"],
            counted(preset["parameters"]),
            str(preset["layers"]),
            str(preset["hidden"]),
            str(preset["heads"]),
            preset["source"].partition(",")[0],  # without the title
        )
    return table


def plan_table(plan: Row) -> Table:
    """What each candidate is and takes; a layout with a star was chosen by the planner."""
    priced = any(row["cost"] for row in plan["candidates"])
    titles = ("candidate", "params", "layout", "batch (micro)", "steps", "tokens", "memory", "time")
    table = _table(*titles, *(["cost"] if priced else []))
    for row in plan["candidates"]:
        training = row["training"]
        table.add_row(
            row["name"],
            counted(row["parameters"]),
            layout_text(row["layout"]) + ("*" if row["layout_chosen"] else ""),
            f"{training['global_batch']} ({training['micro_batch']})",
            f"{row['steps']:,}",
            counted(row["tokens"]),
            sized(row["memory_bytes"]),
            clock(row["seconds"]),
            *([f"{row['cost']:.2f}"] if priced else []),
        )
    for row in plan.get("sources", []):
        table.add_row(row["name"], counted(row["parameters"]), "given")
    return table


def memory_table(plan: Row) -> Table:
    """Memory per device by part, above what a process holds before it has a model; of recoveries, the largest."""
    rows = {row["name"]: row["memory"] for row in plan["candidates"]}
    for lineage in _lineages(plan):
        if lineage["recoveries"]:
            most = max(lineage["recoveries"], key=lambda row: row["memory_bytes"])
            rows[f"{lineage['name']}/{most['recipe']}"] = most["memory"]
    parts = [name for name in next(iter(rows.values()), {}) if any(memory[name] for memory in rows.values())]
    table = _table("memory per device", *rows)
    for part in parts:
        table.add_row(part.replace("_", " "), *(sized(memory[part]) for memory in rows.values()))
    return table


def plan_lines(plan: Row) -> list[str]:
    """The whole job in one line, and what there is to say about single candidates."""
    recovers = any(lineage["recoveries"] for lineage in _lineages(plan))
    what = "training and recovery" if recovers else "training"
    text = f"{plan['variants']} variants; about {clock(plan['seconds'])} of {what} one after the other"
    text += f"; up to {sized(plan['disk_bytes'])} of disk"
    if plan["calibration_bytes"]:
        text += f", {sized(plan['calibration_bytes'])} of it only while calibrating"
    text += f"; cost {plan['cost']:.2f}" if plan["cost"] else ""
    chosen = ["* layout chosen by the planner"] if any(row["layout_chosen"] for row in plan["candidates"]) else []
    lineages = [line for lineage in _lineages(plan) for line in _lineage_lines(lineage)]
    lineages += [
        f"{row['name']}: the optimizer takes up to {sized(row['offload_bytes'])} in {row['layout']['offload_dir']}"
        for row in plan["candidates"]
        if row["offload_bytes"]
    ]
    notes = [f"{row['name']}: {note}" for row in plan["candidates"] for note in row["notes"]]
    return [*chosen, text, *lineages, *notes]


def _lineage_lines(lineage: Row) -> Iterator[str]:
    """What calibration and recovery of one candidate take."""
    disk, recoveries = lineage["calibration"], lineage["recoveries"]
    if disk["statistics_bytes"] or disk["hidden_bytes"]:
        statistics = f"statistics of at most {disk['layers']} layers at once take {sized(disk['statistics_bytes'])}"
        yield f"{lineage['name']}: calibration: {statistics}, hidden states {sized(disk['hidden_bytes'])} of disk"
    if recoveries:
        seconds, steps = sum(row["seconds"] for row in recoveries), max(row["steps"] for row in recoveries)
        layouts = " and ".join(dict.fromkeys(layout_text(row["layout"]) for row in recoveries))
        time = f"up to {steps:,} steps each, about {clock(seconds)} one after the other"
        yield f"{lineage['name']}: {len(recoveries)} variants recovered at {layouts}: {time}"


def _lineages(plan: Row) -> list[Row]:
    return [*plan["candidates"], *plan["sources"]]


def dry_run_table(built: Row) -> Table:
    """Every rank's part of one candidate."""
    table = _table("rank", "tensor", "pipeline", "layers", "parameters", "weights", "memory")
    for row in built["ranks"]:
        place = [str(row[name]) for name in ("rank", "tensor", "pipeline", "layers")]
        table.add_row(*place, f"{row['parameters']:,}", sized(row["bytes"]), sized(row["memory_bytes"]))
    return table


def dry_run_line(built: Row) -> str:
    """Whether the parts are the model."""
    verdict = "the parts add up to the model" if built["ok"] else "THE PARTS DO NOT ADD UP TO THE MODEL"
    counts = f"{built['total']:,} of {built['expected']:,} parameters on {len(built['ranks'])} ranks"
    return "\n".join([f"{built['candidate']}: {counts}: {verdict}", *built["problems"][:5]])


def processes_table(processes: Sequence[Row]) -> Table:
    """Every process of a running job."""
    table = _table("role", "candidate", "rank", "pid", "node", numbers=("rank", "pid"))
    for row in processes:
        table.add_row(
            *("" if row[name] is None else str(row[name]) for name in ("role", "candidate", "rank", "pid", "node"))
        )
    return table


def _table(*titles: str, numbers: tuple[str, ...] | None = None) -> Table:
    """The first column is text; the others are numbers unless ``numbers`` names which."""
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        is_number = index > 0 if numbers is None else title in numbers
        table.add_column(title, justify="right" if is_number else "left", no_wrap=index == 0)
    return table
