"""Turns errors into lines that a user can act on: the field, the value, what would work."""

import difflib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from launcher.spec import NAME

LONGEST_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a document."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


def of_validation(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """One problem per field of ``model`` that pydantic refused, in the order of the document."""
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_without_union_members(detail["loc"]), []).append(detail)
    return [
        Problem(".".join(str(part) for part in location), _message(location, details, model))
        for location, details in found.items()
    ]


def of_yaml(error: yaml.YAMLError) -> Problem:
    """Where the document stops being YAML."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return Problem("", f"{place}not valid YAML: {what}")


def _message(location: tuple[str | int, ...], details: list[Any], model: type[BaseModel]) -> str:
    first = details[0]
    if first["type"] == "extra_forbidden":
        return _unknown_field(str(location[-1]), _fields_at(model, location[:-1]))
    if first["type"] == "missing":
        return "is missing; the field is required"
    if first["type"] == "string_pattern_mismatch" and first["ctx"]["pattern"] == NAME:
        return f"{_value(first['input'])}: use small letters, digits, '.', '_' and '-', at most 63 of them"
    texts = dict.fromkeys(_plain(detail["msg"]) for detail in details)
    text = " or ".join(text.removeprefix("should be ") if index else text for index, text in enumerate(texts))
    value = _value(first["input"])
    return f"{value}: {text}" if value else text


def _plain(message: str) -> str:
    """Pydantic's words without its ceremony."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    for subject in ("Input ", "List ", "String ", "Tuple ", "Dictionary "):
        message = message.removeprefix(subject)
    return message.replace(" after validation", "").replace(", unable to parse string as a number", "")


def _unknown_field(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"unknown field; did you mean {close[0]!r}?"
    return f"unknown field; known here: {', '.join(known)}" if known else "unknown field; leave it out"


def _without_union_members(location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Pydantic appends the member of a union it tried (``float``, ``literal['auto']``, ``list[str]``): not a field."""
    return tuple(part for part in location if isinstance(part, int) or not _is_union_member(part))


def _is_union_member(part: str) -> bool:
    return "[" in part or part in {"int", "float", "str", "bool", "none", "constrained-int", "constrained-float"}


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields of the model that stands at ``location`` below ``model``."""
    here: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if here else None
        here = _model_in(field.annotation) if field else None
    return list(here.model_fields) if here else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model behind ``Model``, ``Model | None`` or ``list[Model]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    inner = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((model for model in inner if model), None)


def _value(value: Any) -> str:
    """The refused value, where it is short enough to help."""
    if isinstance(value, dict | list):
        return ""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
