"""Reading what was sent: bounded, of a known type, and a job's paths within what its sender may read."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.problems import Problem, SpecError
from launcher.spec import JobSpec, read_yaml
from parallelism.data.config import BUILTIN_PREFIX
from parallelism.data.errors import DataError
from parallelism.data.files import find_files, protocol_of
from services.api.problems import Refusal

JSON_TYPE = "application/json"
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")
YAML_BYTES = 1 << 17
"""Reading YAML takes a second for each of these; JSON takes a thousandth of that."""
DEEPEST = 40
_OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
MOST_ITEMS = 100_000


class BodyLimit:
    """Refuses bodies above a size, told or not, before anything reads them whole."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise Refusal(413, f"the body is larger than {self._limit} bytes", headers={"Connection": "close"})
            return message

        await self._app(scope, counted, send)


async def read_document(request: Request) -> object:
    """A document in JSON or YAML. Raises :class:`Refusal` and ``SpecError``."""
    limit = request.app.state.service.settings.body_bytes
    told = request.headers.get("content-length", "0")
    if not told.isdigit() or int(told) > limit:
        raise Refusal(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    content = await request.body()
    if kind not in (JSON_TYPE, *YAML_TYPES):
        raise Refusal(415, f"send the job as {JSON_TYPE} or {YAML_TYPES[0]}", headers={"Accept": JSON_TYPE})
    return await run_in_threadpool(_parse, content, parse_json if kind == JSON_TYPE else parse_yaml)


def _parse(content: bytes, parse: Callable[[bytes], object]) -> object:
    document = parse(content)
    _refuse_monsters(document)
    return document


def parse_json(content: bytes) -> object:
    """A JSON document; a key given twice and numbers that JSON does not know are refused."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {error}") from error


def parse_yaml(content: bytes) -> object:
    """A YAML document without anchors: what a few lines of them blow up to has no bounds."""
    if len(content) > YAML_BYTES:
        raise Refusal(413, f"a body in YAML is not larger than {YAML_BYTES} bytes: send a larger one as JSON")
    try:
        depth = 0
        for token in yaml.scan(content.decode("utf-8"), Loader=yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
                raise Refusal(400, f"line {token.start_mark.line + 1}: anchors and aliases are not accepted")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > DEEPEST:
                raise Refusal(400, f"the document is nested deeper than {DEEPEST} levels")
        return read_yaml(content)
    except (UnicodeDecodeError, yaml.YAMLError):
        return read_yaml(content)  # it says what is wrong
    except (RecursionError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise Refusal(400, f"the body is not valid YAML: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice")
    return document


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number that JSON has")


def _refuse_monsters(document: object) -> None:
    """Depth and number of parts are bounded, so that nothing behind this meets its own bounds."""
    level, count = [document], 0
    for _ in range(DEEPEST):
        level = [child for part in level for child in _children(part)]
        count += len(level)
        if count > MOST_ITEMS:
            raise Refusal(400, f"the document has more than {MOST_ITEMS} parts")
        if not level:
            return
    raise Refusal(400, f"the document is nested deeper than {DEEPEST} levels")


def _children(part: object) -> list[object]:
    if isinstance(part, dict):
        return list(part.values())
    return part if isinstance(part, list) else []


def confine(spec: JobSpec, roots: list[Path], protocols: list[str]) -> None:
    """Refuse paths outside the roots, also through links, and protocols that are not allowed.

    Raises ``SpecError`` with all of them. Nothing is opened: only names are looked up.
    """
    real = [Path(os.path.realpath(root)) for root in roots]
    problems = [problem for field, path in _paths(spec) for problem in _path_problems(field, path, real, protocols)]
    if problems:
        raise SpecError(problems)


def _paths(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Every place of a job's document that names a file or a folder."""
    data = spec.data
    yield from ((f"data.train.{index}", path) for index, path in enumerate(data.train))
    if isinstance(data.validation, list):
        yield from ((f"data.validation.{index}", path) for index, path in enumerate(data.validation))
    if data.tokenizer.path:
        yield "data.tokenizer.path", data.tokenizer.path
    for index, candidate in enumerate(spec.candidates):
        if candidate.source:
            yield f"candidates.{index}.source", candidate.source
        if candidate.layout and candidate.layout.offload_dir:
            yield f"candidates.{index}.layout.offload_dir", candidate.layout.offload_dir


def _path_problems(field: str, path: str, roots: list[Path], protocols: list[str]) -> Iterator[Problem]:
    if path.startswith(BUILTIN_PREFIX):
        return
    protocol = protocol_of(path)
    if protocol not in protocols or "::" in path or "\0" in path:
        yield Problem(field, path, "protocol not allowed", f"use one of: {', '.join(protocols)}, without chaining")
        return
    if protocol != "file":
        return
    plain = path.removeprefix("file://")
    if not plain.startswith("/"):
        yield Problem(field, path, "not an absolute path", "the service does not know where you are: write it whole")
        return
    outside = [name for name in _real_names(plain, field) if not any(_within(name, root) for root in roots)]
    if outside:
        allowed = ", ".join(str(root) for root in roots) or "none"
        yield Problem(field, path, "outside the folders that jobs may read", f"use a path below: {allowed}")


def _real_names(path: str, field: str) -> list[Path]:
    """Where a path leads; a pattern's fixed part, and every match."""
    head = Path(path)
    while any(sign in str(head) for sign in "*?["):
        head = head.parent
    found = [Path(os.path.realpath(head))]
    if str(head) != path and ".." not in Path(path).parts:
        try:
            found += [Path(os.path.realpath(file.path)) for file in find_files([path], field)]
        except DataError:
            return found  # the check of the job tells
    elif str(head) != path:
        found.append(Path("/"))
    return found


def _within(path: Path, root: Path) -> bool:
    return path == root or root in path.parents
