"""Table, data and picture of a frontier."""

import json
import math
from pathlib import Path

import pytest

from compression.recipe import Quantization, Recipe
from compression.report import COLUMNS, mark_frontier, markdown, short_bytes, table, write_report
from compression.results import Score, Variant


def _variant(candidate: str, recipe: Recipe, size: int, perplexity: float) -> Variant:
    return Variant(
        name=f"{candidate}/{recipe.name}",
        candidate=candidate,
        recipe=recipe,
        quality=Score(value=perplexity),
        metrics={"bits_per_byte": math.log2(perplexity) / 3, "accuracy": 0.25},
        bytes=size,
        bits_per_parameter=4.5,
        sparsity=0.0,
        path="unused",
    )


FOUR, EIGHT = (Recipe(quantize=Quantization(method="rtn", bits=bits)) for bits in (4, 8))
VARIANTS = [
    _variant("large", Recipe(), 8_000_000, 20.0),
    _variant("large", FOUR, 2_100_000, 22.0),
    _variant("small", Recipe(), 3_000_000, 30.0),
    _variant("small", FOUR, 800_000, 33.0),
    _variant("small", EIGHT, 1_500_000, 900_000.0),
]


def test_the_frontier_spans_candidates() -> None:
    marked = mark_frontier(VARIANTS)
    assert [variant.bytes for variant in marked] == sorted(variant.bytes for variant in VARIANTS)
    assert [variant.name for variant in marked if variant.on_frontier] == [
        "small/rtn-w4",
        "large/rtn-w4",
        "large/dense",
    ]
    assert all(variant.on_frontier is None for variant in VARIANTS)


def test_every_variant_is_a_row() -> None:
    marked = mark_frontier(VARIANTS)
    rows = table(marked)
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert rows[0] == ("small/rtn-w4", "33", "1.6815", "25.0%", "800,000", "4.50", "0%", "★")
    lines = markdown(marked).splitlines()
    assert len(lines) == 2 + len(VARIANTS)
    assert lines[0].startswith("| variant | perplexity | bits/byte |")


def test_the_report_is_a_table_a_picture_and_data(tmp_path: Path) -> None:
    from matplotlib.image import imread

    files = write_report(VARIANTS, tmp_path / "report", "a title")
    rows = json.loads(files.data.read_text())["variants"]
    assert [Variant.model_validate(row) for row in rows] == mark_frontier(VARIANTS)
    assert files.table.read_text() == markdown(mark_frontier(VARIANTS))
    picture = imread(files.picture)
    height, width, _ = picture.shape
    assert width > 1200
    assert height > 700
    # Both candidates' colors are in it: blue for the smaller, vermilion for the larger.
    for red, green, blue in ((0.0, 0.447, 0.698), (0.835, 0.369, 0.0)):
        near = (abs(picture[..., 0] - red) < 0.02) & (abs(picture[..., 1] - green) < 0.02)
        assert (near & (abs(picture[..., 2] - blue) < 0.02)).sum() > 200
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "frontier.json",
        "frontier.md",
        "frontier.png",
    ]


@pytest.mark.parametrize("variants", [[], VARIANTS[:1], VARIANTS[4:]])
def test_few_variants_are_drawn_too(tmp_path: Path, variants: list[Variant]) -> None:
    assert write_report(variants, tmp_path).picture.stat().st_size > 5000


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_340_000, "2.34 MB"), (7e9, "7 GB"), (999_900, "1 MB")],
)
def test_sizes_are_short(size: float, text: str) -> None:
    assert short_bytes(size) == text
