"""llm-compressor on a list of recipes: runs in its own virtual environment and imports nothing of Espalier.

Every recipe is a call of ``oneshot`` on the model loaded anew, as its users do it; its seconds are those from before
the model is loaded until it is compressed (importing, saving and evaluating are left out). A line of JSON per recipe.

    python peer.py WORK RECIPES.json BATCH
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

EVALUATED = 8
"""Sequences at once, in evaluation."""
IGNORE = ["re:.*lm_head"]
"""By a pattern: pruning does not leave the output layer alone where it is given by its name."""
DAMPING = 0.01


def main() -> None:
    """Compress by every recipe."""
    work, recipes = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    if not torch.accelerator.is_available():
        # llm-compressor 0.14.0 pins the inputs that AWQ keeps in any case, which fails where there is no accelerator.
        IntermediatesCache.pin_memory = lambda *_arguments, **_named: None
    calibration = torch.from_numpy(np.load(work / "calibration.npy"))
    held_out = torch.from_numpy(np.load(work / "held_out.npy"))
    for name, recipe in recipes.items():
        started = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
        oneshot(model=model, dataset=batches(calibration, int(sys.argv[3])), recipe=modifiers(recipe))
        seconds = time.monotonic() - started
        print(json.dumps({"name": name, "seconds": seconds, "perplexity": perplexity(model, held_out)}), flush=True)


def batches(tokens: torch.Tensor, size: int) -> DataLoader:
    """Calibration tokens [n, S] in batches."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    return DataLoader(rows, batch_size=size)


def modifiers(recipe: dict[str, Any]) -> list[Any]:
    """What a recipe of ours is called here."""
    prune, quantize = recipe["prune"], recipe["quantize"]
    if prune is not None:
        kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[prune["method"]]
        damping = {"dampening_frac": DAMPING} if kind is SparseGPTModifier else {}
        structure = prune["pattern"] or "0:0"
        return [
            kind(sparsity=prune["sparsity"], mask_structure=structure, ignore=IGNORE, targets=["Linear"], **damping)
        ]
    scheme = {"targets": ["Linear"], "weights": weights(quantize)}
    if quantize["activation_bits"] == 8:
        scheme["input_activations"] = {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True
        }  # fmt: skip
    groups = {"config_groups": {"all": scheme}, "ignore": IGNORE}
    if quantize["method"] == "gptq":
        return [GPTQModifier(**groups, actorder=None, dampening_frac=DAMPING)]
    before = {"rtn": [], "awq": [AWQModifier()], "smoothquant": [SmoothQuantModifier(smoothing_strength=0.5)]}
    return [*before[quantize["method"]], QuantizationModifier(**groups)]


def weights(quantize: dict[str, Any]) -> dict[str, Any]:
    """The arguments of quantised weights."""
    group = quantize["group_size"]
    return {
        "num_bits": quantize["bits"],
        "type": "int",
        "symmetric": quantize["symmetric"],
        "strategy": "group" if group else "channel",
        "group_size": group,
    }


@torch.inference_mode()
def perplexity(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Of held-out token ids [n, S + 1]."""
    loss = torch.zeros((), dtype=torch.float64)
    for part in rows.split(EVALUATED):
        logits = model(part[:, :-1]).logits.float()
        loss += cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").double().sum()
    return math.exp(loss / rows[:, 1:].numel())


if __name__ == "__main__":
    main()
