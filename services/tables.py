"""Tables for the terminal, from the same documents that ``--json`` prints."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

Row = Mapping[str, Any]


def sized(number_bytes: float | None) -> str:
    """Bytes in the largest unit that leaves at least one digit before the point."""
    if number_bytes is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if number_bytes < 1000:
            return f"{number_bytes:.0f} B" if unit == "B" else f"{number_bytes:.3g} {unit}"
        number_bytes /= 1000
    return f"{number_bytes:.3g} TB"


def counted(number: float | None) -> str:
    """A count with its magnitude: 950, 12.3k, 5.2M, 8.3B."""
    if number is None:
        return ""
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def layout_text(layout: Any) -> str:
    """``T2×P1×D1``, with the engine where it is not the usual one."""
    if not isinstance(layout, Mapping):
        return "" if layout is None else str(layout)
    text = "×".join(f"{letter}{layout.get(name, 1)}" for letter, name in zip("TPD", _AXES, strict=True))
    engine = layout.get("engine", "megatron")
    return text if engine == "megatron" else f"{text} {engine}"


_AXES = ("tensor", "pipeline", "data")


def frontier_rows(result: Row, everything: bool) -> list[Row]:
    """The measured variants by size, only those on the frontier unless ``everything``."""
    rows = [row for row in result["variants"] if everything or row.get("on_frontier")]
    return sorted(rows, key=lambda row: row["bytes"])


def frontier_table(result: Row, everything: bool = False) -> Table:
    """Quality against size. On the frontier no other variant is both smaller and better."""
    rows = frontier_rows(result, everything)
    metric = rows[0]["quality"]["metric"] if rows else "quality"
    table = _table("variant", "size", metric, "bits/parameter", "sparsity", "frontier")
    for row in rows:
        table.add_row(
            row["name"],
            sized(row["bytes"]),
            f"{row['quality']['value']:.2f}",
            _number(row.get("bits_per_parameter"), ".2f"),
            _number(row.get("sparsity"), ".0%"),
            "★" if row.get("on_frontier") else "",
            style="bold" if everything and row.get("on_frontier") else "",
        )
    return table


def candidates_table(result: Row) -> Table:
    """What training brought."""
    table = _table("candidate", "parameters", "layout", "steps", "tokens", "FLOPs", "val. loss", "restarts")
    for row in result["candidates"]:
        table.add_row(
            row["name"],
            counted(row.get("parameters")),
            layout_text(row.get("layout")),
            f"{row.get('steps') or 0:,}",
            counted(row.get("tokens")),
            _number(row.get("flops"), ".3g"),
            _number(row.get("validation_loss"), ".4f"),
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
    table = _table("preset", "parameters", "layers", "hidden", "heads", "published in", numbers=("published in",))
    table.columns[-1].justify = "left"
    for preset in presets:
        table.add_row(
            preset["name"],
            counted(preset["parameters"]),
            str(preset["layers"]),
            str(preset["hidden"]),
            str(preset["heads"]),
            preset["source"],
        )
    return table


def _table(*titles: str, numbers: tuple[str, ...] | None = None) -> Table:
    """The first column is text; the others are numbers unless ``numbers`` names which."""
    table = Table(box=None, padding=(0, 1), show_edge=False, header_style="bold")
    for index, title in enumerate(titles):
        is_number = index > 0 if numbers is None else title in numbers
        table.add_column(title, justify="right" if is_number else "left", no_wrap=index == 0)
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
