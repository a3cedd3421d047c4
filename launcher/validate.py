"""Every check of a job before anything starts: one list of problems, each with field, value and remedy. Torch-free."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from compression.recipe import grid
from launcher.cluster import Cluster
from launcher.plan import CandidatePlan, Plan, PlanError, make_plan
from launcher.spec import JobSpec
from parallelism.data.config import TokenizerConfig
from parallelism.data.errors import DataError
from parallelism.data.sources import CorpusFacts, inspect
from parallelism.data.tokenizer import DEFAULT_VOCAB_SIZE, load_tokenizer
from parallelism.presets import ModelError, resolve_model

BYTE_VOCABULARY = 257
"""256 bytes and the end of a document."""
FREE_DISK_SHARE = 0.95
KNOWN_BACKENDS = ("local",)


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job: where (``candidates.1.layout.tensor``), what stands there, and what would work."""

    field: str
    value: object
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class SpecError(ValueError):
    """A job that cannot run, with everything that was found wrong."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems


def check(spec: JobSpec, cluster: Cluster, home: Path) -> Plan:
    """The job's plan. Raises :class:`SpecError` with all problems; writes nothing."""
    problems = [*_execution_problems(spec), *_model_problems(spec)]
    facts: CorpusFacts | None = None
    try:
        facts = inspect(spec.data, spec.seed)
    except DataError as error:
        problems.append(Problem(error.field, error.value, f"{error.value!r}: {error.problem}"))
    if problems:
        raise SpecError(problems)
    assert facts is not None
    try:
        plan = make_plan(spec, cluster, vocabulary_size(spec.data.tokenizer), facts.text_bytes)
    except PlanError as error:
        raise SpecError([Problem(error.field, error.value, f"{error.value}: {error.message}")]) from error
    problems = [*_group_problems(spec, plan), *_disk_problems(plan, home)]
    if problems:
        raise SpecError(problems)
    return plan


def vocabulary_size(tokenizer: TokenizerConfig) -> int:
    """Entries that the job's tokenizer will have. Raises ``DataError`` where a given one cannot be read."""
    if tokenizer.kind == "bytes":
        return BYTE_VOCABULARY
    if tokenizer.kind == "bpe":
        return tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
    return load_tokenizer(tokenizer).vocab_size


def _execution_problems(spec: JobSpec) -> list[Problem]:
    backend = spec.execution.backend
    if backend in KNOWN_BACKENDS:
        return []
    message = f"{backend!r}: unknown back-end; available: {', '.join(KNOWN_BACKENDS)}"
    return [Problem("execution.backend", backend, message)]


def _model_problems(spec: JobSpec) -> list[Problem]:
    problems = []
    for index, candidate in enumerate(spec.candidates):
        where = f"candidates.{index}.model"
        try:
            resolve_model(candidate.model, _provisional_vocabulary(spec), spec.data.sequence_length)
        except ModelError as error:
            problems.append(Problem(f"{where}.{error.field}", error.value, f"{error.value!r}: {error.problem}"))
        except ValidationError as error:
            problems += [_of_pydantic(where, detail) for detail in error.errors(include_url=False)]
    return problems


def _provisional_vocabulary(spec: JobSpec) -> int | None:
    tokenizer = spec.data.tokenizer
    return None if tokenizer.kind == "file" and not Path(tokenizer.path or "").is_file() else vocabulary_size(tokenizer)


def _of_pydantic(where: str, detail: object) -> Problem:
    assert isinstance(detail, dict)
    field = ".".join([where, *(str(part) for part in detail["loc"])])
    text = str(detail["msg"]).removeprefix("Value error, ")
    value = detail["input"]
    shown = text if isinstance(value, dict) else f"{value!r}: {text}"
    return Problem(field, value, shown)


def _group_problems(spec: JobSpec, plan: Plan) -> list[Problem]:
    """A group of columns that shares a scale has to fit into every matrix."""
    sizes = {recipe.quantize.group_size for recipe in grid(spec.compression) if recipe.quantize} - {None}
    return [
        problem
        for size in sizes
        for index, candidate in enumerate(plan.candidates)
        for problem in _group_problem(size, index, candidate)
        if size is not None
    ]


def _group_problem(size: int | None, index: int, candidate: CandidatePlan) -> list[Problem]:
    assert size is not None
    shapes = candidate.model.parameter_shapes()
    linear = {name: shape[1] for name, shape in shapes.items() if name.startswith("layers.0.") and len(shape) == 2}
    wrong = {name.removeprefix("layers.0."): columns for name, columns in linear.items() if columns % size}
    if not wrong:
        return []
    name, columns = next(iter(wrong.items()))
    legal = [width for width in (16, 32, 64, 128) if all(columns % width == 0 for columns in linear.values())]
    hint = f"possible for it: {legal}" if legal else "leave group_size out for one scale per output channel"
    message = f"{size}: does not divide the {columns} columns of {name} of candidate {candidate.name!r}; {hint}"
    return [Problem("compression.quantize.group_size", size, message)]


def _disk_problems(plan: Plan, home: Path) -> list[Problem]:
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if plan.disk_bytes <= FREE_DISK_SHARE * free:
        return []
    message = (
        f"the job needs about {plan.disk_bytes / 2**30:.1f} GiB of disk and {free / 2**30:.1f} GiB are free at "
        f"{existing}; free some, choose another --home, lower execution.checkpoint_every.keep or ask for fewer recipes"
    )
    return [Problem("execution.checkpoint_every.keep", plan.disk_bytes, message)]
