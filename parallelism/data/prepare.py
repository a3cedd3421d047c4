"""Text into tokens on disk, once per job. Torch-free; documents are streamed, so memory does not grow with the corpus.

Two passes over the files: the first finds the held-out documents and the tokenizer's sample
(:mod:`parallelism.data.split`), the second writes tokens (:mod:`parallelism.data.indexed`). Everything goes into a new
folder and becomes true by ``manifest.json``, written last: a killed preparation leaves nothing that counts. Data once
prepared for a (config, seed) stays as it is, even where the files behind it change: a job that is continued trains on
the text that it began with.
"""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.files import SourceFile, find_files
from parallelism.data.indexed import IndexedWriter, writing
from parallelism.data.prepared import SPLITS, TOKENIZER, PreparedData, Split, SplitFacts
from parallelism.data.readers import Document, read_documents, reader_of
from parallelism.data.split import HOLD_OUT_NOTHING, CorpusDigest, Survey, document_key
from parallelism.data.tokenizer import TextTokenizer, byte_tokenizer, load_tokenizer, train_bpe
from parallelism.data.turn import PATIENCE_SECONDS, Turn, take_turn

FORMAT = 1
"""Part of every request's hash: raise it when the same request would give other tokens."""

BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096
FORGOTTEN_SECONDS = 24 * 3600.0

Progress = Callable[[str, int], None]
"""Called with the phase (``survey`` or ``tokenize``) and the bytes of text it has seen."""


def prepare(
    config: DataConfig,
    directory: Path,
    seed: int,
    progress: Progress | None = None,
    patience: float = PATIENCE_SECONDS,
) -> PreparedData:
    """Prepare the data of a job in ``directory``, or find it prepared there.

    The same config and seed give the same files, byte for byte. Any number of processes may call it at once; one does
    the work and all return its result; one that shows no life for ``patience`` seconds is waited for no longer.
    Raises :class:`DataError` for data that cannot be used.
    """
    request = request_digest(config, seed)
    prepared = find_prepared(directory, request)
    if prepared is None:
        directory.mkdir(parents=True, exist_ok=True)
        with take_turn(directory, lambda: find_prepared(directory, request) is not None, patience) as turn:
            prepared = find_prepared(directory, request) or _prepare(config, directory, seed, turn, progress)
    check_lengths(prepared, config)
    return prepared


def request_digest(config: DataConfig, seed: int) -> str:
    """Hash of everything asked for that decides the tokens; the length of a sequence does not."""
    asked = config.model_dump_json(exclude={"sequence_length"})
    return hashlib.sha256(f"{FORMAT}\n{seed}\n{asked}".encode()).hexdigest()


def find_prepared(directory: Path, request: str) -> PreparedData | None:
    """Complete data in ``directory`` that answers the request."""
    try:
        prepared = PreparedData.load(directory)
    except ValueError:
        return None
    return prepared if prepared.request == request else None


def check_lengths(prepared: PreparedData, config: DataConfig) -> None:
    """Raise :class:`DataError` where a split is shorter than one sequence and the token after it."""
    for split in SPLITS:
        tokens, needed = prepared.splits[split].tokens, config.sequence_length + 1
        if tokens < needed:
            raise too_short(config, split, f"{tokens} tokens", needed)


def no_text(config: DataConfig, split: Split) -> DataError:
    """The error for a split without a document."""
    value = config.train if split == "train" else config.validation
    return DataError(f"data.{split}", value, "has no text; every file is empty or white space")


def too_short(config: DataConfig, split: Split, has: str, needed: int) -> DataError:
    """The error for a split that has, say, ``12 tokens`` where a sequence needs 257."""
    value = config.train if split == "train" else config.validation
    remedy = "give more text, " + ("" if split == "train" else "hold out more, ") + "or lower data.sequence_length"
    return DataError(f"data.{split}", value, f"the {split} split has {has}, one sequence needs {needed}; {remedy}")


def _prepare(config: DataConfig, directory: Path, seed: int, turn: Turn, progress: Progress | None) -> PreparedData:
    _remove_leftovers(directory, everything=turn.held)

    def report(phase: str, seen_bytes: int) -> None:
        turn.alive()
        if progress is not None:
            progress(phase, seen_bytes)

    with _new_folder(directory, locked=turn.held) as folder:
        built = build(config, directory, folder.name, seed, report)
        check_lengths(built, config)
        faster = find_prepared(directory, built.request)
        if faster is not None:  # by a process that was done waiting for us
            shutil.rmtree(folder)
            return faster
        built.write()
    return built


# The build


@dataclass(frozen=True)
class Corpus:
    """The input files of a job. ``validation`` is empty where a fraction of the training documents is held out."""

    config: DataConfig
    train: list[SourceFile]
    validation: list[SourceFile]

    @classmethod
    def find(cls, config: DataConfig) -> "Corpus":
        """Look the files up. Raises :class:`DataError` for what cannot be found or is both trained on and held out."""
        reader_of(config.kind)
        train = find_files(config.train, "data.train")
        held_out = config.validation if isinstance(config.validation, list) else []
        validation = find_files(held_out, "data.validation")
        trained_on = {file.name for file in train}
        both = sorted(file.name for file in validation if file.name in trained_on)
        if both:
            raise DataError("data.validation", both[0], "is among data.train too; held-out text must not be trained on")
        return cls(config, train, validation)

    @property
    def files(self) -> list[SourceFile]:
        """All files."""
        return self.train + self.validation

    def documents(self, files: list[SourceFile]) -> Iterator[Document]:
        """The documents of some of the files, in order."""
        return read_documents(files, self.config, len(self.files))


def build(config: DataConfig, directory: Path, folder: str, seed: int, report: Progress) -> PreparedData:
    """Write tokenizer and tokens into ``directory / folder``; the caller writes the manifest."""
    started = time.monotonic()
    corpus = Corpus.find(config)
    threshold, digest, tokenizer = _survey_and_tokenizer(corpus, seed, report)
    (directory / folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    splits, read = _write_tokens(corpus, directory / folder, tokenizer, seed, threshold, report)
    if digest not in (None, read):
        raise DataError("data.train", config.train, "the files changed while they were read; run again when they rest")
    return PreparedData(
        request=request_digest(config, seed),
        corpus=read,
        seed=seed,
        folder=folder,
        files={path.name: path.stat().st_size for path in sorted((directory / folder).iterdir())},
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        end_of_document_id=tokenizer.end_of_document_id,
        splits=splits,
        input_files=len(corpus.files),
        input_bytes=sum(file.size for file in corpus.files),
        seconds=time.monotonic() - started,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        directory=directory,
    )


def survey_corpus(corpus: Corpus, seed: int, report: Progress) -> Survey:
    """The first pass: keys and sizes of the training documents, and the tokenizer's sample.

    Raises :class:`DataError` where there is no document.
    """
    tokenizer = corpus.config.tokenizer
    found = Survey(seed, tokenizer.training_bytes if tokenizer.kind == "bpe" else 0)
    reported = 0
    for document in corpus.documents(corpus.train):
        found.add(document)
        if found.bytes - reported >= BATCH_BYTES:
            reported = found.bytes
            report("survey", reported)
    report("survey", found.bytes)
    if not found.documents:
        raise no_text(corpus.config, "train")
    return found


def _survey_and_tokenizer(corpus: Corpus, seed: int, report: Progress) -> tuple[int, str | None, TextTokenizer]:
    """The held-out threshold, the digest of the documents if a pass over them was needed, and the tokenizer."""
    config = corpus.config
    fraction = config.validation if isinstance(config.validation, float) else None
    if fraction is None and config.tokenizer.kind != "bpe":
        return HOLD_OUT_NOTHING, None, _ready_tokenizer(config)
    found = survey_corpus(corpus, seed, report)
    threshold = HOLD_OUT_NOTHING if fraction is None else found.threshold(fraction)
    if config.tokenizer.kind != "bpe":
        return threshold, found.digest.hexdigest(), _ready_tokenizer(config)
    return threshold, found.digest.hexdigest(), train_bpe(config.tokenizer, found.sample(threshold))


def _ready_tokenizer(config: DataConfig) -> TextTokenizer:
    return byte_tokenizer() if config.tokenizer.kind == "bytes" else load_tokenizer(config.tokenizer)


def _write_tokens(
    corpus: Corpus, folder: Path, tokenizer: TextTokenizer, seed: int, threshold: int, report: Progress
) -> tuple[dict[Split, SplitFacts], str]:
    """The second pass: tokens of both splits, and the digest of the training documents."""
    digest = CorpusDigest()
    text_bytes: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    with ExitStack() as files:
        writers = {split: files.enter_context(writing(folder / split, tokenizer.dtype)) for split in SPLITS}
        for batch in _batched(_assigned(corpus, seed, threshold, digest)):
            tokens = tokenizer.encode([document for _, document in batch])
            for split in SPLITS:
                chosen = [index for index, (side, _) in enumerate(batch) if side == split]
                writers[split].add([tokens[index] for index in chosen])
                text_bytes[split] += sum(len(batch[index][1].data) for index in chosen)
            report("tokenize", sum(text_bytes.values()))
        for split in SPLITS:
            if not writers[split].documents:
                raise no_text(corpus.config, split)
            writers[split].finish()
    return {split: _facts(writers[split], text_bytes[split]) for split in SPLITS}, digest.hexdigest()


def _facts(writer: IndexedWriter, text_bytes: int) -> SplitFacts:
    return SplitFacts(documents=writer.documents, tokens=writer.tokens, bytes=text_bytes, sha256=writer.sha256)


def _assigned(corpus: Corpus, seed: int, threshold: int, digest: CorpusDigest) -> Iterator[tuple[Split, Document]]:
    """Every document with its side of the split; the digest takes in those of ``data.train``."""
    for document in corpus.documents(corpus.train):
        key = document_key(seed, document.data)
        digest.add(key)
        yield ("validation" if key < threshold else "train"), document
    for document in corpus.documents(corpus.validation):
        yield "validation", document


def _batched(documents: Iterable[tuple[Split, Document]]) -> Iterator[list[tuple[Split, Document]]]:
    """Batches of about 4 MiB of text: enough to keep all cores busy, little to hold."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for split, document in documents:
        batch.append((split, document))
        size += len(document.data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Folders


@contextmanager
def _new_folder(directory: Path, locked: bool) -> Iterator[Path]:
    """A folder of our own; removed again where the build fails."""
    folder = directory / f"{'turn' if locked else 'free'}-{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_leftovers(directory: Path, everything: bool) -> None:
    """Remove folders that no manifest names and nobody works in.

    Folders made by holders of the lock belong to dead builds if we hold it (``everything``). Those made without it may
    be alive: they stay for a day.
    """
    try:
        current = PreparedData.load(directory).folder
    except ValueError:
        current = ""
    for folder in directory.iterdir():
        if folder.name == current or not folder.is_dir():
            continue
        forgotten = time.time() - _last_touched(folder) > FORGOTTEN_SECONDS
        if (folder.name.startswith("turn-") and everything) or (folder.name.startswith("free-") and forgotten):
            shutil.rmtree(folder, ignore_errors=True)


def _last_touched(folder: Path) -> float:
    return max(os.stat(path).st_mtime for path in (folder, *folder.iterdir()))
