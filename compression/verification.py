"""Exports are loaded again, by other software in a fresh process, and measured, before they are called done."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.compact import CompactFile
from compression.container import sha256
from compression.evaluation import held_out_sequences, logits
from compression.export import DENSE
from compression.results import ExportResult, Quality, Verification
from parallelism import places
from parallelism.data.batches import TokenBatches
from parallelism.host_memory import available_memory

TRANSFORMERS, STREAMING = "transformers", "streaming"
TOLERANCE = 1e-4
"""Largest difference of the losses, relative to the loss where that is above 1: float32 in another order of sums."""
ROUNDED_TOLERANCE = 1e-3
"""The same where activations are rounded: there the order of sums decides which of two levels a few of them take."""
LOGIT_TOLERANCE = 1e-3
"""Largest difference of the logits, relative to the largest of them."""
COMPARED_SEQUENCES, COMPARED_LOGITS = 4, 1 << 24
RUNNING_BYTES = 1 << 30
"""What Transformers needs beside the weights: its own code, activations, logits."""


class VerificationError(RuntimeError):
    """An export does not hold what was claimed; the message names the variant and both figures."""


def verify(
    exports: Sequence[ExportResult],
    qualities: Sequence[Quality],
    data_dir: str,
    sequence_length: int,
    tokens: int,
    seed: int,
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    timeout_seconds: float = 3600.0,
) -> list[Verification]:
    """Load every export in a fresh process in float32 and measure it on the text its quality was measured on.

    Compared are the loss, the logits of a few sequences (without rounding activations), number of the parameters, bytes
    and checksums of the files, and the tokenizer's tokens for a piece of that text. Transformers reads what fits
    ``memory_bytes`` (default: what is free, within the limits of control groups), and
    :mod:`compression.stream_export` the rest. Raises :class:`VerificationError` for the first export that differs from
    what is claimed.
    """
    text = TokenBatches(data_dir, "validation", sequence_length, seed)
    rows = text.rows(range(held_out_sequences(text, tokens)))
    for export in exports:
        places.need(export.directory)
        _check_files(export)
    if memory_bytes is None:
        memory_bytes = available_memory()
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        np.save(Path(folder) / "rows.npy", rows)
        request = {
            "exports": [_request(export, rows, Path(folder), memory_bytes, device) for export in exports],
            "rows": str(Path(folder) / "rows.npy"),
            "tokenizer": str(text.prepared.tokenizer_path),
            "device": device,
            "threads": torch.get_num_threads(),
        }
        answers = _measure(request, timeout_seconds)
    return [_compare(*claim) for claim in zip(exports, qualities, answers, strict=True)]


def _request(export: ExportResult, rows: np.ndarray, folder: Path, memory_bytes: int, device: str) -> dict[str, Any]:
    """What the fresh process is asked about one export; our own logits [n, S, vocab_size] lie in a file."""
    file = CompactFile(export.variant, device)
    inputs = torch.from_numpy(rows[:COMPARED_SEQUENCES, :-1]).to(device)
    count = max(1, COMPARED_LOGITS // (inputs.shape[1] * file.config.vocab_size))
    reference = folder / f"{export.name}.{len(os.listdir(folder))}.npy"
    np.save(reference, logits(file, inputs[:count], round_activations=False).cpu().numpy())
    return {
        "directory": export.directory,
        "reader": TRANSFORMERS if _needed_bytes(export) <= memory_bytes else STREAMING,
        "logits": str(reference),
        # What a dense file cannot say: its claims were measured with the inputs of linear layers rounded.
        "activations": _rounding(file) if export.format == DENSE else None,
    }


def _rounding(file: CompactFile) -> str | None:
    """What the recipe rounds the inputs of linear layers to."""
    quantize = file.recipe.quantize
    return quantize.number if quantize is not None and quantize.activation_bits == 8 else None


def _needed_bytes(export: ExportResult) -> int:
    """What Transformers holds at most: the parameters in float32 while the file's own are still there."""
    return 4 * export.parameters + export.export_bytes + RUNNING_BYTES


def _measure(request: dict[str, Any], timeout_seconds: float) -> list[dict[str, Any]]:
    """The answers of :mod:`compression.load_export` in a process of its own.

    Where that is killed, as it is for want of memory in a container, everything is streamed instead.
    """
    done = _run(request, timeout_seconds)
    if done.returncode == -signal.SIGKILL and any(one["reader"] == TRANSFORMERS for one in request["exports"]):
        streamed = [one | {"reader": STREAMING} for one in request["exports"]]
        done = _run(request | {"exports": streamed}, timeout_seconds)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise VerificationError(f"{_directories(request)} cannot be loaded: {reason[0]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _run(request: dict[str, Any], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "compression.load_export", json.dumps(request)]
    started = time.monotonic()
    try:
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise VerificationError(
            f"{_directories(request)} were not loaded and measured within {time.monotonic() - started:.0f} s"
        ) from None


def _directories(request: dict[str, Any]) -> str:
    return " or ".join(one["directory"] for one in request["exports"])


def _check_files(export: ExportResult) -> None:
    """The weight files are still those that were written."""
    for name, digest in export.checksums.items():
        path = Path(export.directory) / name
        if not path.is_file() or sha256(path) != digest:
            raise VerificationError(f"{export.name}: {path} is missing or not the file that was exported")


def _compare(export: ExportResult, quality: Quality, answer: dict[str, Any]) -> Verification:
    claimed, measured, reader = quality.validation_loss, answer["loss"], answer["reader"]
    tolerance = ROUNDED_TOLERANCE if _rounding(CompactFile(export.variant)) else TOLERANCE
    if not abs(measured - claimed) <= tolerance * max(1.0, abs(claimed)):
        raise VerificationError(
            f"{export.name}: loss {measured:.6f} in {reader}, {claimed:.6f} claimed, over {answer['tokens']} tokens"
        )
    if not answer["logit_difference"] <= LOGIT_TOLERANCE:
        raise VerificationError(
            f"{export.name}: logits differ by {answer['logit_difference']:.2e} of the largest between {reader} and our"
            f" own evaluation, {LOGIT_TOLERANCE:.0e} is allowed"
        )
    for what, found, stated in (
        ("tokens", answer["tokens"], quality.tokens),
        ("parameters", answer["parameters"], export.parameters),
        ("bytes", answer["bytes"], export.export_bytes),
    ):
        if found != stated:
            raise VerificationError(f"{export.name}: {found} {what} in {reader}, {stated} claimed")
    if not answer["tokenizer_agrees"]:
        raise VerificationError(f"{export.name}: its tokenizer gives other tokens than the one it was trained with")
    return Verification(
        name=export.name,
        reader=reader,
        logit_difference=answer["logit_difference"],
        claimed_loss=claimed,
        measured_loss=measured,
        tokens=answer["tokens"],
        export_bytes=answer["bytes"],
        parameters=answer["parameters"],
        seconds=answer["seconds"],
    )
