"""Documents out of files: one reader per ``data.kind``. Torch-free; documents are streamed, never held together.

What a document is:

==========  ===========================================================================================================
kind        one document
==========  ===========================================================================================================
jsonl       the string under ``data.field`` of one line
parquet     one row of the column ``data.field``
text        by ``data.documents``:
            ``file``     one file (over 16 MiB: cut at line ends);
            ``article``  from one WikiText title (`` = Title = `` after a blank line) to the next;
            ``passage``  16 KiB of whole paragraphs (32 KiB of whole lines where there are no blank lines);
            ``line``     one line;
            ``auto``     built-in corpora by file; files that begin with a WikiText title by article; the others by file
            where a job names at least 32 files, else by passage, so that text can be held out of a single book
==========  ===========================================================================================================

Text that is white space only is skipped. A new kind is one reader here; kinds whose samples are not running text
(sentence pairs, translations) need their own prepared form too and are refused until they have one.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.files import SourceFile

FILES_FOR_ONE_DOCUMENT_EACH = 32
LARGEST_DOCUMENT_BYTES = 16 << 20
PASSAGE_BYTES = 16 << 10
LINE_PIECE_BYTES = 1 << 20
PARQUET_ROWS = 256
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, and the same as UTF-8."""

    text: str
    data: bytes


Reader = Callable[[SourceFile, DataConfig, int], Iterator[Document]]
"""Documents of one file; the last argument is the number of files that the job names."""


def read_documents(files: Sequence[SourceFile], config: DataConfig, num_files: int) -> Iterator[Document]:
    """Every document of the files, in order. Raises :class:`DataError` at what cannot be read, with file and line."""
    reader = reader_of(config.kind)
    for file in files:
        for document in reader(file, config, num_files):
            if document.text and not document.text.isspace():
                yield document


def reader_of(kind: str) -> Reader:
    """The reader of a kind. Raises :class:`DataError` for kinds that no model family here trains on."""
    if kind not in READERS:
        raise DataError("data.kind", kind, f"no model family trains on it in this version; use {', '.join(READERS)}")
    return READERS[kind]


def _document(data: bytes, file: SourceFile, first_line: int) -> Document:
    """Decode, or say in which line it fails; ``first_line`` is the number of the document's first line."""
    try:
        return Document(data.decode("utf-8"), data)
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        problem = (
            f"line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); convert the file, for example with"
            " iconv -f LATIN1 -t UTF-8; compressed files need the suffix .gz or .zst"
        )
        raise DataError(file.field, file.name, problem) from error


# Text


def read_text(file: SourceFile, config: DataConfig, num_files: int) -> Iterator[Document]:
    """Documents of a plain text file, as ``config.documents`` says."""
    with file.open() as stream:
        lines = _lines(stream)
        first = next(lines, b"")
        lines = itertools.chain([first.removeprefix(BYTE_ORDER_MARK)], lines)
        rule: str = config.documents
        if rule == "auto":
            lines, rule = _rule_by_content(lines, by_file=file.builtin or num_files >= FILES_FOR_ONE_DOCUMENT_EACH)
        number = 1
        for piece in SPLITTERS[rule](lines):
            if piece:
                yield _document(piece, file, number)
            number += piece.count(b"\n")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; a line over 1 MiB comes in pieces that do not cut a character."""
    rest = b""
    for piece in iter(partial(stream.readline, LINE_PIECE_BYTES), b""):
        data = rest + piece
        whole = len(piece) < LINE_PIECE_BYTES or piece.endswith(b"\n")
        cut = len(data) if whole else _character_end(data)
        rest = data[cut:]
        yield data[:cut]
    if rest:
        yield rest


def _character_end(data: bytes) -> int:
    """Where to cut ``data`` so that no UTF-8 character is cut: before a last, possibly incomplete one."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            return len(data) if byte < 0x80 else len(data) - back
    return len(data)


def _is_title(line: bytes) -> bool:
    """Whether a line is a WikiText article's title: `` = Title = ``, where sections are `` = = Section = = ``."""
    text = line.strip(b"\r\n")
    return text.startswith(b" = ") and text.endswith(b" = ") and len(text) > 6 and not text.startswith(b" = =")


def _rule_by_content(lines: Iterable[bytes], by_file: bool) -> tuple[Iterator[bytes], str]:
    """The lines again, and the rule for ``documents: auto``."""
    remaining = iter(lines)
    if by_file:
        return remaining, "file"
    head: list[bytes] = []
    for line in remaining:
        head.append(line)
        if line.strip():
            break
    rule = "article" if head and _is_title(head[-1]) else "passage"
    return itertools.chain(head, remaining), rule


def by_file(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The whole file; over 16 MiB in pieces that end at line ends, so that memory stays bounded."""
    return _grouped(lines, lambda line, size, blank: size + len(line) > LARGEST_DOCUMENT_BYTES)


def by_article(lines: Iterable[bytes]) -> Iterator[bytes]:
    """From one WikiText title to the next."""
    return _grouped(
        lines, lambda line, size, blank: (blank and _is_title(line)) or size + len(line) > LARGEST_DOCUMENT_BYTES
    )


def by_passage(lines: Iterable[bytes]) -> Iterator[bytes]:
    """At the first blank line after 16 KiB, or the first line end after 32 KiB."""
    return _grouped(lines, lambda line, size, blank: size >= PASSAGE_BYTES * (1 if blank else 2))


def by_line(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Every line, its end included."""
    return iter(lines)


def _grouped(lines: Iterable[bytes], begins: Callable[[bytes, int, bool], bool]) -> Iterator[bytes]:
    """Join lines; ``begins(line, bytes so far, whether the line before is blank)`` starts a new group at ``line``."""
    group: list[bytes] = []
    size, blank = 0, True
    for line in lines:
        if group and begins(line, size, blank):
            yield b"".join(group)
            group, size = [], 0
        group.append(line)
        size += len(line)
        blank = not line.strip()
    yield b"".join(group)


SPLITTERS: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    "file": by_file,
    "article": by_article,
    "passage": by_passage,
    "line": by_line,
}


# JSON lines


def read_jsonl(file: SourceFile, config: DataConfig, num_files: int) -> Iterator[Document]:
    """The string under ``config.field`` of every line; blank lines are skipped."""
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            text = _field_of(_document(line, file, number).text, file, number, config.field)
            try:
                yield Document(text, text.encode("utf-8"))
            except UnicodeEncodeError as error:
                problem = (
                    f"line {number}: {config.field!r} holds half a surrogate pair, which is no text; mend the line"
                )
                raise DataError(file.field, file.name, problem) from error


def _field_of(line: str, file: SourceFile, number: int, field: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        problem = f"line {number} is not JSON: {error}; kind: jsonl takes one object per line"
        raise DataError(file.field, file.name, problem) from error
    if not isinstance(record, dict):
        problem = f"line {number} is not an object; kind: jsonl takes one object per line, such as {{{field!r}: ...}}"
        raise DataError(file.field, file.name, problem)
    if field not in record:
        has = ", ".join(sorted(record)[:8]) or "no fields"
        raise DataError("data.field", field, f"{file.name} line {number} lacks it; it has {has}")
    text = record[field]
    if not isinstance(text, str):
        problem = f"{file.name} line {number}: it is {type(text).__name__}, not a string; leave such lines out"
        raise DataError("data.field", field, problem)
    return text


# Parquet


def read_parquet(file: SourceFile, config: DataConfig, num_files: int) -> Iterator[Document]:
    """The column ``config.field``, row by row; only that column is read."""
    with file.open() as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowInvalid as error:
            raise DataError(file.field, file.name, f"is not Parquet: {error}; check data.kind") from error
        _check_column(table.schema_arrow, file, config.field)
        row = 0
        for batch in _batches(table, file, config.field):
            for value in batch.column(0):
                row += 1
                yield _row_document(value, file, config.field, row)


def _batches(table: "pyarrow.parquet.ParquetFile", file: SourceFile, field: str) -> "Iterator[pyarrow.RecordBatch]":
    try:
        yield from table.iter_batches(batch_size=PARQUET_ROWS, columns=[field])
    except pyarrow.ArrowException as error:
        raise DataError(file.field, file.name, f"is damaged: {error}") from error


def _check_column(schema: "pyarrow.Schema", file: SourceFile, field: str) -> None:
    if field not in schema.names:
        raise DataError("data.field", field, f"{file.name} has no such column; it has {', '.join(schema.names[:8])}")
    kind = schema.field(field).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    text_types = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(is_text(kind) for is_text in text_types):
        raise DataError("data.field", field, f"{file.name}: the column holds {kind}, not strings; name a text column")


def _row_document(value: "pyarrow.Scalar", file: SourceFile, field: str, row: int) -> Document:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(file.field, file.name, f"row {row} of {field!r} is not UTF-8; write it as UTF-8") from error
    if text is None:
        raise DataError("data.field", field, f"{file.name} row {row} is null; leave such rows out")
    return Document(text, text.encode("utf-8"))


READERS: dict[str, Reader] = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}
