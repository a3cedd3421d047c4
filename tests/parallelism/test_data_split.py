"""The held-out split and the tokenizer's sample."""

import random
from collections.abc import Iterable

import numpy as np
import pytest

from parallelism.data.errors import DataError
from parallelism.data.readers import Document
from parallelism.data.split import BUCKET_BITS, Survey, document_key, held_out_threshold


def corpus(count: int, seed: int = 0) -> list[Document]:
    """Documents of very different sizes, 50 bytes to 50 kB."""
    draw = random.Random(seed)
    sizes = [int(50 * 1000 ** draw.random()) for _ in range(count)]
    texts = [f"{number} " + "x" * size for number, size in enumerate(sizes)]
    return [Document(text, text.encode()) for text in texts]


def survey(documents: Iterable[Document], seed: int, sample_bytes: int) -> Survey:
    found = Survey(seed, sample_bytes)
    for document in documents:
        found.add(document)
    return found


def held_out(documents: list[Document], seed: int, fraction: float) -> list[Document]:
    threshold = survey(documents, seed, 0).threshold(fraction)
    return [document for document in documents if document_key(seed, document.data) < threshold]


@pytest.mark.parametrize("fraction", [0.005, 0.02, 0.3])
def test_the_held_out_share_of_bytes_is_as_asked(fraction: float) -> None:
    documents = corpus(2000)
    total = sum(len(document.data) for document in documents)
    for seed in range(10):
        share = sum(len(document.data) for document in held_out(documents, seed, fraction)) / total
        # The rule stops within half a document of the fraction; the largest is 50 kB of about 14 MB.
        assert abs(share - fraction) <= 25_050 / total


def test_the_split_follows_from_seed_and_documents_not_from_their_order() -> None:
    documents = corpus(500)
    chosen = {document.text for document in held_out(documents, 1, 0.1)}
    assert {document.text for document in held_out(documents[::-1], 1, 0.1)} == chosen
    assert {document.text for document in held_out(documents, 2, 0.1)} != chosen


def test_equal_documents_stay_on_one_side() -> None:
    documents = corpus(300)
    chosen = {document.text for document in held_out(documents * 2, 3, 0.2)}
    assert 0 < len(chosen) < 300
    assert len(held_out(documents * 2, 3, 0.2)) == 2 * len(chosen)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_both_sides_get_a_document_however_small_the_corpus(fraction: float) -> None:
    for seed in range(20):
        assert len(held_out(corpus(2), seed, fraction)) == 1


def test_the_threshold_is_the_boundary_nearest_to_the_fraction() -> None:
    bucket_bytes = np.zeros(16, np.int64)
    bucket_bytes[[2, 5, 9, 15]] = [10, 20, 30, 40]
    shift = 64 - 4
    assert held_out_threshold(bucket_bytes, 0.02) == 3 << shift
    assert held_out_threshold(bucket_bytes, 0.19) == 3 << shift  # 10 is nearer to 19 than 30
    assert held_out_threshold(bucket_bytes, 0.21) == 6 << shift
    assert held_out_threshold(bucket_bytes, 0.99) == 10 << shift  # one document always stays


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(DataError, match="single document") as caught:
        survey(corpus(1) * 3, 0, 0).threshold(0.02)
    assert caught.value.field == "data.validation"


def test_counts_below_the_threshold_are_those_held_out() -> None:
    documents = corpus(400)
    found = survey(documents, 5, 0)
    chosen = held_out(documents, 5, 0.1)
    assert found.below(found.threshold(0.1)) == (len(chosen), sum(len(document.data) for document in chosen))


def test_the_sample_is_of_training_documents_and_no_larger_than_asked() -> None:
    documents = corpus(400)
    for sample_bytes in (1000, 300_000, 10**9):
        found = survey(documents, 5, sample_bytes)
        threshold = found.threshold(0.1)
        sample = found.sample(threshold)
        training = {document.text for document in documents if document_key(5, document.data) >= threshold}
        assert all(any(whole.startswith(text) for whole in training) for text in sample)
        assert 0 < sum(len(text) for text in sample) <= sample_bytes
    assert set(sample) == training  # room for all


def test_a_document_larger_than_the_sample_is_cut_between_characters() -> None:
    text = "€" * 1000
    found = survey([Document(text, text.encode())], 0, 100)
    assert found.sample(0) == ["€" * 33]


def test_memory_does_not_grow_with_the_number_of_documents() -> None:
    assert BUCKET_BITS == 20
    found = survey((Document(str(number), str(number).encode()) for number in range(20_000)), 0, 50)
    assert found.documents == 20_000
    assert len(found._sample) <= 50
