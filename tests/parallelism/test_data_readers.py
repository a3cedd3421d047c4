"""What one document is, for every kind; and that wrong input is named with file and line."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from parallelism.data import readers
from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.files import find_files


def read(path: Path, num_files: int = 1, **config: Any) -> list[str]:
    asked = DataConfig(train=[str(path)], **config)
    documents = list(readers.read_documents(find_files(asked.train, "data.train"), asked, num_files))
    assert all(document.text.encode() == document.data for document in documents)
    return [document.text for document in documents]


WIKITEXT = """ \n = Lobster = \n \n It is red .\n \n = = Diet = = \n \n x = y = z \n \n = Oak = \n \n A tree .\n"""


def test_wikitext_is_split_at_article_titles_only(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(WIKITEXT)
    articles = read(tmp_path / "wiki.txt")
    assert "".join(articles) == WIKITEXT.removeprefix(" \n")  # the blank start alone is white space, thus no document
    assert [article.split("\n")[0] for article in articles] == [" = Lobster = ", " = Oak = "]


def test_a_single_book_becomes_passages_that_end_at_blank_lines(tmp_path: Path) -> None:
    paragraph = "word " * 300 + "\n\n"
    (tmp_path / "book.txt").write_text(paragraph * 100)
    passages = read(tmp_path / "book.txt")
    assert "".join(passages) == paragraph * 100
    # 16 KiB, and what is left of the paragraph at hand.
    assert {len(passage) for passage in passages[:-1]} == {-(-readers.PASSAGE_BYTES // len(paragraph)) * len(paragraph)}


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("".join(f"line {number}\n" for number in range(20_000)))
    passages = read(tmp_path / "log.txt")
    assert len(passages) > 3
    assert all(passage.startswith("line ") and passage.endswith("\n") for passage in passages)


def test_one_endless_line_is_never_cut_inside_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LINE_PIECE_BYTES", 7)
    monkeypatch.setattr(readers, "PASSAGE_BYTES", 16)
    text = "aé€😀" * 50
    (tmp_path / "line.txt").write_text(text)
    passages = read(tmp_path / "line.txt")
    assert "".join(passages) == text
    assert len(passages) > 5


def test_many_files_are_one_document_each_and_a_large_one_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LARGEST_DOCUMENT_BYTES", 100)
    text = "twelve bytes\n" * 20
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt", num_files=readers.FILES_FOR_ONE_DOCUMENT_EACH)
    assert "".join(pieces) == text
    assert {len(piece) for piece in pieces[:-1]} == {91}


@pytest.mark.parametrize(
    ("rule", "expected"), [("line", ["a\n", "b é"]), ("file", ["a\n \nb é"]), ("passage", ["a\n \nb é"])]
)
def test_the_rule_can_be_named(tmp_path: Path, rule: str, expected: list[str]) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbf" + "a\n \nb é".encode())  # Windows editors put a mark in front
    assert read(tmp_path / "x.txt", documents=rule) == expected


def test_undecodable_text_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nM\xfcnchen\n")
    with pytest.raises(DataError, match=r"latin\.txt.*line 3 is not UTF-8 \(byte 0xfc\).*iconv") as caught:
        read(tmp_path / "latin.txt")
    assert caught.value.field == "data.train.0"


def jsonl(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_jsonl_takes_the_field_and_skips_blank_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [json.dumps({"body": "one"}), "", json.dumps({"body": "zwei ü", "n": 2}), ""])
    assert read(path, kind="jsonl", field="body") == ["one", "zwei ü"]


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ('{"body": "x", "id": 1}', "data.field", r"a\.jsonl line 3 lacks it; it has body, id"),
        ("{}", "data.field", "line 3 lacks it; it has no fields"),
        ('{"text": 7}', "data.field", "line 3: it is int, not a string"),
        ('{"text": null}', "data.field", "line 3: it is NoneType"),
        ('{"text": "x"', "data.train.0", "line 3 is not JSON"),
        ('["text"]', "data.train.0", "line 3 is not an object"),
        ('{"text": "\\ud800"}', "data.train.0", "line 3: 'text' holds half a surrogate pair"),
        ("[" * 100_000, "data.train.0", "line 3 is not JSON"),
    ],
)
def test_wrong_jsonl_names_file_and_line(tmp_path: Path, line: str, field: str, problem: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [json.dumps({"text": "fine"}), "", line])
    with pytest.raises(DataError, match=problem) as caught:
        read(path, kind="jsonl")
    assert caught.value.field == field


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), "dictionary"])
def test_parquet_reads_every_row_of_a_string_column(tmp_path: Path, kind: Any) -> None:
    texts = [f"row {number} ü" for number in range(1000)]
    column = pyarrow.array(texts).dictionary_encode() if kind == "dictionary" else pyarrow.array(texts, kind)
    path = parquet(tmp_path / "a.parquet", other=list(range(1000)), text=column)
    assert read(path, kind="parquet") == texts


@pytest.mark.parametrize(
    ("columns", "field", "problem"),
    [
        ({"body": ["x"]}, "data.field", "no such column; it has body"),
        ({"text": [1, 2]}, "data.field", "the column holds int64, not strings"),
        ({"text": ["x", None]}, "data.field", "row 2 is null"),
    ],
)
def test_wrong_parquet_is_named(tmp_path: Path, columns: dict[str, Any], field: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        read(parquet(tmp_path / "a.parquet", **columns), kind="parquet")
    assert caught.value.field == field


def test_what_is_not_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not Parquet"):
        read(jsonl(tmp_path / "a.parquet", ['{"text": "x"}']), kind="parquet")
    whole = parquet(tmp_path / "b.parquet", text=["x" * 50] * 1000).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[:200] + b"\0" * 40 + whole[240:])
    with pytest.raises(DataError):
        read(tmp_path / "b.parquet", kind="parquet")


@pytest.mark.parametrize("kind", ["pairs", "parallel"])
def test_kinds_without_a_reader_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match=f"data.kind: '{kind}'.*use text, jsonl, parquet"):
        readers.reader_of(kind)
