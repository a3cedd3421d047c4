"""Recovery: a trained 5M model at 70 % sparsity, at 3 bits and at half its neurons, before and after finetuning.

The model is the first of ``benchmarks/reference``, trained there unless it is in ``--home`` already. One job has it as
two candidates, one recovered by two tensor-parallel ranks and one by two pipeline stages, with distillation from the
dense model and, at 3 bits, with rounded weights while training. Afterwards every weight that was pruned has to be zero
still. Writes ``../results/recovery.json``.

    python benchmarks/recovery/bench.py [--tokens 250000] [--home DIR]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.reference.bench import job, run
from compression.compact import CompactFile

RESULTS = Path(__file__).resolve().parents[1] / "results" / "recovery.json"
MINUTES = 30.0
SHARE = 0.2
LAYOUTS = {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}
RECIPES = ("sparsegpt-s70", "gptq-w3", "neurons-s50")


def main() -> int:
    """Run the job, check the zeros, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=250_000.0, help="of every recovered variant")
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "espalier-reference")
    options = parser.parse_args()
    (dense,) = run(job(1, MINUTES), options.home)["candidates"]
    result = run(recovery(dense["checkpoint"], options.tokens), options.home)
    rows = {row["name"]: row for row in result["variants"]}
    table = {name: layout_table(name, rows) for name in LAYOUTS}
    document = {"tokens": options.tokens, "layouts": table, "stage_seconds": result["stages"]}
    print(json.dumps(document, indent=1))
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["revived"] == 0 for part in table.values() for row in part.values()) else 1


def recovery(checkpoint: str, tokens: float) -> dict[str, Any]:
    """The job: one model, two layouts."""
    spec = job(1, MINUTES) | {"name": f"recovery-{tokens:g}", "budget": {"tokens": tokens / SHARE}}
    spec["candidates"] = [
        {"name": name, "source": checkpoint, "layout": layout, "training": {"global_batch": 16, "micro_batch": 4}}
        for name, layout in LAYOUTS.items()
    ]
    spec["compression"] = {
        "structure": {"neurons": [0.5]},
        "prune": {"methods": ["sparsegpt"], "sparsity": [0.7]},
        "quantize": {"methods": ["gptq"], "bits": [3], "embedding_bits": 16},
        "recover": {"budget_fraction": SHARE, "distill": True, "quantization_aware": True, "recipes": list(RECIPES)},
    }
    spec["execution"] = {"devices": 2}
    return spec


def layout_table(layout: str, rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Recipe → perplexity before and after, beside the dense model's, and pruned weights that are not zero any more."""
    table = {}
    for recipe in RECIPES:
        before, after = rows[f"{layout}/{recipe}"], rows[f"{layout}/{recipe}-recovered"]
        table[recipe] = {
            "dense": rows[f"{layout}/dense"]["metrics"]["perplexity"],
            "before": before["metrics"]["perplexity"],
            "after": after["metrics"]["perplexity"],
            "sparsity": after["sparsity"],
            "revived": revived(CompactFile(before["path"]), CompactFile(after["path"])) if before["sparsity"] else 0,
        }
    return table


def revived(before: CompactFile, after: CompactFile) -> int:
    """Weights of linear layers that are zero in ``before`` and not in ``after``."""
    count = 0
    for index in range(before.config.layers):
        old, new = before.layer(index), after.layer(index)
        count += sum(int(((old[name] == 0) & (new[name] != 0)).sum()) for name in old if old[name].ndim == 2)
    return count


if __name__ == "__main__":
    sys.exit(main())
