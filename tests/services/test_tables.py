"""Numbers as people read them, and tables that say what the documents say."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from launcher.planning.cluster import h100_cluster
from launcher.planning.plan import make_plan
from launcher.spec import load_spec
from parallelism.layout import layout_text
from services.tables import (
    candidates_table,
    counted,
    frontier_table,
    marked_variants,
    memory_table,
    plan_lines,
    plan_table,
    sized,
)


def text_of(table: Table, width: int = 160) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return text.getvalue()


def result() -> dict[str, Any]:
    rows = [("big", 2_000_000, 5.0), ("worse", 2_500_000, 9.0), ("tiny", 100_000, 12.0)]
    return {
        "candidates": [
            {
                "name": "c",
                "parameters": 5_200_000,
                "layout": {"tensor": 2, "pipeline": 1, "data": 1, "engine": "megatron"},
                "steps": 1200,
                "tokens": 2_457_600,
                "flops": 3e12,
                "validation_loss": 3.25,
                "restarts": 1,
            }
        ],
        "variants": [
            {
                "name": f"c/{name}",
                "candidate": "c",
                "bytes": size,
                "quality": {"metric": "perplexity", "value": value, "higher_is_better": False},
                "bits_per_parameter": 8.0,
                "sparsity": 0.5,
                "metrics": {"perplexity": value},
                "recipe": {"prune": {"method": "magnitude", "sparsity": 0.5}},
                "path": f"{name}.esp",
            }
            for name, size, value in rows
        ],
    }


@pytest.mark.parametrize(
    ("number", "text"), [(None, ""), (0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")]
)
def test_sized(number: float | None, text: str) -> None:
    assert sized(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(None, ""), (950, "950"), (12_340, "12.3k"), (8.3e9, "8.3B"), (2e12, "2T")]
)
def test_counted(number: float | None, text: str) -> None:
    assert counted(number) == text


def test_layout_text_names_the_engine_only_where_it_is_unusual() -> None:
    assert layout_text({"tensor": 2, "pipeline": 1, "data": 3}) == "T2×P1×D3"
    zero = {"tensor": 1, "data": 2, "engine": "deepspeed", "zero_stage": 3}
    assert layout_text(zero) == "T1×P1×D2 ZeRO-3 deepspeed"
    assert layout_text(None) == ""


def test_frontier_table_lists_by_size_and_leaves_out_the_beaten() -> None:
    text = text_of(frontier_table(marked_variants(result())))
    assert text.index("c/tiny") < text.index("c/big")
    assert "c/worse" not in text
    assert "perplexity" in text
    assert text.count("★") == 2
    assert "c/worse" in text_of(frontier_table(marked_variants(result()), everything=True))


def test_frontier_table_of_a_job_without_variants_is_empty() -> None:
    assert frontier_table(marked_variants({"variants": []})).row_count == 0


def test_candidates_table_has_a_row_per_candidate() -> None:
    text = text_of(candidates_table(result()))
    for part in ("5.2M", "T2×P1×D1", "1,200", "2.46M", "3e12", "3.2500"):
        assert part in text


def test_a_plan_fits_a_terminal_of_80_columns() -> None:
    spec = load_spec(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
    plan = make_plan(spec, h100_cluster(8), 4096).model_dump(mode="json")
    for table in (plan_table(plan), memory_table(plan)):
        text = text_of(table, width=80)
        assert "…" not in text
        assert len(text.splitlines()) == table.row_count + 1
    text = text_of(plan_table(plan), width=80)
    chosen = [row["layout_chosen"] for row in plan["candidates"]]
    assert text.count("*") == sum(chosen) > 0
    assert "* layout chosen by the planner" in plan_lines(plan)
    assert "cost" not in text
    plan["candidates"][0]["cost"] = 1.5
    assert "1.50" in text_of(plan_table(plan))
