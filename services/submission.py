"""From a job file to a job: read, check, write down. Nothing is written before everything has been checked."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.jobs import Home, create_job
from launcher.journal import Journal
from launcher.planning.cluster import Cluster, h100_cluster
from launcher.planning.clusters import cluster_of
from launcher.planning.plan import Plan, make_plan
from launcher.planning.sources import with_source_tokenizer
from launcher.planning.validate import check, vocabulary_size
from launcher.problems import Problem, SpecError
from launcher.spec import JobSpec, parse_spec
from launcher.tracking.records import flatten
from parallelism.data.errors import DataError
from parallelism.data.sources import inspect

KNOWN_CLUSTERS = {"h100": h100_cluster}
STANDARD_TEXT = "builtin:python-stdlib"


@dataclass(frozen=True)
class Grid:
    """What is asked of a model that exists, as the command line has it; nothing asked: GPTQ to four bits."""

    prune: list[str]
    sparsity: list[float]
    quantize: list[str]
    bits: list[int]
    group_size: int | None

    def compression(self) -> dict[str, Any]:
        """The part ``compression`` of a job's document."""
        document: dict[str, Any] = {"combine": True}
        if self.prune or self.sparsity:
            document["prune"] = {"methods": self.prune or ["sparsegpt"], "sparsity": self.sparsity or [0.5]}
        if self.quantize or self.bits or not document.keys() - {"combine"}:
            quantize = {"methods": self.quantize or ["gptq"], "bits": self.bits or [4], "group_size": self.group_size}
            document["quantize"] = quantize
        return document


def compression_job(source: Path, text: list[str], sequence_length: int, grid: Grid) -> JobSpec:
    """The job behind ``espalier compress``. Raises ``SpecError``."""
    name = re.sub(r"[^a-z0-9._-]+", "-", source.expanduser().absolute().name.lower()).strip("-._") or "model"
    return parse_spec(
        {
            "name": name,
            "data": {"train": text, "sequence_length": sequence_length},
            "candidates": [{"name": name, "source": str(source)}],
            "compression": grid.compression(),
        },
        "espalier compress",
    )


@dataclass(frozen=True)
class Request:
    """A job that may run: its spec, and what the planner made of it."""

    spec: JobSpec
    plan: Plan


def make_request(spec: JobSpec, home: Home) -> Request:
    """Check a spec against where it is to run and the files it names. Raises ``SpecError`` with all problems."""
    try:
        home.check()
    except ValueError as error:
        raise SpecError([Problem("", home.journals, str(error), "see journals in service.yaml")]) from error
    spec = with_source_tokenizer(spec)
    return Request(spec, check(spec, cluster_of(spec, home.root), home.path))


def plan_elsewhere(spec: JobSpec, cluster: Cluster) -> Plan:
    """The plan for a cluster that is not this machine, whose disks are not known. Raises ``SpecError``."""
    try:
        facts = inspect(spec.data, spec.seed)
        vocab_size = vocabulary_size(spec.data.tokenizer)
    except DataError as error:
        raise SpecError([Problem(error.field, error.value, error.problem, "")]) from error
    return make_plan(spec, cluster, vocab_size, facts.text_bytes)


def named_cluster(text: str) -> Cluster:
    """The cluster behind ``h100:32``. Raises ``ValueError``."""
    name, _, count = text.partition(":")
    if name not in KNOWN_CLUSTERS or not count.isdigit() or int(count) == 0:
        raise ValueError(f"--on {text!r}: write KIND:DEVICES, such as h100:32; kinds: {', '.join(KNOWN_CLUSTERS)}")
    return KNOWN_CLUSTERS[name](int(count))


def submit(request: Request, home: Home) -> Journal:
    """Write the job down with its plan."""
    journal = create_job(request.spec, home)
    journal.write_document("plan", request.plan.model_dump(mode="json"))
    return journal


def refuse_another_spec(given: JobSpec, kept: JobSpec) -> None:
    """A job keeps its spec: a result that belongs to two would belong to none. Raises ``SpecError`` by field."""
    flat_given, flat_kept = (flatten(spec.model_dump(mode="json")) for spec in (given, kept))
    remedy = "leave the file out to continue as started, or run it as a new job"
    problems = [
        Problem(name, flat_given.get(name), f"the job was started with {flat_kept.get(name, 'none')}", remedy)
        for name in {**flat_given, **flat_kept}
        if flat_given.get(name) != flat_kept.get(name)
    ]
    if problems:
        raise SpecError(problems)
