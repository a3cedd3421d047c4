"""What a job's data is, found out before the job is queued. Torch-free.

Small corpora are prepared as a rehearsal and thrown away, so that every error there is shows at once; middling ones
are read through; of large ones the first documents of a few files are read.
"""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from parallelism.data.config import DataConfig
from parallelism.data.errors import DataError
from parallelism.data.files import ALLOWED_PROTOCOLS, absolute
from parallelism.data.prepare import Corpus, prepare, survey_corpus, too_short
from parallelism.data.prepared import SPLITS, Split
from parallelism.data.tokenizer import DEFAULT_VOCAB_SIZE, load_tokenizer

__all__ = ["ALLOWED_PROTOCOLS", "CorpusFacts", "absolute", "inspect"]

REHEARSED_BYTES = 1 << 20
SURVEYED_BYTES = 32 << 20
LOOKED_INTO_FILES = 8
LOOKED_INTO_DOCUMENTS = 16


@dataclass(frozen=True)
class CorpusFacts:
    """The corpus of a job: number of input files, their stored bytes, and bytes of text.

    ``text_bytes`` is estimated where files are compressed (``measured`` is False).
    """

    files: int
    bytes: int
    text_bytes: int
    measured: bool


def inspect(config: DataConfig, seed: int = 0) -> CorpusFacts:
    """Check that the data can be used, reading no more than 32 MiB, and say how much there is.

    Raises :class:`parallelism.data.errors.DataError` (a ``ValueError`` with field, value and remedy) for missing
    files, patterns without a match, empty corpora, protocols and kinds not allowed, undecodable text, missing fields,
    corpora that cannot be split, vocabularies and sequences too large for the text, as far as the part read shows it.
    """
    corpus = Corpus.find(config)
    stored = sum(file.size for file in corpus.files)
    estimate = sum(file.text_bytes for file in corpus.files)
    if config.tokenizer.kind == "file":
        load_tokenizer(config.tokenizer)
    if estimate > SURVEYED_BYTES:
        _look_into(corpus)
        return CorpusFacts(len(corpus.files), stored, estimate, measured=False)
    measured = _rehearse(config, seed) if estimate <= REHEARSED_BYTES else _read_through(corpus, seed)
    return CorpusFacts(len(corpus.files), stored, measured, measured=True)


def _rehearse(config: DataConfig, seed: int) -> int:
    """Prepare the data and throw it away; returns bytes of text."""
    with tempfile.TemporaryDirectory(prefix="espalier-rehearsal-") as directory:
        prepared = prepare(config, Path(directory), seed)
    return sum(prepared.splits[split].bytes for split in SPLITS)


def _read_through(corpus: Corpus, seed: int) -> int:
    """Read every document and refuse what can be shown not to fit without tokenizing; returns bytes of text."""
    config = corpus.config
    found = survey_corpus(corpus, seed, lambda phase, seen: None)
    if isinstance(config.validation, float):
        documents, size = found.below(found.threshold(config.validation))
        trained = (found.documents - documents, found.bytes - size)
    else:
        trained = (found.documents, found.bytes)
        sizes = [len(document.data) for document in corpus.documents(corpus.validation)]
        documents, size = len(sizes), sum(sizes)
    _check_bound(config, "train", *trained)
    _check_bound(config, "validation", documents, size)
    _check_vocabulary(config, trained[1])
    return trained[1] + size


def _check_bound(config: DataConfig, split: Split, documents: int, size: int) -> None:
    """A token is at least one byte, but for the one that ends a document."""
    needed = config.sequence_length + 1
    if documents + size < needed:
        raise too_short(config, split, f"only {size} bytes of text", needed)


def _check_vocabulary(config: DataConfig, trained_bytes: int) -> None:
    """Every merge of BPE takes at least one token off a text that begins as single bytes."""
    wanted = config.tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
    seen = min(trained_bytes, config.tokenizer.training_bytes)
    if config.tokenizer.kind == "bpe" and wanted > 257 + seen:
        problem = (
            f"the tokenizer sees {seen} bytes of text, too few for as many tokens; ask for fewer or give more text"
        )
        raise DataError("data.tokenizer.vocab_size", wanted, problem)


def _look_into(corpus: Corpus) -> None:
    """Read the first documents of a few files, so that a wrong kind, field or encoding shows."""
    for file in corpus.files[:LOOKED_INTO_FILES]:
        for _ in itertools.islice(corpus.documents([file]), LOOKED_INTO_DOCUMENTS):
            pass
