"""The published models that a job may name, as rows for tables and documents."""

from typing import Any

from parallelism.presets import PRESETS, resolve_model


def preset_rows() -> list[dict[str, Any]]:
    """Name, parameters, shape and source of every preset, the smallest first."""
    rows: list[dict[str, Any]] = []
    for name, preset in PRESETS.items():
        config = resolve_model({"preset": name})
        shape = {"layers": config.layers, "hidden": config.hidden, "heads": config.heads}
        rows.append({"name": name, "parameters": config.parameter_count(), **shape, "source": preset.source})
    return sorted(rows, key=lambda row: int(row["parameters"]))
