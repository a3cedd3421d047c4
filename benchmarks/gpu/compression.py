"""Compression on a GPU: the same results as on the CPU of the same machine, and what solving costs there.

*Agreement*: a trained model is calibrated, compressed and evaluated by the product's own tasks on both devices.
*Solving*: one Llama-style layer of several sizes, random weights and statistics, by one recipe and by twelve.
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import checkpoints
from benchmarks.gpu.common import GIB, SEED, apart, threads, timed

MODEL = "llama"
SEQUENCES, HELD_OUT = 64, 8192
LIMIT = 2e-3
"""How far a variant's perplexity on the GPU may be from the CPU's, relative: rounding differs, so some codes do."""
SHAPES = {
    "5M": {"hidden": 256, "ffn_hidden": 704},
    "50M": {"hidden": 576, "ffn_hidden": 1536},
    "7B": {"hidden": 4096, "ffn_hidden": 11008},
}
TOO_LONG_ON_CPU = ("7B",)
REPEAT = 3
DEVICES = ("gpu", "cpu")


def measure(tiny: bool) -> dict[str, Any]:
    """Both parts."""
    work = Path(tempfile.mkdtemp(prefix="gpu-compression-"))
    try:
        agreement = agree(work, tiny)
    finally:
        shutil.rmtree(work)
    shapes = ["5M"] if tiny else list(SHAPES)
    rows = []
    for shape in shapes:
        for gpu in (True, False):
            if gpu or shape not in TOO_LONG_ON_CPU:
                rows.append(apart(solving, shape, gpu=gpu, threads=16).result())
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {"agreement": agreement, "solving": rows, "passed": all(row["passed"] for row in agreement["variants"])}


def agree(work: Path, tiny: bool) -> dict[str, Any]:
    """Perplexities of a trained model's variants on both devices, and the share of codes that differ."""
    length = 64 if tiny else 256
    checkpoints.prepare_data(work, length)
    apart(checkpoints.run, str(work), MODEL, tiny, None, 0).result()
    source = str(checkpoints.newest(work, checkpoints.STEPS))
    futures = [
        apart(compress, str(work), source, length, device, tiny, gpu=device == "gpu", threads=8) for device in DEVICES
    ]
    results = {device: future.result() for device, future in zip(DEVICES, futures, strict=True)}
    differing = apart(differing_codes, *(results[device]["paths"] for device in DEVICES), gpu=False).result()
    variants = []
    for name, on_gpu in results["gpu"]["perplexity"].items():
        on_cpu = results["cpu"]["perplexity"][name]
        variants.append(
            {
                "variant": name,
                "perplexity_on_gpu": on_gpu,
                "perplexity_on_cpu": on_cpu,
                "relative_difference": abs(on_gpu / on_cpu - 1),
                "codes_or_zeros_differing": differing[name],
                "passed": abs(on_gpu / on_cpu - 1) <= LIMIT,
            }
        )
    return {"variants": variants, "seconds": {device: results[device]["seconds"] for device in DEVICES}}


def grid() -> list[Any]:
    """One recipe of every method that uses statistics, and what rounds to nearest."""
    from compression.recipe import Pruning, Quantization, Recipe

    quantized = [
        Quantization(method=method, bits=bits, group_size=64)
        for method, bits in (("rtn", 4), ("gptq", 4), ("gptq", 3), ("awq", 4))
    ]
    pruned = [Pruning(method=method, sparsity=0.6) for method in ("magnitude", "wanda", "sparsegpt")]
    return [*(Recipe(quantize=one) for one in quantized), *(Recipe(prune=one) for one in pruned)]


def compress(work: str, source: str, length: int, place: str, tiny: bool) -> dict[str, Any]:
    """Calibrate, solve, assemble and evaluate on what this process sees of devices."""
    from compression import tasks
    from compression.text import CalibrationText, shards
    from parallelism.layer_reader import LayerReader

    recipes, out = grid(), f"{work}/{place}"
    sequences = 32 if tiny else SEQUENCES
    text = CalibrationText(
        data_dir=f"{work}/data", sequence_length=length, sequences=sequences, seed=SEED, damping=0.01
    )
    layers = range(LayerReader(source).config.layers)

    def calibrate() -> None:
        for layer in layers:
            for shard in range(len(shards(sequences))):
                tasks.calibrate(source, layer, shard, text, out)

    def solve() -> None:
        for layer in layers:
            tasks.compress_layer(source, layer, recipes, out, text=text)
        tasks.compress_outer(source, recipes, out)

    seconds = {"calibrate": timed(calibrate)[0], "solve": timed(solve)[0]}
    paths = {recipe.name: tasks.assemble(source, recipe, out).path for recipe in recipes}
    held_out = HELD_OUT // 8 if tiny else HELD_OUT
    seconds["evaluate"], found = timed(
        lambda: tasks.evaluate(list(paths.values()), f"{work}/data", length, held_out, SEED)
    )
    return {
        "paths": paths,
        "perplexity": {quality.name: quality.metrics()["perplexity"] for quality in found},
        "seconds": seconds,
    }


def differing_codes(these: dict[str, str], those: dict[str, str]) -> dict[str, float]:
    """By variant, the share of the layers' weights whose code (or, pruned, whose being zero) is not the same."""
    from compression.compact import CompactFile

    shares = {}
    for name, path in these.items():
        files = [CompactFile(path), CompactFile(those[name])]
        different = total = 0
        for layer in range(files[0].config.layers):
            pair = [file.layer(layer) for file in files]
            for key, one in pair[0].items():
                if one.ndim == 2:
                    other = pair[1][key]
                    same = (one == 0) == (other == 0) if files[0].recipe.prune else (one - other).abs() < _step(one)
                    different, total = different + int((~same).sum()), total + one.numel()
        shares[name] = different / total
    return shares


def _step(weights: Any) -> Any:
    """Less than half of what neighbouring codes of any of the recipes are apart, and more than rounding."""
    return weights.abs().amax(1, keepdim=True) * 1e-2


def solving(shape: str) -> dict[str, Any]:
    """Seconds for one layer by one recipe, by twelve of GPTQ, and by twelve with SparseGPT; memory on a GPU."""
    import torch

    from benchmarks.compression_cost import bench
    from parallelism.device import device

    torch.set_num_threads(threads())
    groups = [
        bench.Group({name: matrix.to(device()) for name, matrix in group.matrices.items()}, group.hessian.to(device()))
        for group in bench.layer(**SHAPES[shape])
    ]
    with torch.inference_mode():
        seconds = {"one": median(lambda: bench.solve(groups, bench.GRIDS["GPTQ"][:1]))}
        for name, recipes in bench.GRIDS.items():
            seconds[name] = median(lambda recipes=recipes: bench.solve(groups, recipes))
    gpu = torch.cuda.is_available()
    return {
        "shape": shape,
        "device": "gpu" if gpu else f"cpu, {threads()} threads",
        "seconds_per_layer": seconds,
        "twelve_to_one": seconds["GPTQ"] / seconds["one"],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if gpu else None,
    }


def median(action: Callable[[], None]) -> float:
    """Of some runs after one that is not counted."""
    action()
    values: Sequence[float] = [timed(action)[0] for _ in range(REPEAT)]
    return statistics.median(values)
