"""What is wrong with a job, in words that its owner can act on. Torch-free."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from parallelism.suggest import remedy as suggestion

LONGEST_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    ``field`` is the dotted path in the job's document (``candidates.1.layout.tensor``; empty: the whole document),
    ``value`` what stands there, ``what`` is wrong with it, and ``remedy`` what would work.
    """

    field: str
    value: object = dataclasses.field(hash=False)  # may be a part of a document, which cannot be hashed
    what: str
    remedy: str

    @property
    def message(self) -> str:
        """Value, what is wrong, and what would work, in one line."""
        shown = shorten(self.value)
        return "; ".join(part for part in (f"{shown}: {self.what}" if shown else self.what, self.remedy) if part)

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    def below(self, prefix: str) -> "Problem":
        """The same problem, for the document in which this one is part ``prefix``."""
        return Problem(f"{prefix}.{self.field}".rstrip("."), self.value, self.what, self.remedy)


class SpecError(ValueError):
    """A job that cannot run, with everything that was found wrong."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = list(problems)


def of_validation(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """One problem per field of ``model`` that pydantic refused, in the order of the document."""
    found: dict[str, list[Any]] = {}
    owners: dict[str, type[BaseModel] | None] = {}
    for detail in error.errors(include_url=False):
        path, owner = _place(detail, model)
        found.setdefault(path, []).append(detail)
        owners[path] = owner
    return [_problem(path, details, owners[path]) for path, details in found.items()]


def of_yaml(error: yaml.YAMLError, source: str) -> Problem:
    """Where the document ``source`` stops being YAML."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    remedy = "correct that line; values that hold ': ', '#', '[' or '{' need quotes"
    return Problem("", source, f"{place}not valid YAML: {what}", remedy)


def shorten(value: object) -> str:
    """A value, its middle left out where it is long (paths differ at their end); nothing for a part of a document."""
    if value is None or isinstance(value, Mapping | list | tuple):
        return ""
    text = json.dumps(value, default=str, ensure_ascii=False)
    if len(text) <= LONGEST_VALUE:
        return text
    head = LONGEST_VALUE // 3
    return f"{text[:head]}…{text[head + 1 - LONGEST_VALUE :]}"


def _place(detail: Any, model: type[BaseModel]) -> tuple[str, type[BaseModel] | None]:
    """The dotted path of a complaint, and the model that owns its last field.

    Pydantic also names the member of a union that it tried (``float``, ``literal['auto']``): that is not a field.
    """
    here: type[BaseModel] | None = model
    owner: type[BaseModel] | None = model
    path: list[str] = []
    for part in detail["loc"]:
        if isinstance(part, int):
            path.append(str(part))
        elif here and part in here.model_fields:
            path.append(part)
            owner, here = here, _model_in(here.model_fields[part].annotation)
        elif part is detail["loc"][-1] and detail["type"] == "extra_forbidden":
            path.append(part)
            owner = here
    return ".".join(path), owner


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model behind ``Model``, ``Model | None`` or ``list[Model]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    inner = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((model for model in inner if model), None)


def _problem(path: str, details: list[Any], owner: type[BaseModel] | None) -> Problem:
    first = details[0]
    value = first["input"]
    if first["type"] == "extra_forbidden":
        known = owner.model_fields if owner else []
        return Problem(
            path, None, "unknown field", suggestion(path.rpartition(".")[2], known) if known else "leave it out"
        )
    if first["type"] == "missing":
        return Problem(path, None, "is missing", "the field is required")
    what = " or ".join(
        text.removeprefix("should be ") if index else text
        for index, text in enumerate(dict.fromkeys(_plain(detail["msg"]) for detail in details))
    )
    return Problem(path, value, what, _remedy(details, value))


def _plain(message: str) -> str:
    """Pydantic's words without its ceremony."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for subject in ("Input ", "List ", "String ", "Tuple ", "Dictionary "):
        message = message.removeprefix(subject)
    return message.replace(" after validation", "").replace(", unable to parse string as a number", "")


def _remedy(details: Iterable[Any], value: object) -> str:
    """What would work, where pydantic's words do not say it already."""
    for detail in details:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "literal_error" and isinstance(value, str):
            choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
            hint = suggestion(value, choices)
            return hint if hint.startswith("did you mean") else ""
        if kind == "string_pattern_mismatch":
            return "use small letters, digits, '.', '_' and '-', at most 63 of them, the first a letter or a digit"
        if kind.startswith("int_") and isinstance(value, float):
            return "give a whole number"
        if kind in ("model_type", "model_attributes_type", "dict_type"):
            return "write it as a mapping, {field: value, ...}"
        if kind == "list_type":
            return f"write it as a list: [{shorten(value)}]"
    return ""
