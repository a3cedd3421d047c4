"""Loads exports with Transformers and measures them: run as a fresh process by :mod:`compression.verification`.

It shares no code with the evaluation whose figures it checks. The argument is a JSON document, the last line of the
output another one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

AT_ONCE = 1 << 25  # logits


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure ``directories`` on the token ids in the file ``rows`` [n, sequence + 1]."""
    torch.set_num_threads(request["threads"])
    logging.disable_progress_bar()
    rows = torch.from_numpy(np.load(request["rows"])).to(request["device"])
    tokenizer = Tokenizer.from_file(request["tokenizer"])
    return [_measure(Path(directory), rows, tokenizer) for directory in request["directories"]]


@torch.inference_mode()
def _measure(directory: Path, rows: torch.Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    started = time.monotonic()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    model.to(rows.device)
    model.eval()
    length = rows.shape[1] - 1
    total = 0.0
    for part in rows.split(max(1, AT_ONCE // (length * model.config.vocab_size))):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.flatten(0, 1)
        total += float(cross_entropy(logits, part[:, 1:].flatten(), reduction="none").double().sum())
    tokens = rows.shape[0] * length
    return {
        "loss": total / tokens,
        "tokens": tokens,
        "parameters": model.num_parameters(),
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "tokenizer_agrees": _same_tokens(directory, tokenizer, rows[0].tolist()),
        "seconds": time.monotonic() - started,
    }


def _same_tokens(directory: Path, tokenizer: Tokenizer, sample: list[int]) -> bool:
    """Whether the exported tokenizer cuts a piece of held-out text into the same tokens as the original."""
    text = tokenizer.decode(sample, skip_special_tokens=True)
    exported = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    found: list[int] = exported(text, add_special_tokens=False)["input_ids"]
    return found == tokenizer.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
