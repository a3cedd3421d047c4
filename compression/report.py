"""What a job found, for people and programs: a table, a picture of the frontier, and the data behind both.

Torch-free; matplotlib is imported when the picture is drawn.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.frontier import Point, frontier
from compression.results import Variant
from parallelism import places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from matplotlib.transforms import BboxBase

COLUMNS = ("variant", "quality", "bits/byte", "accuracy", "bytes", "bits/param", "sparsity", "frontier")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F5539", "#5A189A")
"""Told apart by colour-blind readers too (Okabe and Ito); taken again from the beginning by a ninth candidate."""
_OUT_OF_SIGHT = 6.0
"""Perplexities above this multiple of the worst dense model's are drawn at the upper edge."""


@dataclass(frozen=True)
class ReportFiles:
    """Where the report was written."""

    table: Path
    picture: Path
    data: Path


def write_report(variants: Sequence[Variant], directory: str | Path, title: str = "") -> ReportFiles:
    """Find the frontier over all variants and write ``frontier.md``, ``frontier.png`` and ``frontier.json``."""
    directory = Path(directory)
    marked = mark_frontier(variants)
    files = ReportFiles(directory / "frontier.md", directory / "frontier.png", directory / "frontier.json")
    places.write_text(files.table, markdown(marked))
    places.write_text(
        files.data, json.dumps({"version": 1, "variants": [variant.row() for variant in marked]}, indent=1)
    )
    draw(marked, files.picture, title)
    places.share(files.picture, keep=False)
    return files


def mark_frontier(variants: Sequence[Variant]) -> list[Variant]:
    """The variants, smallest first, each with ``on_frontier`` set. They may belong to several candidates."""
    ordered = sorted(variants, key=lambda variant: (variant.bytes, variant.name))
    points = [Point(each.bytes, each.quality.value, each.quality.higher_is_better) for each in ordered]
    return [
        variant.model_copy(update={"on_frontier": on}) for variant, on in zip(ordered, frontier(points), strict=True)
    ]


def table(variants: Sequence[Variant]) -> list[tuple[str, ...]]:
    """One row of text per variant, in the order of :data:`COLUMNS`."""
    return [
        (
            variant.name,
            f"{variant.quality.value:.4g}",
            _metric(variant, "bits_per_byte", "{:.4f}"),
            _metric(variant, "accuracy", "{:.1%}"),
            f"{variant.bytes:,}",
            f"{variant.bits_per_parameter:.2f}",
            f"{variant.sparsity:.0%}",
            "★" if variant.on_frontier else "",
        )
        for variant in variants
    ]


def markdown(variants: Sequence[Variant]) -> str:
    """The table in Markdown."""
    metric = variants[0].quality.metric if variants else "quality"
    header = tuple(metric if column == "quality" else column for column in COLUMNS)
    rows = [header, ("---", *["---:"] * (len(COLUMNS) - 2), ":---:"), *table(variants)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def draw(variants: Sequence[Variant], path: str | Path, title: str = "") -> None:
    """Quality against bytes, one colour per candidate, dense models as squares, the frontier as a line (PNG).

    ``variants`` carry ``on_frontier`` and are sorted as :func:`mark_frontier` does. Raises ``OSError``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.5), dpi=140, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [variant for variant in variants if math.isfinite(variant.quality.value)]
    ceiling = _ceiling(shown)
    _draw_points(axes, shown, ceiling)
    _draw_frontier(axes, shown)
    _dress(axes, shown, title, ceiling)
    canvas.draw()
    _label(axes, shown, ceiling, canvas.get_renderer())
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    figure.savefig(draft, format="png")
    draft.replace(path)


def _ceiling(variants: Sequence[Variant]) -> float:
    """Above this value points are drawn at the edge; otherwise one ruined variant would flatten all others."""
    values = [variant.quality.value for variant in variants]
    if not variants or variants[0].quality.higher_is_better:
        return math.inf
    dense = [variant.quality.value for variant in variants if _is_dense(variant)]
    limit = _OUT_OF_SIGHT * max(dense or [min(values)])
    return limit if max(values) > limit else math.inf


def _draw_points(axes: "Axes", variants: Sequence[Variant], ceiling: float) -> None:
    for candidate, color in _colors(variants).items():
        axes.scatter([], [], color=color, label=candidate)
        for variant in (each for each in variants if each.candidate == candidate):
            value, hidden = variant.quality.value, variant.quality.value > ceiling
            axes.scatter(
                variant.bytes,
                min(value, ceiling),
                s=95 if _is_dense(variant) else 55,
                marker="^" if hidden else "s" if _is_dense(variant) else "o",
                facecolor=color if variant.on_frontier else "white",
                edgecolor=color,
                linewidth=1.6,
                zorder=3 if variant.on_frontier else 2,
                alpha=0.45 if hidden else 1.0,
            )


def _draw_frontier(axes: "Axes", variants: Sequence[Variant]) -> None:
    points = [variant for variant in variants if variant.on_frontier]
    sizes, values = [point.bytes for point in points], [point.quality.value for point in points]
    axes.plot(sizes, values, drawstyle="steps-post", color="0.35", linewidth=1.2, zorder=1, label="frontier")


def _dress(axes: "Axes", variants: Sequence[Variant], title: str, ceiling: float) -> None:
    """Axes, legend and title."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    score = variants[0].quality if variants else None
    metric = score.metric if score else "quality"
    better = "higher" if score and score.higher_is_better else "lower"
    axes.set_title(title or "Quality against size, every candidate trained for the same budget")
    axes.set_xscale("log")
    axes.set_xlabel("size of the compact file (logarithmic)")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short_bytes(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{metric} on held-out text ({better} is better)")
    values = [min(variant.quality.value, ceiling) for variant in variants]
    if values and min(values) > 0 and max(values) / min(values) > 2.5:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.margins(x=0.08, y=0.08)
    if ceiling < math.inf:
        axes.set_ylim(top=ceiling * 1.12)
    axes.grid(which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.scatter([], [], marker="s", s=70, facecolor="white", edgecolor="0.35", linewidth=1.6, label="dense bfloat16")
    axes.scatter([], [], marker="o", s=50, facecolor="0.35", edgecolor="0.35", label="on the frontier")
    if any(variant.quality.value > ceiling for variant in variants):
        axes.scatter([], [], marker="^", facecolor="white", edgecolor="0.35", label=f"{metric} above the picture")
    axes.legend(frameon=False, loc="best", fontsize=9)


Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


def _label(axes: "Axes", variants: Sequence[Variant], ceiling: float, renderer: "RendererBase") -> None:
    """Names beside frontier and dense points, where they cover no point, line or other name; else left out."""
    from matplotlib.text import Text

    places = {each.name: (each.bytes, min(each.quality.value, ceiling)) for each in variants}
    pixels = {name: axes.transData.transform(place) for name, place in places.items()}
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in pixels.values()]
    corners = [(each.bytes, each.quality.value) for each in variants if each.on_frontier]
    taken += _stairs([tuple(axes.transData.transform(corner)) for corner in corners])
    if legend := axes.get_legend():
        taken.append(_pixels(legend.get_window_extent(renderer)))
    colors = _colors(variants)
    frame = axes.bbox.x0, axes.bbox.y0, axes.bbox.x1, axes.bbox.y1
    for variant in sorted((each for each in variants if each.on_frontier or _is_dense(each)), key=_is_dense):
        for offset, horizontal, vertical in _PLACES:
            corner = (0.0, 0.0) if vertical == "bottom" else (1.0, 1.0)
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5, "relpos": corner}
            label = axes.annotate(
                variant.recipe.name,
                places[variant.name],
                xytext=offset,
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=7.5,
                color=colors[variant.candidate],
                arrowprops=line if abs(offset[0]) > 7 else None,
            )
            label.update_positions(renderer)
            box = _pixels(Text.get_window_extent(label, renderer))  # the name's alone, without its line to the point
            if not any(_overlap(box, other) for other in taken) and _inside(box, frame):
                taken.append(box)
                break
            label.remove()


_PLACES = (
    ((7, 4), "left", "bottom"),
    ((-7, -4), "right", "top"),
    ((-7, 4), "right", "bottom"),
    ((7, -4), "left", "top"),
    ((-12, -20), "right", "top"),
    ((12, 20), "left", "bottom"),
    ((-18, -36), "right", "top"),
    ((18, 36), "left", "bottom"),
    ((24, 56), "left", "bottom"),
)
"""Where a name may stand beside its point: offset in points, and which corner of the name is there.

Farther away it is joined to its point by a line."""


def _colors(variants: Sequence[Variant]) -> dict[str, str]:
    """Candidate → its color, the smallest candidate first."""
    dense = sorted(variants, key=lambda variant: (not _is_dense(variant), variant.bytes))
    names = dict.fromkeys(variant.candidate for variant in dense)
    return {name: COLORS[place % len(COLORS)] for place, name in enumerate(names)}


def _stairs(points: Sequence[tuple[float, ...]]) -> list[Box]:
    """Boxes around the frontier's line."""
    boxes: list[Box] = []
    for (x, y), (next_x, next_y) in pairwise(points):
        boxes += [(x, y - 2, next_x, y + 2), (next_x - 2, min(y, next_y), next_x + 2, max(y, next_y))]
    return boxes


def _pixels(extent: "BboxBase") -> Box:
    return extent.x0, extent.y0, extent.x1, extent.y1


def _overlap(first: Box, second: Box) -> bool:
    left, bottom, right, top = first
    return left < second[2] and second[0] < right and bottom < second[3] and second[1] < top


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]


def short_bytes(size: float) -> str:
    """``1.5 MB`` and the like: three digits, powers of 1000."""
    rounded = float(f"{size:.3g}")  # 999,900 bytes are 1 MB, not 1000 kB
    power = min(4, max(0, int(math.log10(rounded) // 3))) if rounded >= 1 else 0
    return f"{rounded / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def short_number(number: float) -> str:
    """Three digits: ``0.0521``, ``3e12``."""
    return f"{number:.3g}".replace("e+", "e")


def _is_dense(variant: Variant) -> bool:
    return variant.recipe.prune is None and variant.recipe.quantize is None


def _metric(variant: Variant, name: str, form: str) -> str:
    value: Any = variant.metrics.get(name)
    return "" if value is None else form.format(value)
