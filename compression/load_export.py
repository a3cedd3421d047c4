"""Loads exports and measures them: run as a fresh process by :mod:`compression.verification`.

It shares no code with the evaluation whose figures it checks. The argument is a JSON document, the last line of the
output another one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from compression.stream_export import StreamedModel, rounded

AT_ONCE = 1 << 25  # logits


class Reader(Protocol):
    """A model in an exported directory."""

    def loss(self, rows: Tensor) -> float:
        """Sum of the negative log likelihoods, in nats, of token ids [n, S + 1] but for the first of each row."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [n, S, vocab_size] of token ids [n, S]; no activations are rounded."""

    def parameters(self) -> int:
        """Parameters, tied ones once; asked for after the model has been used."""


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure ``exports`` on the token ids in the file ``rows`` [n, S + 1]."""
    torch.set_num_threads(request["threads"])
    logging.disable_progress_bar()
    rows = torch.from_numpy(np.load(request["rows"])).to(request["device"])
    tokenizer = Tokenizer.from_file(request["tokenizer"])
    return [_measure(export, rows, tokenizer) for export in request["exports"]]


@torch.inference_mode()
def _measure(export: dict[str, Any], rows: Tensor, tokenizer: Tokenizer) -> dict[str, Any]:
    started, directory = time.monotonic(), Path(export["directory"])
    readers: dict[str, type[TransformersModel | StreamedModel]] = {
        "transformers": TransformersModel,
        "streaming": StreamedModel,
    }
    model: Reader = readers[export["reader"]](directory, rows.device, export["activations"])
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    return {
        "reader": export["reader"],
        "loss": model.loss(rows) / tokens,
        "tokens": tokens,
        "logit_difference": _difference(model, rows, np.load(export["logits"])),
        "parameters": model.parameters(),
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "tokenizer_agrees": _same_tokens(directory, tokenizer, rows[0].tolist()),
        "seconds": time.monotonic() - started,
    }


class TransformersModel:
    """The export as Transformers loads it, in float32.

    ``activations``: the number format (``int``, ``fp8``) that inputs of linear layers are to be rounded to, where the
    files do not say so.
    """

    def __init__(self, directory: Path, device: torch.device, activations: str | None) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        model.to(device)
        model.eval()
        self._model, self._activations = model, activations

    def loss(self, rows: Tensor) -> float:
        """See :class:`Reader`."""
        total, hooks = 0.0, self._round_inputs()
        for part in rows.split(max(1, AT_ONCE // ((rows.shape[1] - 1) * self._model.config.vocab_size))):
            logits = self._logits(part[:, :-1]).flatten(0, 1)
            total += float(cross_entropy(logits, part[:, 1:].flatten(), reduction="none").double().sum())
        for hook in hooks:
            hook.remove()
        return total

    def logits(self, tokens: Tensor) -> Tensor:
        """See :class:`Reader`."""
        for module in self._model.modules():
            module.quantization_enabled = False  # what compressed-tensors asks before it rounds inputs
        return self._logits(tokens)

    def parameters(self) -> int:
        """See :class:`Reader`; scales and the like are left out."""
        named = self._model.named_parameters()
        return sum(tensor.numel() for name, tensor in named if name.endswith((".weight", ".bias")))

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits

    def _round_inputs(self) -> list[RemovableHandle]:
        """Round what goes into every linear layer but the output layer, each token by itself."""
        number = self._activations
        if number is None:
            return []

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (rounded(inputs[0], number), *inputs[1:])

        modules = ((name, one) for name, one in self._model.named_modules() if isinstance(one, nn.Linear | Conv1D))
        return [module.register_forward_pre_hook(before) for name, module in modules if name != "lm_head"]


def _difference(model: Reader, rows: Tensor, expected: np.ndarray) -> float:
    """The largest difference from the ``expected`` logits [n, S, vocab_size], relative to the largest of them."""
    wanted = torch.from_numpy(expected).to(rows.device)
    found = model.logits(rows[: len(wanted), :-1])
    return float((found - wanted).abs().max() / wanted.abs().max())


def _same_tokens(directory: Path, tokenizer: Tokenizer, sample: list[int]) -> bool:
    """Whether the exported tokenizer cuts a piece of held-out text into the same tokens as the original."""
    text = tokenizer.decode(sample, skip_special_tokens=True)
    exported = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    found: list[int] = exported(text, add_special_tokens=False)["input_ids"]
    return found == tokenizer.encode(text, add_special_tokens=False).ids


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
