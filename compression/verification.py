"""Exports are loaded again, by Transformers in a fresh process, and measured, before they are called done."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compression.container import sha256
from compression.evaluation import held_out_sequences
from compression.results import ExportResult, Quality, Verification
from parallelism.data.batches import TokenBatches

READER = "transformers"
TOLERANCE = 1e-4
"""Largest difference of the losses, relative to the loss where that is above 1: float32 in another order of sums."""


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
    timeout_seconds: float = 3600.0,
) -> list[Verification]:
    """Load every export in one fresh process in float32 and measure it on the text its quality was measured on.

    Compared are the loss, number and size of the parameters, bytes and checksums of the files, and the tokenizer's
    tokens for a piece of that text. Raises :class:`VerificationError` for the first that differs from what is claimed.
    """
    text = TokenBatches(data_dir, "validation", sequence_length, seed)
    rows = text.rows(range(held_out_sequences(text, tokens)))
    for export in exports:
        _check_files(export)
    with tempfile.TemporaryDirectory(prefix="espalier-") as folder:
        np.save(Path(folder) / "rows.npy", rows)
        request = {
            "directories": [export.directory for export in exports],
            "rows": str(Path(folder) / "rows.npy"),
            "tokenizer": str(text.prepared.tokenizer_path),
            "device": device,
            "threads": torch.get_num_threads(),
        }
        answers = _measure(request, timeout_seconds)
    return [_compare(*claim) for claim in zip(exports, qualities, answers, strict=True)]


def _measure(request: dict[str, Any], timeout_seconds: float) -> list[dict[str, Any]]:
    """The answers of :mod:`compression.load_export` in a process of its own."""
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "compression.load_export", json.dumps(request)]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise VerificationError(
            f"{READER} did not load and measure {', '.join(request['directories'])} within"
            f" {time.monotonic() - started:.0f} s"
        ) from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise VerificationError(f"{READER} cannot load {' or '.join(request['directories'])}: {reason[0]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _check_files(export: ExportResult) -> None:
    """The weight files are still those that were written."""
    for name, digest in export.checksums.items():
        path = Path(export.directory) / name
        if not path.is_file() or sha256(path) != digest:
            raise VerificationError(f"{export.name}: {path} is missing or not the file that was exported")


def _compare(export: ExportResult, quality: Quality, answer: dict[str, Any]) -> Verification:
    claimed, measured = quality.validation_loss, answer["loss"]
    if not abs(measured - claimed) <= TOLERANCE * max(1.0, abs(claimed)):
        raise VerificationError(
            f"{export.name}: loss {measured:.6f} in {READER}, {claimed:.6f} claimed, over {answer['tokens']} tokens"
        )
    for what, found, stated in (
        ("tokens", answer["tokens"], quality.tokens),
        ("parameters", answer["parameters"], export.parameters),
        ("bytes", answer["bytes"], export.export_bytes),
    ):
        if found != stated:
            raise VerificationError(f"{export.name}: {found} {what} in {READER}, {stated} claimed")
    if not answer["tokenizer_agrees"]:
        raise VerificationError(f"{export.name}: its tokenizer gives other tokens than the one it was trained with")
    return Verification(
        name=export.name,
        reader=READER,
        claimed_loss=claimed,
        measured_loss=measured,
        tokens=answer["tokens"],
        export_bytes=answer["bytes"],
        parameters=answer["parameters"],
        seconds=answer["seconds"],
    )
