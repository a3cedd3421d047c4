"""Building every rank's part of a planned model without memory for its weights, in a process that may import torch."""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

TIMEOUT_SECONDS = 1800


class DryRunError(RuntimeError):
    """The parts could not be built."""


def dry_run(candidate: Mapping[str, Any], sequence_length: int, device_kind: str) -> dict[str, Any]:
    """Parameters and memory per rank of one candidate of a plan, and whether the parts add up to the model.

    Raises :class:`DryRunError` with the process's last words.
    """
    question = {name: candidate[name] for name in ("model", "layout", "training")}
    question |= {"sequence_length": sequence_length, "device_kind": device_kind}
    ended = subprocess.run(
        [sys.executable, "-m", "parallelism.dryrun"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if not ended.stdout.strip():
        last = ended.stderr.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"
        raise DryRunError(f"candidate {candidate['name']}: {last}")
    answer: dict[str, Any] = json.loads(ended.stdout.strip().rpartition("\n")[2])
    return {"candidate": candidate["name"], **answer}
