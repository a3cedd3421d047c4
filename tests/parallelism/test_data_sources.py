"""What is found out about a job's data before the job is queued."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parallelism.data import sources
from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.sources import inspect


def text(words: int, start: int = 0) -> str:
    return " ".join(f"w{(number * 7919) % 997}" for number in range(start, start + words)) + "\n"


def write_corpus(folder: Path, files: int = 40, words: int = 500) -> str:
    for number in range(files):
        (folder / f"{number:03d}.txt").write_text(text(words, number * 13))
    return f"{folder}/*.txt"


def test_files_and_bytes_are_counted(tmp_path: Path) -> None:
    train = write_corpus(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    facts = inspect(DataConfig(train=[train], validation=0.1, tokenizer={"vocab_size": 300}))
    assert (facts.files, facts.bytes, facts.text_bytes, facts.measured) == (40, size, size, True)


def test_the_builtin_corpus_passes_and_is_quick() -> None:
    started = time.process_time()
    facts = inspect(DataConfig(train=["builtin:python-stdlib"]))
    assert time.process_time() - started < 5  # 0.3 s where nothing else runs
    assert facts.files > 300
    assert facts.measured
    assert 5e6 < facts.bytes < 30e6


def test_large_corpora_are_looked_into_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SURVEYED_BYTES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "some text"}\n' for _ in range(9000))))
    facts = inspect(DataConfig(kind="jsonl", train=[f"{tmp_path}/*.gz"]))
    assert not facts.measured
    assert facts.text_bytes == 4 * facts.bytes
    with pytest.raises(DataError, match="line 1 lacks it; it has text"):
        inspect(DataConfig(kind="jsonl", train=[f"{tmp_path}/*.gz"], field="body"))


def test_a_small_corpus_is_rehearsed_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    train = write_corpus(tmp_path)
    with pytest.raises(DataError, match=r"yields only \d+ tokens; ask for \d+ or fewer"):
        inspect(DataConfig(train=[train], tokenizer={"vocab_size": 20_000}))
    inspect(DataConfig(train=[train], tokenizer={"vocab_size": 300}))
    assert list((tmp_path / "temporary").iterdir()) == []


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"train": ["{root}/none.txt"]}, "data.train.0", "no such file"),
    ({"train": ["{root}/*.none"]}, "data.train.0", "matches no file"),
    ({"train": ["{root}"]}, "data.train.0", "is a folder"),
    ({"train": ["https://example.org/a.txt"]}, "data.train.0", "protocol not allowed"),
    ({"train": ["{root}/empty.txt"]}, "data.train", "no text"),
    ({"train": ["{root}/000.txt"], "documents": "file"}, "data.validation", "single document"),
    ({"train": ["{root}/latin.bin"]}, "data.train.0", "not UTF-8"),
    ({"validation": ["{root}/none.txt"]}, "data.validation.0", "no such file"),
    ({"validation": ["{root}/000.txt"]}, "data.validation", "is among data.train"),
    ({"tokenizer": {"vocab_size": 900_000}}, "data.tokenizer.vocab_size", "(too few|yields only)"),
    ({"tokenizer": {"kind": "file", "path": "{root}/none.json"}}, "data.tokenizer.path.0", "no such file"),
    ({"tokenizer": {"kind": "file", "path": "{root}/000.txt"}}, "data.tokenizer.path", "is not a tokenizer"),
    ({"sequence_length": 10_000_000}, "data.train", "one sequence needs 10000001"),
    ({"validation": 0.001, "sequence_length": 5000}, "data.validation", "one sequence needs 5001"),
    ({"kind": "parallel"}, "data.kind", "use text, jsonl, parquet"),
    ({"kind": "pairs"}, "data.kind", "use text, jsonl, parquet"),
    ({"kind": "parquet"}, "data.train.0", "is not Parquet"),
    ({"kind": "jsonl", "train": ["{root}/a.jsonl"], "field": "body"}, "data.field", "line 1 lacks it; it has text"),
]


def filled(value: Any, root: Path) -> Any:
    return json.loads(json.dumps(value).replace("{root}", str(root)))


@pytest.mark.parametrize("size", ["small", "middling"])
@pytest.mark.parametrize(("changes", "field", "problem"), BROKEN)
def test_broken_data_is_refused_before_the_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, changes: dict[str, Any], field: str, problem: str
) -> None:
    if size == "middling":
        monkeypatch.setattr(sources, "REHEARSED_BYTES", -1)
    train = write_corpus(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.bin").write_bytes(b"M\xfcnchen")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text(99, 9 * line)}) + "\n" for line in range(50)))
    config = {"train": [train], "validation": 0.1, "tokenizer": {"vocab_size": 300}} | filled(changes, tmp_path)
    with pytest.raises(DataError, match=problem) as caught:
        inspect(DataConfig.model_validate(config))
    assert caught.value.field == field
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": ["a"], "validation": 1.5}, "not a fraction"),
        ({"train": ["a"], "validation": []}, "empty list"),
        ({"train": ["builtin:bible"]}, "available is python-stdlib"),
        ({"train": ["builtin:python-stdlib"], "kind": "jsonl"}, "goes with kind: text"),
        ({"train": ["a"], "kind": "jsonl", "documents": "line"}, "goes with kind: text"),
        ({"train": ["a"], "tokenizer": {"kind": "bytes", "vocab_size": 300}}, "goes with kind: bpe"),
        ({"train": ["a"], "tokenizer": {"kind": "bytes", "end_of_document": "x"}}, "goes with kind: file"),
        ({"train": ["a"], "tokenizer": {"kind": "file"}}, "needs path"),
        ({"train": ["a"], "tokenizer": {"path": "x"}}, "goes with kind: file"),
        ({"train": ["a"], "tokenizer": {"vocab_size": 100}}, "greater than or equal to 257"),
        ({"train": ["a"], "unknown": 1}, "not permitted"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_when_made(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DataConfig.model_validate(config)


def test_the_whole_room_needs_no_torch() -> None:
    modules = [path.stem for path in Path(sources.__file__).parent.glob("*.py") if path.stem != "__init__"]
    imports = "; ".join(f"import parallelism.data.{module}" for module in modules)
    program = f"import sys; sys.modules['torch'] = None; {imports}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=os.getcwd())
