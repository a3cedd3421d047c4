"""The frontier as one page that stands alone: a plot that answers to the mouse, and the table behind it."""

import math
from collections.abc import Sequence
from typing import Any

from compression.report import COLORS, short_bytes
from compression.results import Variant
from services.web.render import Page, render


def frontier_page(name: str, variants: Sequence[Variant]) -> Page:
    """``variants`` carry ``on_frontier``, the smallest first."""
    return render("frontier.html", ("plot.js",), name=name, plot=plot_data(variants), rows=_rows(variants))


def plot_data(variants: Sequence[Variant]) -> dict[str, Any]:
    """What the script draws."""
    shown = [each for each in variants if math.isfinite(each.quality.value)]
    score = shown[0].quality if shown else None
    return {
        "metric": score.metric if score else "quality",
        "higher": score.higher_is_better if score else False,
        "colors": list(COLORS),
        "points": [
            {
                "name": each.name,
                "candidate": each.candidate,
                "recipe": each.recipe.name,
                "bytes": each.bytes,
                "size": short_bytes(each.bytes),
                "value": each.quality.value,
                "bits": round(each.bits_per_parameter, 2),
                "sparsity": round(each.sparsity, 3),
                "frontier": bool(each.on_frontier),
            }
            for each in shown
        ],
    }


def _rows(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    return [
        {
            "name": each.name,
            "size": short_bytes(each.bytes),
            "value": f"{each.quality.value:.4g}",
            "bits": f"{each.bits_per_parameter:.2f}",
            "sparsity": f"{each.sparsity:.0%}",
            "frontier": each.on_frontier,
        }
        for each in variants
    ]
