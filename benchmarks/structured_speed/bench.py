"""Prefill and decode speed of a Llama before and after structured pruning, loaded and run by Transformers on this CPU.

What is left after half the feed-forward width, half the heads or half the layers is a plain smaller model, so that any
engine gains. Weights are random: speed does not depend on them. All models stand in one process and take turns, so
that whatever else the machine does strikes all of them; processor seconds are measured beside those of the clock,
because they do not count what other processes take. Writes ``../results/structured_speed.json``.

    python benchmarks/structured_speed/bench.py [--rounds 8] [--threads 1]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from compression.recipe import Structure
from compression.reduced import reduced_config
from parallelism.models.gpt.config import GPTConfig

RESULTS = Path(__file__).resolve().parents[1] / "results" / "structured_speed.json"
DENSE = GPTConfig(style="llama", layers=8, hidden=512, heads=8, kv_heads=4, ffn_hidden=2048, vocab_size=4096)
STRUCTURES = {
    "dense": None,
    "neurons-s50": Structure(neurons=0.5),
    "heads-s50": Structure(heads=0.5),
    "layers-s50": Structure(layers=0.5),
}
PREFILL_TOKENS, DECODE_TOKENS = 256, 24
CLOCKS = ("", "_processor")
Times = dict[str, float]
"""``prefill``, ``decode`` by the clock, ``prefill_processor``, ``decode_processor``: seconds."""


def load(config: GPTConfig) -> Any:
    """The model as Transformers reads it from a directory, float32."""
    torch.manual_seed(1)
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden,
        intermediate_size=config.feed_forward,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.query_groups,
        head_dim=config.channels,
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied_embeddings,
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(theirs).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def now() -> tuple[float, float]:
    """The clock and the process's own processor time, in seconds."""
    return time.perf_counter(), time.process_time()


def run(model: Any, prompt: torch.Tensor) -> Times:
    """Of one prompt [1, tokens], and of decoding :data:`DECODE_TOKENS` tokens after it, greedily."""
    started = now()
    result = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    first = now()
    for _ in range(DECODE_TOKENS):
        token = result.logits[:, -1:].argmax(-1)
        result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1)
    last = now()
    return {
        f"{phase}{clock}": end[place] - begin[place]
        for phase, begin, end in (("prefill", started, first), ("decode", first, last))
        for place, clock in enumerate(CLOCKS)
    }


def measure(rounds: int) -> dict[str, list[Times]]:
    """Every model's times in every round."""
    models = {name: load(_config(structure)) for name, structure in STRUCTURES.items()}
    prompt = torch.randint(0, DENSE.vocab_size, (1, PREFILL_TOKENS), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[Times]] = {name: [] for name in models}
    with torch.inference_mode():
        for index in range(rounds + 1):
            for name, model in models.items():
                elapsed = run(model, prompt)
                if index > 0:  # the first round allocates
                    seconds[name].append(elapsed)
    return seconds


def summary(seconds: dict[str, list[Times]]) -> list[dict[str, Any]]:
    """One row per model: its shape, tokens per second, and the dense model's time over its own in the same rounds."""
    rows = []
    for name, structure in STRUCTURES.items():
        config = _config(structure)
        row: dict[str, Any] = {
            "model": name,
            "layers": config.layers,
            "heads": config.heads,
            "kv_heads": config.query_groups,
            "ffn_hidden": config.feed_forward,
            "parameters": config.parameter_count(),
            "flops_ratio": round(DENSE.forward_flops(PREFILL_TOKENS) / config.forward_flops(PREFILL_TOKENS), 3),
        }
        for phase, tokens in (("prefill", PREFILL_TOKENS), ("decode", DECODE_TOKENS)):
            for clock in CLOCKS:
                key = f"{phase}{clock}"
                mine = [each[key] for each in seconds[name]]
                ratios = [dense[key] / each for dense, each in zip(seconds["dense"], mine, strict=True)]
                row[f"{key}_tokens_per_second"] = round(tokens / statistics.median(mine), 1)
                row[f"{key}_speed_up"] = round(statistics.median(ratios), 3)
                row[f"{key}_speed_up_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        rows.append(row)
    return rows


def _config(structure: Structure | None) -> GPTConfig:
    config = reduced_config(DENSE, structure)
    assert isinstance(config, GPTConfig)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = summary(measure(options.rounds))
    for row in rows:
        print(json.dumps(row))
    facts = {
        "threads": options.threads,
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "batch": 1,
        "load": os.getloadavg(),
    }
    tokens = {"prefill_tokens": PREFILL_TOKENS, "decode_tokens": DECODE_TOKENS, "dtype": "float32"}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"measured": rows, **facts, **tokens}, indent=2) + "\n")


if __name__ == "__main__":
    main()
