"""Twelve recipes: our engine beside llm-compressor, on the same exported model, tokens and machine.

The models are trained here by the product (the 5M one is the first of ``benchmarks/reference``), and exported as
Hugging Face directories. Both sides calibrate on the same 64 x 256 tokens and are measured on the same held-out ones,
each in processes of its own, one after the other, with the same threads. ``--batch`` is the number of sequences that
llm-compressor takes at once: 1 is its default, 8 is faster. Its virtual environment is made at ``--peer`` where there
is none. Writes ``../results/llm_compressor.json``; limits are those that the project has set itself.

    python benchmarks/llm_compressor/bench.py [--batch 1] [--peer DIR] [--home DIR] [--threads 2] [MODEL ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.reference.bench import CANDIDATE, job, run
from compression.export import export
from compression.recipe import Pruning, Quantization, Recipe
from parallelism.data.batches import TokenBatches

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "llm_compressor.json"
LENGTH, CALIBRATION, HELD_OUT = 256, 64, 32
SINGLE = "gptq-w4g64"


def gptq(bits: int, group_size: int | None, symmetric: bool = True, method: str = "gptq") -> Recipe:
    """A quantising recipe; the embeddings stay as they are, as the peer leaves them."""
    return Recipe(quantize=Quantization(method=method, bits=bits, group_size=group_size, symmetric=symmetric))


def pruned(method: str, sparsity: float, pattern: str | None = None) -> Recipe:
    """A pruning recipe."""
    return Recipe(prune=Pruning(method=method, sparsity=sparsity, pattern=pattern))


RECIPES = (
    gptq(4, 64),
    gptq(4, None),
    gptq(3, 64),
    gptq(8, None),
    gptq(4, 64, method="rtn"),
    gptq(8, None, method="rtn"),
    gptq(4, 64, symmetric=False, method="awq"),
    Recipe(quantize=Quantization(method="smoothquant", bits=8, activation_bits=8)),
    pruned("sparsegpt", 0.5),
    pruned("sparsegpt", 0.5, "2:4"),
    pruned("wanda", 0.5),
    pruned("wanda", 0.5, "2:4"),
)
MODELS: Mapping[str, tuple[dict[str, Any], float]] = {
    "5M": ({}, 30.0),
    "50M": ({"layers": 12, "hidden": 576, "heads": 9, "ffn_hidden": 1536}, 15.0),
}
"""Name → changes of the reference model, minutes of training on one device."""
LIMITS = {"5M": (30.0, 5.0), "50M": (10.0, 2.0)}
"""How much faster the twelve recipes, and one GPTQ recipe, have to be."""


def main() -> None:
    """Measure and print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--peer", type=Path, default=HERE.parents[1] / ".venv-llm-compressor")
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "espalier-reference")
    parser.add_argument("--batch", type=int, default=1, help="of the peer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    peer = peer_python(arguments.peer)
    document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            dense = prepare(name, arguments.home, work)
            facts = {"threads": arguments.threads, "peer_batch": arguments.batch, "load_average": os.getloadavg()[0]}
            row = facts | measure(work, peer, arguments.threads, arguments.batch, dense)
        document[f"{name}, peer's batch {arguments.batch}"] = row
        print(table(name, row), flush=True)
        RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def peer_python(folder: Path) -> Path:
    """The peer's interpreter, its environment made where there is none."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # torch first and alone: as a dependency it would be fetched in its largest build.
        for requirement in (HERE / "requirements.txt").read_text().split():
            subprocess.run([python, "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def prepare(name: str, home: Path, work: Path) -> float:
    """Train (or find) a model, export it into ``work`` with the tokens of both sides; its perplexity in training."""
    changes, minutes = MODELS[name]
    spec = job(1, minutes)
    if changes:
        spec["name"] = f"reference-{name.lower()}"
        spec["candidates"][0]["model"] |= changes
        # Only the trained model is wanted; the 5M one is shared with the other benchmark.
        spec |= {"compression": {}, "evaluation": {"tokens": 8192}}
    result = run(spec, home)
    data = str(Path(result["directory"]) / "data")
    variant = next(row for row in result["variants"] if row["name"] == f"{CANDIDATE}/dense")
    export(variant["path"], str(work / "model"), data)
    calibration = {"data_dir": data, "sequence_length": LENGTH, "sequences": CALIBRATION, "seed": 1, "damping": 0.01}
    (work / "facts.json").write_text(json.dumps({"calibration": calibration, "held_out": HELD_OUT}))
    for split, count, file in (("train", CALIBRATION, "calibration"), ("validation", HELD_OUT, "held_out")):
        rows = TokenBatches(data, split, LENGTH, 1).rows(range(count))
        np.save(work / f"{file}.npy", rows[:, :-1] if split == "train" else rows)
    documents = {recipe.name: recipe.model_dump(mode="json") for recipe in RECIPES}
    (work / "recipes.json").write_text(json.dumps(documents))
    return float(variant["quality"]["value"])


def measure(work: Path, peer: Path, threads: int, batch: int, dense: float) -> dict[str, Any]:
    """Both sides, ours around the peer's: alone, together and sequential before, alone and together after."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    files = (work, work / "recipes.json")

    def ours(mode: str) -> dict[str, Any]:
        command = [sys.executable, HERE / "engine.py", *files, mode]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    before = {mode: ours(mode) for mode in (SINGLE, "together", "sequential")}
    command = [peer, HERE / "peer.py", *files, str(batch)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    theirs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith(b"{")]
    after = {mode: ours(mode) for mode in (SINGLE, "together")}
    total = sum(row["seconds"] for row in theirs)
    single = next(row["seconds"] for row in theirs if row["name"] == SINGLE)
    together = [run["together"]["seconds"] for run in (before, after)]
    alone = [run[SINGLE]["seconds"] for run in (before, after)]
    return {
        "dense": dense,
        "seconds": {
            "ours": {"together": together, "single": alone, "sequential": before["sequential"]["seconds"]},
            "peer": {"total": total, "single": single},
        },
        "times_faster": {
            "together": total / max(together),
            "single": single / max(alone),
            "sequential": total / before["sequential"]["seconds"],
        },
        "perplexity": {
            row["name"]: {
                "peer": row["perplexity"],
                "shared": before["together"]["perplexity"][row["name"]],
                "sequential": before["sequential"]["perplexity"][row["name"]],
            }
            for row in theirs
        },
        "peer_seconds": {row["name"]: row["seconds"] for row in theirs},
    }


def table(name: str, row: Mapping[str, Any]) -> str:
    """Times and perplexities, ours relative to the peer's."""
    ours, peer, faster = row["seconds"]["ours"], row["seconds"]["peer"], row["times_faster"]
    lines = [
        f"{name}: 12 recipes {max(ours['together']):.1f} s, llm-compressor {peer['total']:.1f} s:"
        f" {faster['together']:.1f} times faster (limit {LIMITS[name][0]:g})",
        f"{name}: one GPTQ recipe {max(ours['single']):.1f} s, llm-compressor {peer['single']:.1f} s:"
        f" {faster['single']:.1f} times faster (limit {LIMITS[name][1]:g})",
        f"{name}: 12 recipes sequential {ours['sequential']:.1f} s: {faster['sequential']:.1f} times faster",
        f"{'recipe':24} {'peer':>9} {'shared':>9} {'sequential':>11}   perplexity; dense {row['dense']:.3f}",
    ]
    for recipe, values in row["perplexity"].items():
        relative = [f"{100 * (values[kind] / values['peer'] - 1):+.2f} %" for kind in ("shared", "sequential")]
        lines.append(f"{recipe:24} {values['peer']:9.3f} {relative[0]:>9} {relative[1]:>11}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
