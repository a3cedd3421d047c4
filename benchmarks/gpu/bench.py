"""What only a GPU can show: the same numbers as on the CPU, checkpoints, memory, speed, and GPT-2 XL.

Every part runs in fresh processes on one GPU and is written to ``../results/gpu.json`` as soon as it is done; parts
that are not asked for keep what stands there. ``--tiny`` goes through the same code at small sizes, with or without a
GPU, and writes nothing.

    python benchmarks/gpu/bench.py [PART ...] [--tiny] [--output FILE]
"""

import argparse
import json
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

PARTS = ("correctness", "checkpoints", "compression", "stall", "memory", "speed", "xl")
RESULTS = Path(__file__).resolve().parents[1] / "results" / "gpu.json"


def main() -> None:
    """Run the named parts, all by default; ends with an error where a part did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all of them")
    parser.add_argument("--tiny", action="store_true", help="try the code at small sizes; needs no GPU")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    gpu = describe_gpu()
    if gpu is None and not options.tiny:
        print("skipped: this benchmark needs a GPU that torch can use, and there is none here (--tiny goes without)")
        return
    document = json.loads(options.output.read_text()) if options.output.exists() and not options.tiny else {}
    document["machine"] = {"gpu": gpu, **versions()}
    failed = []
    for part in options.parts or PARTS:
        started = time.perf_counter()
        result = import_module(f"benchmarks.gpu.{part}").measure(options.tiny)
        document[part] = {**result, "gpu": gpu, "seconds": round(time.perf_counter() - started, 1)}
        print(json.dumps({part: document[part]}), flush=True)
        failed += [] if result.get("passed", True) else [part]
        if not options.tiny:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(rounded(document), indent=2) + "\n", encoding="utf-8")
    if failed:
        sys.exit(f"did not pass: {', '.join(failed)}")


def describe_gpu() -> str | None:
    """Its name, asked in another process: CUDA, once started in this one, would lie in the GPU's memory."""
    question = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True)
    return answer.stdout.strip() or None


def versions() -> dict[str, str | None]:
    """Of what takes part; None where it is not installed."""
    modules = {
        "torch": "torch",
        "megatron-core": "megatron.core",
        "deepspeed": "deepspeed",
        "transformers": "transformers",
        "transformer-engine": "transformer_engine",
    }
    return {name: version(name) if installed(module) else None for name, module in modules.items()}


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def rounded(value: Any) -> Any:
    """Numbers with six significant digits, which is more than any of them is good for."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
