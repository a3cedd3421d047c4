"""Which files a job names, and that they are read to their last byte."""

import bz2
import gzip
import os
import sys
from pathlib import Path

import fsspec
import pytest
import zstandard
from fsspec.spec import AbstractBufferedFile

from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.files import SourceFile, absolute, find_files, python_stdlib
from parallelism.data.readers import read_documents


def content(file) -> bytes:
    with file.open() as stream:
        return stream.read()


def test_globs_are_sorted_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    found = find_files([f"{tmp_path}/b.txt", f"{tmp_path}/*.txt", f"file://{tmp_path}/a.txt"], "data.train")
    assert [Path(file.name).name for file in found] == ["b.txt", "a.txt"]
    assert [file.size for file in found] == [5, 5]


def test_double_star_and_a_name_with_glob_signs(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "x[1].txt").write_text("odd")
    assert len(find_files([f"{tmp_path}/**/*.txt"], "data.train")) == 1
    assert content(find_files([f"{tmp_path}/deep/er/x[1].txt"], "data.train")[0]) == b"odd"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    text = "Größe\n".encode() * 100_000
    # Two frames one after the other, as `cat a.gz b.gz` leaves them.
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes(pack(text) + pack(b"the end"))
    (file,) = find_files([str(path)], "data.train")
    assert content(file) == text + b"the end"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut off", "not compressed"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str, damage: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix]
    path = tmp_path / f"text{suffix}"
    # Random bytes do not compress, so half the file is half the text.
    path.write_bytes(pack(os.urandom(100_000))[:50_000] if damage == "cut off" else b"plain text, no header")
    (file,) = find_files([str(path)], "data.validation")
    with pytest.raises(DataError, match="cannot be read to its end") as caught:
        content(file)
    assert caught.value.field == "data.validation.0"
    assert caught.value.value == str(path)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("{root}/none.txt", "there is no such file"),
        ("{root}/*.none", "matches no file"),
        ("{root}", "is a folder"),
        ("http://example.org/text.txt", "protocol not allowed"),
        ("hf://datasets/wikitext/x.parquet", "protocol not allowed"),
        ("simplecache::s3://bucket/text.txt", "protocol not allowed"),
        ("file://{root}/a.txt::memory://b", "protocol not allowed"),
    ],
)
def test_what_cannot_be_found_or_may_not_be_read(tmp_path: Path, pattern: str, problem: str) -> None:
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match=problem) as caught:
        find_files([f"{tmp_path}/good.txt", pattern.format(root=tmp_path)], "data.train")
    assert caught.value.field == "data.train.1"


def test_fsspec_urls_keep_their_protocol_in_the_name() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/espalier-test/a.txt.gz": gzip.compress(b"one"), "/espalier-test/b.txt.gz": gzip.compress(b"two")})
    try:
        found = find_files(["memory://espalier-test/*.gz"], "data.train")
        assert [file.name for file in found] == ["memory://espalier-test/a.txt.gz", "memory://espalier-test/b.txt.gz"]
        assert [content(file) for file in found] == [b"one", b"two"]
    finally:
        memory.rm("/espalier-test", recursive=True)


class StoredFile(AbstractBufferedFile):
    """As fsspec gives the files of object stores."""

    content = b"erste Zeile\nzweite\n"

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.content[start:end]


class Store:
    def open(self, path: str, mode: str) -> StoredFile:
        return StoredFile(None, path, mode, size=len(StoredFile.content))


def test_text_in_an_object_store_is_read_by_lines() -> None:
    file = SourceFile("s3://texts/a.txt", len(StoredFile.content), "data.train.0", Store(), "texts/a.txt")
    config = DataConfig(train=[file.name], documents="line")
    assert [document.text for document in read_documents((file,), config, 1)] == ["erste Zeile\n", "zweite\n"]


def test_a_missing_protocol_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # s3fs may be loaded by now
    with pytest.raises(DataError, match=r"not installed here: .*gcsfs"):
        find_files(["gs://bucket/text.txt"], "data.train")


def test_the_standard_library_without_tests_packages_and_generated_files(tmp_path: Path) -> None:
    kept = ["abc.py", "email/mime/base.py", "zipfile.py"]
    left_out = ["site-packages/numpy.py", "test/test_abc.py", "unittest/test/x.py", "encodings/cp437.py"]
    left_out += ["config-3.11-x86_64-linux-gnu/python-config.py", "_sysconfigdata__linux_.py", "LICENSE.txt"]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    assert [path.relative_to(tmp_path).as_posix() for path in python_stdlib(tmp_path)] == kept


def test_the_running_pythons_library_is_one_utf8_document_per_file() -> None:
    config = DataConfig(train=["builtin:python-stdlib"])
    files = find_files(config.train, "data.train")
    documents = list(read_documents(files, config, len(files)))
    filled = [file for file in files if file.size]
    assert len(documents) == len(filled) > 300
    assert sum(len(document.data) for document in documents) == sum(file.size for file in filled) > 5_000_000
    assert Path(files[0].name).parent == Path(os.__file__).parent


def test_relative_paths_become_absolute_and_nothing_else_changes(tmp_path: Path) -> None:
    config = DataConfig(
        train=["a/*.txt", "/b.txt", "builtin:python-stdlib", "s3://bucket/c.txt"],
        validation=["held-out.txt"],
        tokenizer={"kind": "file", "path": "tokenizer.json"},
    )
    moved = absolute(config, tmp_path)
    assert moved.train == [f"{tmp_path}/a/*.txt", "/b.txt", "builtin:python-stdlib", "s3://bucket/c.txt"]
    assert moved.validation == [f"{tmp_path}/held-out.txt"]
    assert moved.tokenizer.path == f"{tmp_path}/tokenizer.json"
    assert DataConfig.model_validate(moved.model_dump()) == moved


def test_other_compressions_are_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "text.bz2").write_bytes(bz2.compress(b"text" * 1000))
    config = DataConfig(train=[f"{tmp_path}/text.bz2"])
    with pytest.raises(DataError, match=r"need the suffix \.gz or \.zst"):
        list(read_documents(find_files(config.train, "data.train"), config, 1))
