"""Text into tokens and back: byte-level BPE trained here, raw bytes, or a given ``tokenizer.json``. Torch-free.

All three are kept as a ``tokenizer.json`` that the ``tokenizers`` and ``transformers`` libraries load.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from parallelism.data.config import TokenizerConfig
from parallelism.data.errors import DataError
from parallelism.data.files import find_files
from parallelism.data.readers import Document

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
DEFAULT_VOCAB_SIZE = 4096


class TextTokenizer:
    """A tokenizer with one token that ends every document.

    ``vocab_size`` is the largest token number plus one. ``raw_bytes`` says that token numbers are byte values, which
    are then copied instead of being looked up.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_document: str, raw_bytes: bool = False) -> None:
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = end_of_document
        self.end_of_document_id = vocabulary[end_of_document]
        self._raw_bytes = raw_bytes
        self._json = tokenizer.to_str(pretty=True)
        # Text that happens to spell the end-of-document token is text like any other.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """How tokens are stored: the choice of ``megatron.core.datasets.indexed_dataset.DType.optimal_dtype``."""
        return np.uint16 if self.vocab_size < 65500 else np.int32

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """Tokens of every document, each with the end-of-document token behind it; on all cores."""
        if self._raw_bytes:
            tokens = [np.frombuffer(document.data, np.uint8) for document in documents]
        else:
            texts = [document.text for document in documents]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            tokens = [np.array(encoding.ids, self.dtype) for encoding in encodings]
        return [np.append(part.astype(self.dtype), self.dtype(self.end_of_document_id)) for part in tokens]

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of the tokens; the end-of-document token becomes its name."""
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False))

    def to_json(self) -> str:
        """The content of ``tokenizer.json``."""
        return self._json


def train_bpe(config: TokenizerConfig, texts: Iterable[str]) -> TextTokenizer:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in Radford et al. 2019) learnt from ``texts``.

    Only pairs that occur at least twice are merged. Raises :class:`DataError` where the texts do not yield as many
    tokens as asked: the model would hold rows that no text can reach.
    """
    vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learnt = tokenizer.get_vocab_size()
    if learnt < vocab_size:
        problem = f"the training text yields only {learnt} tokens; ask for {learnt} or fewer, or give more text"
        raise DataError("data.tokenizer.vocab_size", vocab_size, problem)
    return TextTokenizer(tokenizer, END_OF_DOCUMENT)


def byte_tokenizer() -> TextTokenizer:
    """Tokens 0 to 255 are the bytes of UTF-8, 256 ends a document."""
    tokenizer = _byte_level(models.BPE(vocab={sign: byte for byte, sign in enumerate(_byte_signs())}, merges=[]))
    tokenizer.add_special_tokens([END_OF_DOCUMENT])
    return TextTokenizer(tokenizer, END_OF_DOCUMENT, raw_bytes=True)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_signs() -> list[str]:
    """The printable sign that stands for each byte value in byte-level vocabularies (GPT-2's ``bytes_to_unicode``).

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def load_tokenizer(config: TokenizerConfig) -> TextTokenizer:
    """The tokenizer of kind ``file``. Raises :class:`DataError` for files that hold none or name no end of document."""
    assert config.path, "TokenizerConfig refuses kind: file without a path"
    field = "data.tokenizer.path"
    (file, *_) = find_files([config.path], field)
    with file.open() as stream:
        content = stream.read()
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except ValueError as error:
        raise DataError(field, config.path, f"is not a tokenizer.json of the tokenizers library: {error}") from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if config.end_of_document and config.end_of_document not in vocabulary:
        problem = f"{config.path} has no such token; name one that it has"
        raise DataError("data.tokenizer.end_of_document", config.end_of_document, problem)
    ends = [token for token in (config.end_of_document, *KNOWN_ENDS) if token in vocabulary]
    if not ends:
        problem = f"has none of {', '.join(KNOWN_ENDS)}; name its token in data.tokenizer.end_of_document"
        raise DataError(field, config.path, problem)
    return TextTokenizer(tokenizer, str(ends[0]))


def read_tokenizer(path: Path, end_of_document: str) -> TextTokenizer:
    """A tokenizer that :func:`parallelism.data.prepare.prepare` wrote."""
    return TextTokenizer(Tokenizer.from_buffer(path.read_bytes()), end_of_document)
