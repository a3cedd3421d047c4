"""From a job file to a job: read, check, write down. Nothing is written before everything has been checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from launcher.cluster import local_cluster
from launcher.jobs import Home, create_job
from launcher.journal import Journal
from launcher.plan import Plan
from launcher.spec import JobSpec
from launcher.tracking_records import flatten
from launcher.validate import SpecError, check
from services import problems
from services.problems import Problem


class BadSpecError(ValueError):
    """A job file that cannot run, with everything that is wrong with it."""

    def __init__(self, source: str, found: list[Problem]) -> None:
        super().__init__("\n".join(f"{source}: {problem}" for problem in found))
        self.source = source
        self.problems = found


@dataclass(frozen=True)
class Request:
    """A job that may run: its spec, and what the planner made of it."""

    spec: JobSpec
    plan: Plan


def read_spec(path: Path) -> JobSpec:
    """The job file's spec. Raises :class:`BadSpecError`."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadSpecError(str(path), [problems.of_yaml(error)]) from error
    except UnicodeDecodeError as error:
        raise BadSpecError(
            str(path), [Problem("", f"not UTF-8 text (byte {error.start}): save it as UTF-8")]
        ) from error
    except OSError as error:
        raise BadSpecError(str(path), [Problem("", f"{error.strerror}: name a job file that exists")]) from error
    if not isinstance(document, Mapping):
        kind = "empty" if document is None else f"a {type(document).__name__}"
        hint = f"the file is {kind}: a job file is a mapping with name, data, budget and candidates"
        raise BadSpecError(str(path), [Problem("", hint)])
    return parse_spec(document, str(path))


def parse_spec(document: Mapping[str, Any], source: str) -> JobSpec:
    """The spec that a document describes. Raises :class:`BadSpecError`."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise BadSpecError(source, problems.of_validation(error, JobSpec)) from error


def make_request(spec: JobSpec, home: Home, source: str) -> Request:
    """Check a spec against this machine and the files it names. Raises :class:`BadSpecError`."""
    try:
        return Request(spec, check(spec, local_cluster(spec), home.path))
    except SpecError as error:
        raise BadSpecError(source, [Problem(one.field, one.message) for one in error.problems]) from error


def submit(request: Request, home: Home) -> Journal:
    """Write the job down with its plan."""
    journal = create_job(request.spec, home)
    journal.write_document("plan", request.plan.model_dump(mode="json"))
    return journal


def differences(given: JobSpec, kept: JobSpec) -> list[Problem]:
    """Fields in which a job file departs from the spec that a job was started with."""
    flat_given, flat_kept = (flatten(spec.model_dump(mode="json")) for spec in (given, kept))
    return [
        Problem(
            name, f"{flat_given.get(name, 'absent')}: the job was started with {flat_kept.get(name, 'none')}; {REMEDY}"
        )
        for name in {**flat_given, **flat_kept}
        if flat_given.get(name) != flat_kept.get(name)
    ]


REMEDY = "leave the file out to continue as started, or run it as a new job"
