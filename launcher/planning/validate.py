"""Every check of a job before anything starts: one list of problems, each with field, value and remedy. Torch-free."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from compression import harness
from compression.checks import check_exports, grid_problems, recipe_problems
from compression.errors import RecipeError
from compression.recipe import grid
from launcher.backends.base import BACKENDS
from launcher.planning.cluster import Cluster
from launcher.planning.clusters import placement_problems
from launcher.planning.layouts import gib
from launcher.planning.plan import CandidatePlan, Plan, candidate_model, make_plan
from launcher.problems import Problem, SpecError
from launcher.profiles import JOBS
from launcher.spec import JobSpec
from parallelism import places
from parallelism.data.config import TokenizerConfig
from parallelism.data.errors import DataError
from parallelism.data.sources import CorpusFacts, inspect
from parallelism.data.tokenizer import DEFAULT_VOCAB_SIZE, load_tokenizer
from parallelism.models.base import ModelConfig
from parallelism.suggest import remedy

__all__ = ["Problem", "SpecError", "check", "vocabulary_size"]

BYTE_VOCABULARY = 257
"""256 bytes and the end of a document."""
FREE_DISK_SHARE = 0.95


def check(spec: JobSpec, cluster: Cluster, home: Path) -> Plan:
    """The job's plan. Raises :class:`launcher.problems.SpecError` with all problems; writes nothing."""
    problems = [*_execution_problems(spec, cluster, home), *_home_problems(home), *_harness_problems(spec)]
    problems += [_recipe_problem(error) for error in grid_problems(spec.compression)]
    facts, vocab_size = _read_data(spec, problems)
    models = _models(spec, vocab_size, problems)
    for index, model in models.items():
        problems += _compression_problems(spec, index, model, vocabulary_known=vocab_size is not None)
        problems += _export_problems(spec, index, model)
    plan = _plan(spec, cluster, models, vocab_size, facts, problems)
    if plan is not None:
        problems += [*_disk_problems(spec, plan, home), *_offload_problems(spec, plan, cluster, home)]
    if problems or plan is None:
        raise SpecError(list(dict.fromkeys(problems)))
    return plan


def vocabulary_size(tokenizer: TokenizerConfig) -> int:
    """Entries that the job's tokenizer will have. Raises ``DataError`` where a given one cannot be read."""
    if tokenizer.kind == "bytes":
        return BYTE_VOCABULARY
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
    return load_tokenizer(tokenizer).vocab_size


def _read_data(spec: JobSpec, problems: list[Problem]) -> tuple[CorpusFacts | None, int | None]:
    """What the text and the tokenizer are, as far as they can be read."""
    facts, vocab_size = None, None
    try:
        vocab_size = vocabulary_size(spec.data.tokenizer)
        facts = inspect(spec.data, spec.seed)
    except DataError as error:
        problems.append(Problem(error.field, error.value, error.problem, ""))
    return facts, vocab_size


def _models(spec: JobSpec, vocab_size: int | None, problems: list[Problem]) -> dict[int, ModelConfig]:
    """The models that can be made, by the candidate's place."""
    models = {}
    for index, candidate in enumerate(spec.candidates):
        try:
            models[index] = candidate_model(candidate, vocab_size or DEFAULT_VOCAB_SIZE, spec.data.sequence_length)
        except SpecError as error:
            problems += [problem.below(f"candidates.{index}") for problem in error.problems]
        else:
            if candidate.source is not None and vocab_size is not None:
                problems += _source_problems(spec, index, models[index], vocab_size)
    return models


def _source_problems(spec: JobSpec, index: int, model: ModelConfig, vocab_size: int) -> Iterator[Problem]:
    """Whether the job's text can be fed to a model that exists."""
    length = spec.data.sequence_length
    if length > model.context:
        what = f"longer than the context of {model.context} of candidate {spec.candidates[index].name!r}"
        yield Problem("data.sequence_length", length, what, f"use {model.context} or less")
    if vocab_size > model.vocab_size:
        what = f"the tokenizer has {vocab_size} entries, the model {model.vocab_size}"
        yield Problem(
            f"candidates.{index}.source",
            spec.candidates[index].source,
            what,
            "give the model's own tokenizer: data.tokenizer: {kind: file, path: PATH/tokenizer.json}",
        )


def _plan(
    spec: JobSpec,
    cluster: Cluster,
    models: dict[int, ModelConfig],
    vocab_size: int | None,
    facts: CorpusFacts | None,
    problems: list[Problem],
) -> Plan | None:
    """The plan of the candidates whose models can be made, even where other things are wrong, for its problems."""
    places = list(models)
    if not places or vocab_size is None:
        return None
    sound = spec.model_copy(update={"candidates": [spec.candidates[index] for index in places]})
    try:
        return make_plan(sound, cluster, vocab_size, facts.text_bytes if facts else 0)
    except SpecError as error:
        problems += [_at_place(problem, places) for problem in error.problems]
    return None


def _at_place(problem: Problem, places: list[int]) -> Problem:
    """A problem of the sound candidates, with the candidate's place among all; others stay as they are."""
    if not problem.field.startswith("candidates."):
        return problem
    first, place, rest = problem.field.split(".", 2)
    return Problem(f"{first}.{places[int(place)]}.{rest}", problem.value, problem.what, problem.remedy)


def _execution_problems(spec: JobSpec, cluster: Cluster, home: Path) -> Iterator[Problem]:
    execution = spec.execution
    if execution.backend not in BACKENDS:
        yield Problem("execution.backend", execution.backend, "unknown back-end", remedy(execution.backend, BACKENDS))
    yield from placement_problems(spec, home)
    yield from _store_problems(execution.backend, home.absolute() / JOBS)
    if execution.devices and execution.devices > cluster.devices:
        what = f"the cluster has {cluster.devices} devices"
        yield Problem("execution.devices", execution.devices, what, f"use {cluster.devices} or fewer, or leave it out")
    cores = len(os.sched_getaffinity(0))
    if execution.backend == "local" and cluster.device_kind == "cpu" and execution.threads_per_rank > cores:
        what = f"this machine has {cores} cores"
        yield Problem("execution.threads_per_rank", execution.threads_per_rank, what, f"use {cores} or fewer")


def _store_problems(backend: str, jobs: Path) -> Iterator[Problem]:
    if backend not in BACKENDS or BACKENDS[backend].objects or not places.is_mirrored(jobs):
        return
    able = ", ".join(name for name, entry in BACKENDS.items() if entry.objects)
    what = f"its nodes need files that they share, and journals are at {places.url(jobs)}"
    yield Problem("execution.backend", backend, what, f"use {able}, or take journals out of service.yaml")


def _harness_problems(spec: JobSpec) -> Iterator[Problem]:
    """Whether lm-evaluation-harness can be asked; its tasks are checked by a worker before training."""
    config = spec.evaluation.harness
    if config is None:
        return
    if not harness.installed():
        what, how = "lm-evaluation-harness is not installed", "pip install 'espalier-service[harness]', or leave it out"
        yield Problem("evaluation.harness", None, what, how)
    if config.include is not None and not Path(config.include).is_dir():
        yield Problem(
            "evaluation.harness.include", config.include, "there is no such folder", "name a folder of task files"
        )
    if spec.export.variants == "none":
        what = "the harness scores exports, and none is written"
        yield Problem("export.variants", "none", what, "set it to frontier or all, or leave evaluation.harness out")


def _compression_problems(
    spec: JobSpec, index: int, model: ModelConfig, *, vocabulary_known: bool
) -> Iterator[Problem]:
    """What keeps the grid's recipes off a candidate's matrices; sizes are told where its vocabulary is known."""
    candidate = spec.candidates[index]
    try:
        for error in recipe_problems(model, grid(spec.compression)):
            if error.field != "quantize.target_bytes" or vocabulary_known or candidate.source:
                yield _recipe_problem(error, f" (candidate {candidate.name!r})")
    except ValueError as error:
        yield Problem(f"candidates.{index}.model", None, str(error), "")


def _recipe_problem(error: RecipeError, whose: str = "") -> Problem:
    return Problem(f"compression.{error.field}", error.value, f"{error.problem}{whose}", error.remedy)


def _export_problems(spec: JobSpec, index: int, model: ModelConfig) -> Iterator[Problem]:
    """Whether what is exported has a form that others load."""
    if spec.export.variants != "none":
        try:
            check_exports(model, grid(spec.compression), spec.export.format)
        except ValueError as error:
            yield Problem(f"candidates.{index}.model", None, str(error), "")


def _home_problems(home: Path) -> Iterator[Problem]:
    existing = _existing(home)
    if not existing.is_dir():
        yield Problem("", str(home), f"{existing} is a file, not a directory", "choose another --home")
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield Problem("", str(home), f"{existing} cannot be written to", "choose another --home, or change its rights")


def _disk_problems(spec: JobSpec, plan: Plan, home: Path) -> Iterator[Problem]:
    existing = _existing(home)
    free = shutil.disk_usage(existing).free
    if places.is_mirrored(home.absolute() / JOBS):
        yield from _scratch_problems(spec, plan, existing, FREE_DISK_SHARE * free)
        return
    if plan.disk_bytes <= FREE_DISK_SHARE * free:
        return
    what = f"the job needs about {gib(plan.disk_bytes)} of disk and {gib(free)} are free at {existing}"
    if plan.calibration_bytes:
        what += f"; calibration holds up to {gib(plan.calibration_bytes)} of it"
    if not plan.candidates:
        hint = "free some, choose another --home, or ask for fewer recipes"
        yield Problem("compression", None, f"{what}, {plan.variants} variants the rest", hint)
        return
    largest = max(plan.candidates, key=lambda candidate: candidate.disk_bytes)
    taken = f"checkpoints of candidate {largest.name!r} take {gib(largest.checkpoint_bytes)} each"
    hint = "free some, choose another --home, lower execution.checkpoint_every.keep or ask for fewer recipes"
    field, keep = "execution.checkpoint_every.keep", largest.checkpoint.keep
    yield Problem(field, keep, f"{what}; {taken}, {plan.variants} variants the rest", hint)


def _scratch_problems(spec: JobSpec, plan: Plan, folder: Path, room: float) -> Iterator[Problem]:
    """Whether there is room for what a job in an object store holds on this machine at once.

    That is a checkpoint of each candidate until it is stored, and what calibration has. Elsewhere, the disks are not
    known.
    """
    needed = plan.calibration_bytes + sum(candidate.checkpoint_bytes for candidate in plan.candidates)
    if spec.execution.backend == "local" and needed > room:
        what = f"copies of what is in the object store take about {gib(needed)}, and {gib(round(room))} may be taken"
        yield Problem("", str(folder), what, "make room, or choose another --home")


def _offload_problems(spec: JobSpec, plan: Plan, cluster: Cluster, home: Path) -> Iterator[Problem]:
    """Whether the folders that optimizers are kept in have room, with what else of the job lies on their disks."""
    places = {candidate.name: index for index, candidate in enumerate(spec.candidates)}
    kept = [candidate for candidate in plan.candidates if candidate.offload_bytes]
    together = _at_once(kept, cluster.devices)
    for one in kept:
        directory, field = one.layout.offload_dir, f"candidates.{places[one.name]}.layout.offload_dir"
        assert directory is not None
        folder = _existing(Path(directory))
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            yield Problem(field, directory, f"{folder} is no directory that can be written to", _OFFLOAD_REMEDY)
            continue
        others = [other for other in together if other is not one] if one in together else []
        beside = [(home, plan.disk_bytes), *((Path(x.layout.offload_dir or ""), x.offload_bytes) for x in others)]
        there = sum(size for path, size in beside if _disk_of(path) == _disk_of(folder))
        free = shutil.disk_usage(folder).free
        if one.offload_bytes + there > FREE_DISK_SHARE * free:
            what = f"the optimizer takes {gib(one.offload_bytes)} there and {gib(free)} are free"
            what += f", of which the rest of the job takes {gib(there)}" if there else ""
            yield Problem(field, directory, what, f"make room, {_OFFLOAD_REMEDY}")


_OFFLOAD_REMEDY = "name another directory on a local disk, or set layout.offload: cpu"


def _at_once(candidates: list[CandidatePlan], devices: int) -> list[CandidatePlan]:
    """Those that may train side by side and take most of a disk."""
    found = []
    for one in sorted(candidates, key=lambda candidate: -candidate.offload_bytes):
        if one.layout.world_size <= devices:
            found.append(one)
            devices -= one.layout.world_size
    return found


def _disk_of(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(home: Path) -> Path:
    """The home, or the nearest folder above it that exists."""
    return next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())
