"""What a grid of recipes costs against one recipe: solving alone, on the shapes of two Llama-style models.

Weights and statistics are random; one layer is solved, and its time multiplied by the number of layers (nothing is
shared between layers). Calibration, files and evaluation are left out. *One* is a single recipe alone; *mean alone* is
the mean over the grid's recipes, each alone. Times are the processor's, the least of several runs: they do not depend
on what else the machine does. Writes ``../results/compression_cost.json``.

    python benchmarks/compression_cost/bench.py [--threads 1] [--repeat 3] [MODEL ...]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compression.methods.base import InputStatistics
from compression.recipe import Pruning, Quantization, Recipe
from compression.solve import solve_group

RESULTS = Path(__file__).resolve().parents[1] / "results" / "compression_cost.json"
SHAPES = {
    "5M": {"layers": 6, "hidden": 256, "ffn_hidden": 704},
    "50M": {"layers": 12, "hidden": 576, "ffn_hidden": 1536},
}
TOKENS = 2048


@dataclass(frozen=True)
class Group:
    """Matrices of a layer that share their inputs, and H of these."""

    matrices: Mapping[str, Tensor]
    hessian: Tensor


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(SHAPES), help=", ".join(SHAPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'model':6} {'grid':16} {'one':>8} {'mean alone':>11} {'twelve':>8} {'/ one':>6} {'/ mean':>7}   seconds")
    with torch.inference_mode():
        for model in arguments.models:
            groups = layer(SHAPES[model]["hidden"], SHAPES[model]["ffn_hidden"])
            for name, recipes in GRIDS.items():
                row = measure(groups, recipes, SHAPES[model]["layers"], arguments.repeat)
                rows.append({"model": model, "grid": name} | row)
                print(
                    f"{model:6} {name:16} {row['one']:8.2f} {row['mean_alone']:11.2f} {row['together']:8.2f}"
                    f" {row['together'] / row['one']:6.2f} {row['together'] / row['mean_alone']:7.2f}",
                    flush=True,
                )
    document = {"torch": torch.__version__, "threads": arguments.threads, "unit": "processor seconds", "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def layer(hidden: int, ffn_hidden: int) -> list[Group]:
    """A Llama-style layer's linear weights by the inputs that they share."""
    generator = torch.Generator().manual_seed(0)

    def group(names: Sequence[str], columns: int, rows: int) -> Group:
        mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * 0.1
        inputs = torch.randn(TOKENS, columns, generator=generator) @ mixing
        matrices = {name: torch.randn(rows, columns, generator=generator) * 0.05 for name in names}
        return Group(matrices, inputs.T @ inputs)

    return [
        group(("attention.q", "attention.k", "attention.v"), hidden, hidden),
        group(("attention.o",), hidden, hidden),
        group(("mlp.gate", "mlp.up"), hidden, ffn_hidden),
        group(("mlp.down",), ffn_hidden, hidden),
    ]


def measure(groups: Sequence[Group], recipes: Sequence[Recipe], layers: int, repeat: int) -> dict[str, Any]:
    """Seconds for all layers: the first recipe alone, the mean of all alone, and all together."""
    solve(groups, recipes[:1])
    alone = [least(lambda one=recipe: solve(groups, [one]), repeat) * layers for recipe in recipes]
    together = least(lambda: solve(groups, recipes), repeat) * layers
    return {
        "recipes": [recipe.name for recipe in recipes],
        "one": alone[0],
        "mean_alone": sum(alone) / len(alone),
        "together": together,
    }


def solve(groups: Sequence[Group], recipes: Sequence[Recipe]) -> None:
    """One layer under all recipes, statistics factorised anew."""
    for group in groups:
        unused = torch.zeros(len(group.hessian))
        statistics = InputStatistics(group.hessian, TOKENS, unused, unused)
        solve_group(group.matrices, [dict.fromkeys(group.matrices, recipe) for recipe in recipes], statistics)


def least(work: Callable[[], None], repeat: int) -> float:
    """Processor seconds of the fastest of several runs."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def gptq(bits: int, group_size: int | None = 64, symmetric: bool = True) -> Recipe:
    """A recipe of GPTQ."""
    return Recipe(quantize=Quantization(method="gptq", bits=bits, group_size=group_size, symmetric=symmetric))


def sparsegpt(sparsity: float, pattern: str | None = None, quantize: Quantization | None = None) -> Recipe:
    """A recipe of SparseGPT, alone or with quantisation in the same solve."""
    return Recipe(prune=Pruning(method="sparsegpt", sparsity=sparsity, pattern=pattern), quantize=quantize)


GRIDS = {
    "GPTQ": [gptq(bits, group, kind) for bits in (4, 3, 8) for group in (64, None) for kind in (True, False)],
    "GPTQ × SparseGPT": [
        *(gptq(bits) for bits in (4, 3, 8)),
        *(sparsegpt(0.5, pattern) for pattern in (None, "2:4")),
        sparsegpt(0.7),
        *(sparsegpt(0.5, pattern, gptq(bits).quantize) for pattern in (None, "2:4") for bits in (4, 3, 8)),
    ],
}


if __name__ == "__main__":
    main()
