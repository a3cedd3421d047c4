"""Preparation: once, the same every time, safe against kills and company, bounded in memory, clear in refusal."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from parallelism.data.batches import TokenBatches
from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.files import find_files
from parallelism.data.prepare import Corpus, prepare
from parallelism.data.prepared import MANIFEST, SPLITS, PreparedData, Split
from parallelism.data.tokenizer import read_tokenizer
from tests.parallelism.data_workers import prepare_and_signal, prepare_and_tell

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
WIKITEXT = SHARED_DATA / "wikitext-2" / "valid.txt.gz"

SPAWN = multiprocessing.get_context("spawn")
WORDS = [f"{a}{b}{c}" for a in ("str", "pl", "gr", "m") for b in "aeiou" for c in ("ne", "te", "sk", "lm", "nd")]


def made_text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, weights=range(1, len(WORDS) + 1), k=words)) + "\n"


def made_corpus(folder: Path, files: int = 60, words: int = 400) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(files):
        (folder / f"{number:04d}.txt").write_text(made_text(number, words))
    return f"{folder}/*.txt"


def config(train: str, **changes: Any) -> DataConfig:
    return DataConfig(**{"train": [train], "validation": 0.1, "tokenizer": {"vocab_size": 300}} | changes)


def token_bytes(prepared: PreparedData) -> list[bytes]:
    names = ["train.bin", "train.idx", "validation.bin", "validation.idx", "tokenizer.json"]
    return [(prepared.directory / prepared.folder / name).read_bytes() for name in names]


def documents_of(prepared: PreparedData, split: Split) -> list[np.ndarray]:
    """What megatron-core's reader finds; copied, as its arrays die with the reader."""
    dataset = IndexedDataset(str(prepared.prefix(split)))
    return [np.array(document) for document in dataset]


# What comes out


def check_lossless(asked: DataConfig, prepared: PreparedData) -> None:
    """Every document of the corpus stands in exactly one split, whole, and nothing else does."""
    tokenizer = read_tokenizer(prepared.tokenizer_path, prepared.end_of_document)
    corpus = Corpus.find(asked)
    wanted = sorted(document.text for document in corpus.documents(corpus.files))
    found: list[str] = []
    for split in SPLITS:
        documents = documents_of(prepared, split)
        facts = prepared.splits[split]
        assert (len(documents), sum(map(len, documents))) == (facts.documents, facts.tokens)
        assert all(document[-1] == prepared.end_of_document_id for document in documents)
        texts = [tokenizer.decode(document[:-1]) for document in documents]
        assert sum(len(text.encode()) for text in texts) == facts.bytes
        found += texts
    assert sorted(found) == wanted


@pytest.mark.parametrize("tokenizer", [{"vocab_size": 300}, {"kind": "bytes"}])
def test_the_tokens_are_the_corpus_split_by_document(tmp_path: Path, tokenizer: dict[str, Any]) -> None:
    asked = config(made_corpus(tmp_path / "text"), tokenizer=tokenizer)
    prepared = prepare(asked, tmp_path / "out", 7)
    check_lossless(asked, prepared)
    assert prepared.vocab_size == (257 if tokenizer.get("kind") else 300)
    assert prepared.validation.documents == 6
    assert prepared.bytes_per_token == prepared.validation.bytes / prepared.validation.tokens


def test_all_kinds_of_files_give_the_same_tokens(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = [made_text(number, 300) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("".join(texts).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    tokens = [
        prepare(config(f"{tmp_path}/{name}", **changes), tmp_path / f"out-{name}", 1)
        for name, changes in [
            ("a.jsonl", {"kind": "jsonl"}),
            ("a.parquet", {"kind": "parquet"}),
            ("a.txt.gz", {"documents": "line"}),
        ]
    ]
    # A line keeps its end, and so do these texts: the documents are equal.
    assert token_bytes(tokens[0]) == token_bytes(tokens[1]) == token_bytes(tokens[2])


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    made_corpus(tmp_path / "text")
    (tmp_path / "held-out.txt").write_text("xylophone quartz " * 500)
    held_out = prepare(config(f"{tmp_path}/text/*.txt", validation=[f"{tmp_path}/held-out.txt"]), tmp_path / "a", 1)
    vocabulary = json.loads(held_out.tokenizer_path.read_text())["model"]["vocab"]
    assert not [token for token in vocabulary if "xy" in token or "qu" in token]
    assert held_out.validation.documents == 1


@pytest.mark.skipif(not WIKITEXT.exists(), reason="the WikiText-2 corpus is not beside the repository")
def test_wikitext_is_held_out_by_article(tmp_path: Path) -> None:
    asked = DataConfig(train=[str(WIKITEXT)], validation=0.1, tokenizer={"vocab_size": 2000})
    prepared = prepare(asked, tmp_path, 1234)
    check_lossless(asked, prepared)
    assert prepared.train.documents + prepared.validation.documents == 60  # the articles of the validation set
    share = prepared.validation.bytes / (prepared.train.bytes + prepared.validation.bytes)
    assert abs(share - 0.1) < 0.02
    assert 2.5 < prepared.bytes_per_token < 4.5
    tokenizer = read_tokenizer(prepared.tokenizer_path, prepared.end_of_document)
    for split in SPLITS:
        assert all(tokenizer.decode(document[:8]).startswith(" = ") for document in documents_of(prepared, split)[1:])


# The same every time


def test_equal_requests_give_equal_files_and_are_answered_from_disk(tmp_path: Path) -> None:
    asked = config(made_corpus(tmp_path / "text"))
    first = prepare(asked, tmp_path / "a", 7)
    assert token_bytes(prepare(asked, tmp_path / "b", 7)) == token_bytes(first)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    for path in (tmp_path / "text").iterdir():
        path.unlink()  # prepared data stands on its own
    assert prepare(asked, tmp_path / "a", 7) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()} == before


def test_seed_and_tokenizer_are_part_of_the_request_the_sequence_length_is_not(tmp_path: Path) -> None:
    train = made_corpus(tmp_path / "text")
    first = prepare(config(train), tmp_path / "out", 7)
    assert prepare(config(train, sequence_length=64), tmp_path / "out", 7) == first
    other = prepare(config(train), tmp_path / "out", 8)
    assert other.validation.sha256 != first.validation.sha256
    assert PreparedData.load(tmp_path / "out") == other
    smaller = prepare(config(train, tokenizer={"vocab_size": 280}), tmp_path / "out", 8)
    assert (smaller.vocab_size, smaller.corpus) == (280, other.corpus)
    # What a manifest no longer names is cleaned up: two folders at most.
    assert len([path for path in (tmp_path / "out").iterdir() if path.is_dir()]) <= 2


@pytest.mark.parametrize("damage", ["missing", "shorter", "no manifest"])
def test_damaged_data_is_prepared_again(tmp_path: Path, damage: str) -> None:
    asked = config(made_corpus(tmp_path / "text"))
    first = prepare(asked, tmp_path / "out", 7)
    wanted = token_bytes(first)
    tokens = first.prefix("train").with_suffix(".bin")
    if damage == "missing":
        tokens.unlink()
    elif damage == "shorter":
        tokens.write_bytes(tokens.read_bytes()[:-1])
    else:
        (tmp_path / "out" / MANIFEST).write_text('{"version": 1')
    with pytest.raises(ValueError, match="prepare"):
        PreparedData.load(tmp_path / "out")
    assert token_bytes(prepare(asked, tmp_path / "out", 7)) == wanted


def test_files_that_change_between_the_passes_are_noticed(tmp_path: Path) -> None:
    asked = config(made_corpus(tmp_path / "text"))

    def change(phase: str, seen: int) -> None:
        if phase == "survey":
            (tmp_path / "text" / "0003.txt").write_text("changed")

    with pytest.raises(DataError, match="changed while they were read"):
        prepare(asked, tmp_path / "out", 7, progress=change)
    assert not (tmp_path / "out" / MANIFEST).exists()


# Kills and company


@pytest.mark.parametrize("phase", ["survey", "tokenize"])
def test_a_killed_preparation_leaves_nothing_that_counts_and_nothing_for_ever(tmp_path: Path, phase: str) -> None:
    asked = config(made_corpus(tmp_path / "text"))
    killed = SPAWN.Process(target=prepare_and_signal, args=(asked, tmp_path / "out", phase, signal.SIGKILL))
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    leftover = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
    assert len(leftover) == 1
    with pytest.raises(ValueError, match="holds no prepared data"):
        PreparedData.load(tmp_path / "out")
    prepared = prepare(asked, tmp_path / "out", 7)
    assert token_bytes(prepared) == token_bytes(prepare(asked, tmp_path / "undisturbed", 7))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [prepared.folder]


def test_processes_that_prepare_at_once_share_one_result(tmp_path: Path) -> None:
    asked = config(made_corpus(tmp_path / "text", files=200, words=2000))
    results = SPAWN.Queue()
    processes = [SPAWN.Process(target=prepare_and_tell, args=(asked, tmp_path / "out", results)) for _ in range(4)]
    for process in processes:
        process.start()
    told = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert len(told) == 4
    assert len(set(told.values())) == 1
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [*set(told.values())]


def test_a_stopped_process_is_overtaken_and_its_late_result_ignored(tmp_path: Path) -> None:
    asked = config(made_corpus(tmp_path / "text"))
    stopped = SPAWN.Process(target=prepare_and_signal, args=(asked, tmp_path / "out", "tokenize", signal.SIGSTOP))
    stopped.start()
    assert stopped.pid is not None
    try:
        _, status = os.waitpid(stopped.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        started = time.monotonic()
        prepared = prepare(asked, tmp_path / "out", 7, patience=0.5)
        assert time.monotonic() - started > 0.5
        manifest = (tmp_path / "out" / MANIFEST).read_bytes()
        os.kill(stopped.pid, signal.SIGCONT)
        stopped.join(60)
        assert stopped.exitcode == 0
    finally:
        stopped.kill()
    assert (tmp_path / "out" / MANIFEST).read_bytes() == manifest
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == [prepared.folder]


def test_progress_counts_up_to_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallelism.data.prepare.BATCH_BYTES", 20_000)
    made_corpus(tmp_path / "text")
    (tmp_path / "held-out.txt").write_text(made_text(99, 5000))
    asked = config(f"{tmp_path}/text/*.txt", validation=[f"{tmp_path}/held-out.txt"])
    seen: dict[str, list[int]] = {"survey": [], "tokenize": []}
    prepared = prepare(asked, tmp_path / "out", 7, progress=lambda phase, count: seen[phase].append(count))
    assert seen["survey"][-1] == prepared.train.bytes
    assert seen["tokenize"][-1] == prepared.train.bytes + prepared.validation.bytes
    assert all(counts == sorted(counts) and len(counts) > 3 for counts in seen.values())


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare(config(made_corpus(tmp_path / "text"), tokenizer={"vocab_size": 100_000}), tmp_path / "out", 7)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} " + made_text(number, 500)}) + "\n" for number in range(250)]
    peaks, sizes = [], []
    for copies in (4, 24):
        path = tmp_path / f"{copies}.jsonl"
        with open(path, "w") as file:
            for copy in range(copies):
                file.writelines(line.replace('{"text": "', f'{{"text": "{copy}') for line in lines)
        command = [sys.executable, "-m", "tests.parallelism.data_workers", str(path), str(tmp_path / f"out-{copies}")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        peaks.append(int(done.stdout))
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] > 10e6
    assert peaks[1] - peaks[0] < 5e6


# Refusals


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"tokenizer": {"vocab_size": 5000}}, "data.tokenizer.vocab_size", "yields only"),
        ({"sequence_length": 100_000}, "data.train", r"train split has \d+ tokens, one sequence needs 100001"),
        ({"validation": 0.0001, "sequence_length": 2000}, "data.validation", "one sequence needs 2001"),
        ({"kind": "pairs"}, "data.kind", "use text, jsonl, parquet"),
        ({"kind": "jsonl"}, "data.train.0", "line 1 is not JSON"),
        ({"validation": ["{text}/0001.txt"]}, "data.validation", "is among data.train too"),
        ({"validation": ["{text}/none.txt"]}, "data.validation.0", "no such file"),
    ],
)
def test_unusable_data_is_refused_with_its_field(
    tmp_path: Path, changes: dict[str, Any], field: str, problem: str
) -> None:
    if isinstance(changes.get("validation"), list):
        changes = {"validation": [path.format(text=tmp_path / "text") for path in changes["validation"]]}
    with pytest.raises(DataError, match=problem) as caught:
        prepare(config(made_corpus(tmp_path / "text"), **changes), tmp_path / "out", 7)
    assert caught.value.field == field
    assert not (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("texts", "validation", "field", "problem"),
    [
        (["", " \n"], 0.1, "data.train", "has no text"),
        (["one short text"], 0.1, "data.validation", "single document"),
        (["", "\n\n"], ["full.txt"], "data.train", "no text"),
        (["full"] * 3, ["blank.txt"], "data.validation", "has no text"),
    ],
)
def test_empty_and_single_documents(
    tmp_path: Path, texts: list[str], validation: Any, field: str, problem: str
) -> None:
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.text").write_text(made_text(1, 3000) if text == "full" else text)
    (tmp_path / "full.txt").write_text(made_text(2, 3000))
    (tmp_path / "blank.txt").write_text(" \n")
    if isinstance(validation, list):
        validation = [f"{tmp_path}/{name}" for name in validation]
    for tokenizer in ({"kind": "bytes"}, {"vocab_size": 270}):
        with pytest.raises(DataError, match=problem) as caught:
            prepare(config(f"{tmp_path}/*.text", validation=validation, tokenizer=tokenizer), tmp_path / "out", 7)
        assert caught.value.field == field


def test_batches_read_what_was_prepared(tmp_path: Path) -> None:
    asked = config(made_corpus(tmp_path / "text"))
    prepared = prepare(asked, tmp_path / "out", 7)
    batches = TokenBatches(tmp_path / "out", "train", 32, seed=3)
    assert batches.samples_per_epoch == (prepared.train.tokens - 1) // 32
    stream = np.concatenate(documents_of(prepared, "train"))
    rows = batches.rows(range(batches.samples_per_epoch))
    assert rows.shape == (batches.samples_per_epoch, 33)
    expected = np.lib.stride_tricks.sliding_window_view(stream, 33)[::32]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, expected.tolist()))


def test_the_file_list_does_not_depend_on_how_it_is_named(tmp_path: Path) -> None:
    train = made_corpus(tmp_path / "text", files=3)
    names = [file.name for file in find_files([train], "data.train")]
    assert names == [file.name for file in find_files(sorted(names), "data.train")]
