"""The published order of methods, on models trained here: a 5M Llama-style model, several seeds, through the product.

Every seed is one job (``espalier run``): the model is trained for the given minutes of one device on the sources of
Python's standard library, and compressed by magnitude, Wanda and SparseGPT at 60 % and 70 %, and by round-to-nearest
and GPTQ at 4 and 3 bits with one scale per output channel. Perplexity on held-out text, mean and range over the seeds.
The orders that the papers report (SparseGPT <= Wanda <= magnitude; GPTQ <= round-to-nearest) are checked by seed.
Wanda chooses row by row; a second job prunes by magnitude row by row, too, so that the criteria alone are compared.
Jobs are kept below ``--home`` (others take the models from there) and continued when they are there already.
Writes ``../results/reference.json``.

    python benchmarks/reference/bench.py [--minutes 30] [--seeds 1 2 3] [--home DIR]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).resolve().parents[1] / "results" / "reference.json"
ESPALIER = Path(sys.executable).with_name("espalier")
CANDIDATE = "llama-5m"
MODEL = {"family": "gpt", "style": "llama", "layers": 6, "hidden": 256, "heads": 8, "ffn_hidden": 704}
ORDERS = (
    *(tuple(f"{method}-s{sparsity}" for method in ("sparsegpt", "wanda", "magnitude")) for sparsity in (60, 70)),
    *((f"wanda-s{sparsity}", f"magnitude-s{sparsity}-row") for sparsity in (60, 70)),
    *(tuple(f"{method}-w{bits}" for method in ("gptq", "rtn")) for bits in (4, 3)),
)
"""Recipes, the best first, as published."""


def main() -> None:
    """Run the jobs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "espalier-reference")
    arguments = parser.parse_args()
    jobs = {seed: run(job(seed, arguments.minutes), arguments.home) for seed in arguments.seeds}
    by_row = {seed: run(row_job(seed, jobs[seed]), arguments.home) for seed in arguments.seeds}
    perplexity = {seed: perplexities(jobs[seed]) | perplexities(by_row[seed]) for seed in arguments.seeds}
    document = {
        "minutes": arguments.minutes,
        "models": {seed: training(result) for seed, result in jobs.items()},
        "perplexity": perplexity,
        "kept": [
            {"order": order, "seeds": {seed: follows(row, order) for seed, row in perplexity.items()}}
            for order in ORDERS
        ],
    }
    print(table(perplexity))
    for row in document["kept"]:
        print(" <= ".join(row["order"]), "in", sum(row["seeds"].values()), "of", len(jobs), "seeds")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def job(seed: int, minutes: float) -> dict[str, Any]:
    """The job of one seed."""
    return {
        "name": f"reference-{seed}",
        "seed": seed,
        "data": {
            "train": ["builtin:python-stdlib"],
            "tokenizer": {"kind": "bpe", "vocab_size": 2048},
            "sequence_length": 256,
        },
        "budget": {"device_hours": minutes / 60},
        "candidates": [{"name": CANDIDATE, "model": MODEL}],
        "compression": {
            "prune": {"methods": ["magnitude", "wanda", "sparsegpt"], "sparsity": [0.6, 0.7]},
            "quantize": {"methods": ["rtn", "gptq"], "bits": [4, 3], "embedding_bits": 16},
        },
        "evaluation": {"tokens": 65536},
        "export": {"variants": "none"},
        "execution": {"devices": 1},
    }


def row_job(seed: int, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The job that prunes a trained model by magnitude, row by row."""
    (candidate,) = trained["candidates"]
    spec = job(seed, 1.0) | {"name": f"reference-{seed}-row"}
    del spec["budget"]
    spec["candidates"] = [{"name": CANDIDATE, "source": candidate["checkpoint"]}]
    spec["compression"] = {"prune": {"methods": ["magnitude"], "sparsity": [0.6, 0.7], "scope": "row"}}
    return spec


def run(spec: Mapping[str, Any], home: Path) -> dict[str, Any]:
    """The result of a job: of the one in ``home`` where it is there and done."""
    home.mkdir(parents=True, exist_ok=True)
    file = home / f"{spec['name']}.yaml"
    known = {row["name"]: row for row in espalier("list", "--home", str(home))}
    file.write_text(yaml.safe_dump(dict(spec), sort_keys=False), encoding="utf-8")
    row = known.get(spec["name"])
    if row is not None and row["state"] == "succeeded":
        return espalier("show", row["job"], "--home", str(home))
    earlier = ["--continue", row["job"]] if row is not None else []
    return espalier("run", str(file), *earlier, "--home", str(home), "--mlflow", "none")


def espalier(*arguments: str) -> Any:
    """What a command prints for machines."""
    done = subprocess.run([ESPALIER, *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def training(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the model was trained on."""
    (candidate,) = result["candidates"]
    names = ("parameters", "steps", "tokens", "flops", "device_seconds", "validation_loss")
    return {name: candidate[name] for name in names}


def perplexities(result: Mapping[str, Any]) -> dict[str, float]:
    """Recipe → perplexity on held-out text."""
    return {row["name"].partition("/")[2]: row["metrics"]["perplexity"] for row in result["variants"]}


def follows(row: Mapping[str, float], order: Sequence[str]) -> bool:
    """Whether perplexities grow in this order."""
    values = [row[name] for name in order]
    return values == sorted(values)


def table(perplexity: Mapping[int, Mapping[str, float]]) -> str:
    """Mean, least and largest over the seeds."""
    names = ("dense", *dict.fromkeys(name for order in ORDERS for name in order))
    lines = [f"{'recipe':18} {'mean':>9} {'least':>9} {'largest':>9}   perplexity over {len(perplexity)} seeds"]
    for name in names:
        values = [row[name] for row in perplexity.values()]
        lines.append(f"{name:18} {statistics.mean(values):9.3f} {min(values):9.3f} {max(values):9.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
