"""Existing models that a job compresses: what lies at a path, asked of a process that may import torch. Torch-free."""

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from launcher.environment import python_environment
from launcher.problems import Problem
from launcher.spec import CandidateSpec, JobSpec
from parallelism.checkpoint_store import read_model
from parallelism.data.config import TokenizerConfig
from parallelism.models.base import ModelConfig

TIMEOUT_SECONDS = 300


class SourceError(ValueError):
    """There is no model at the path that can be compressed."""


@dataclass(frozen=True)
class SourceFacts:
    """A model that exists: its shape, what identifies its weights, and its tokenizer's file, if one lies beside it."""

    path: str
    model: ModelConfig
    fingerprint: str
    tokenizer: str | None


@lru_cache
def inspect_source(path: str) -> SourceFacts:
    """What lies at ``path``. Raises :class:`SourceError` with what is wrong and what would work."""
    absolute = str(Path(path).expanduser().absolute())
    ended = subprocess.run(
        [sys.executable, "-m", "compression.inspect_source", absolute],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=python_environment(),
        check=False,
    )
    if not ended.stdout.strip():
        raise SourceError(f"it cannot be read: {ended.stderr.strip().rpartition(chr(10))[2]}")
    answer = json.loads(ended.stdout.strip().rpartition("\n")[2])
    if "error" in answer:
        raise SourceError(answer["error"])
    return SourceFacts(absolute, read_model(answer["model"]), answer["fingerprint"], answer["tokenizer"])


def source_problem(candidate: CandidateSpec, error: SourceError) -> Problem:
    """The refusal of a candidate's source; the field is relative to the candidate."""
    return Problem("source", candidate.source, str(error), "")


def with_source_tokenizer(spec: JobSpec) -> JobSpec:
    """The spec with the tokenizer of its first source, where the job file leaves the tokenizer out."""
    sources = [candidate.source for candidate in spec.candidates if candidate.source]
    if not sources or "tokenizer" in spec.data.model_fields_set:
        return spec
    try:
        tokenizer = inspect_source(sources[0]).tokenizer
    except SourceError:
        return spec  # the check tells
    if tokenizer is None:
        return spec
    found = TokenizerConfig(kind="file", path=tokenizer)
    return spec.model_copy(update={"data": spec.data.model_copy(update={"tokenizer": found})})
