"""Tokens: lossless, deterministic, one end-of-document token, readable by other software."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from parallelism.data.config import TokenizerConfig
from parallelism.data.errors import DataError
from parallelism.data.readers import Document
from parallelism.data.tokenizer import END_OF_DOCUMENT, byte_tokenizer, load_tokenizer, read_tokenizer, train_bpe

TEXTS = [Path(__file__).read_text(), Path(np.__file__).read_text()]
HARD = ["", " a\n\n\tb  ", "Größe 😀 \u200b\x00", f"text that spells {END_OF_DOCUMENT} itself", "\r\n" * 3]


def document(text: str) -> Document:
    return Document(text, text.encode())


def bpe(vocab_size: int):
    return train_bpe(TokenizerConfig(vocab_size=vocab_size), TEXTS)


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_every_text_comes_back_and_ends_with_one_token(kind: str) -> None:
    tokenizer = bpe(400) if kind == "bpe" else byte_tokenizer()
    for text, tokens in zip(HARD, tokenizer.encode([document(text) for text in HARD]), strict=True):
        assert tokens[-1] == tokenizer.end_of_document_id
        assert (tokens[:-1] != tokenizer.end_of_document_id).all()
        assert tokenizer.decode(tokens[:-1]) == text
        assert tokens.dtype == np.uint16
        assert tokens.max() < tokenizer.vocab_size


def test_training_is_deterministic_and_does_not_depend_on_order() -> None:
    first, again, turned = bpe(500), bpe(500), train_bpe(TokenizerConfig(vocab_size=500), TEXTS[::-1])
    assert first.to_json() == again.to_json() == turned.to_json()
    assert first.vocab_size == 500


def test_more_tokens_mean_shorter_text() -> None:
    lengths = [len(bpe(size).encode([document(TEXTS[1])])[0]) for size in (257, 300, 800)]
    assert lengths[0] == len(TEXTS[1].encode()) + 1  # 256 bytes and the end: nothing merged
    assert lengths[0] > 1.2 * lengths[1] > 1.2 * lengths[2]


def test_a_vocabulary_the_text_cannot_fill_is_refused_with_what_it_can() -> None:
    with pytest.raises(DataError, match=r"yields only (\d+) tokens") as caught:
        train_bpe(TokenizerConfig(vocab_size=5000), ["low lower lowest"])
    assert caught.value.field == "data.tokenizer.vocab_size"
    # l·o, lo·w, Ġ·low, Ġlow·e: "e" follows "low" in two of the three words.
    assert "only 261 tokens" in str(caught.value)
    assert train_bpe(TokenizerConfig(vocab_size=261), ["low lower lowest"]).vocab_size == 261


def test_raw_bytes_are_the_tokens_and_the_json_says_the_same(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    data = "".join(map(chr, range(0x300)))
    (tokens,) = tokenizer.encode([document(data)])
    assert tokens[:-1].tolist() == list(data.encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (257, 256)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    read = read_tokenizer(tmp_path / "tokenizer.json", tokenizer.end_of_document)
    assert read.encode([document(data)])[0].tolist() == tokens.tolist()


def test_other_software_reads_the_json_alike(tmp_path: Path) -> None:
    tokenizer = bpe(400)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(TEXTS[1]).ids == tokenizer.encode([document(TEXTS[1])])[0][:-1].tolist()


def write(path: Path, tokenizer: Tokenizer) -> TokenizerConfig:
    tokenizer.save(str(path))
    return TokenizerConfig(kind="file", path=str(path))


def words(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 70_000}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_a_given_tokenizer_is_used_without_its_truncation_and_templates(tmp_path: Path) -> None:
    given = Tokenizer.from_str(bpe(300).to_json())
    given.enable_truncation(4)
    given.enable_padding(length=64)
    tokenizer = load_tokenizer(write(tmp_path / "t.json", given))
    (tokens,) = tokenizer.encode([document(TEXTS[0])])
    assert tokenizer.decode(tokens[:-1]) == TEXTS[0]


def test_the_vocabulary_counts_to_the_largest_number_and_the_end_is_found(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "t.json", words("</s>", "<mine>")))
    assert tokenizer.vocab_size == 70_001
    assert tokenizer.dtype is np.int32
    assert tokenizer.end_of_document == "</s>"
    config = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"), end_of_document="<mine>")
    assert load_tokenizer(config).end_of_document_id == 4  # the library numbers added tokens from the vocabulary's size


def test_files_that_hold_no_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has none of") as caught:
        load_tokenizer(write(tmp_path / "t.json", words()))
    assert caught.value.field == "data.tokenizer.path"
    config = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"), end_of_document="<no>")
    with pytest.raises(DataError, match="has no such token") as caught:
        load_tokenizer(config)
    assert caught.value.field == "data.tokenizer.end_of_document"
    for content in ("not json", json.dumps({"model": {"type": "BPE"}})):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
            load_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "t.json")))
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(TokenizerConfig(kind="file", path=str(tmp_path / "none.json")))
