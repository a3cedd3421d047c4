"""Which documents are held out, and which ones the tokenizer is trained on. Torch-free.

Every document has a key, a 64-bit hash of (seed, its bytes). The documents with the smallest keys are held out, those
with the largest are the tokenizer's sample, so the two never meet and one pass over the corpus finds both. Equal
documents have equal keys: a document that occurs twice is never both trained on and held out.
"""

import hashlib
import heapq

import numpy as np

from parallelism.data.errors import DataError
from parallelism.data.readers import Document

BUCKET_BITS = 20
"""Bytes are added up per key range, not per document, so that memory does not grow with the corpus."""

HOLD_OUT_NOTHING = 0


def document_key(seed: int, data: bytes) -> int:
    """The document's 64-bit key."""
    hash_key = (seed % (1 << 128)).to_bytes(16, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=hash_key).digest(), "little")


class CorpusDigest:
    """A running hash of the keys of all documents in order: whether two passes saw the same corpus."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, key: int) -> None:
        """Take in the next document."""
        self._hash.update(key.to_bytes(8, "little"))

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hash.hexdigest()


class Survey:
    """What one pass over the training documents finds out; at most ``sample_bytes`` of text is kept."""

    def __init__(self, seed: int, sample_bytes: int) -> None:
        self.documents = 0
        self.bytes = 0
        self.digest = CorpusDigest()
        self._seed = seed
        self._sample_bytes = sample_bytes
        self._bucket_bytes = np.zeros(1 << BUCKET_BITS, np.int64)
        self._bucket_documents = np.zeros(1 << BUCKET_BITS, np.int64)
        self._sample: list[tuple[int, int, bytes]] = []  # a heap: the smallest key first; the number breaks ties
        self._sampled_bytes = 0

    def add(self, document: Document) -> None:
        """Take in one document."""
        key = document_key(self._seed, document.data)
        bucket = key >> (64 - BUCKET_BITS)
        self._bucket_bytes[bucket] += len(document.data)
        self._bucket_documents[bucket] += 1
        self.documents += 1
        self.bytes += len(document.data)
        self.digest.add(key)
        self._keep(key, document.data)

    def _keep(self, key: int, data: bytes) -> None:
        """Keep the documents with the largest keys as long as they fit in the sample."""
        if not self._sample_bytes:
            return
        head = data[: self._sample_bytes]
        heapq.heappush(self._sample, (key, self.documents, head))
        self._sampled_bytes += len(head)
        while self._sampled_bytes > self._sample_bytes and len(self._sample) > 1:
            self._sampled_bytes -= len(heapq.heappop(self._sample)[2])

    def threshold(self, fraction: float) -> int:
        """The key below which documents are held out: see :func:`held_out_threshold`.

        Raises :class:`DataError` where the corpus is a single document.
        """
        if np.count_nonzero(self._bucket_bytes) < 2:
            problem = (
                "the training text is a single document, so none can be held out; name validation files, give more"
                " files, or set data.documents to passage or line"
            )
            raise DataError("data.validation", fraction, problem)
        return held_out_threshold(self._bucket_bytes, fraction)

    def below(self, threshold: int) -> tuple[int, int]:
        """Documents and bytes with keys under the threshold."""
        buckets = threshold >> (64 - BUCKET_BITS)
        return int(self._bucket_documents[:buckets].sum()), int(self._bucket_bytes[:buckets].sum())

    def sample(self, threshold: int) -> list[str]:
        """The tokenizer's sample out of the training split, in an order that follows from the documents alone.

        A document cut to fit may end in part of a character; that part is dropped.
        """
        kept = sorted(entry for entry in self._sample if entry[0] >= threshold)
        return [data.decode("utf-8", errors="ignore") for _, _, data in kept]


def held_out_threshold(bucket_bytes: np.ndarray, fraction: float) -> int:
    """The key that holds out as close to ``fraction`` of the bytes as whole documents allow.

    ``bucket_bytes`` [2^b] int64 is the corpus by the leading b bits of the key, with two or more filled buckets. At
    least one document is held out, and at least one is left.
    """
    filled = np.flatnonzero(bucket_bytes)
    assert len(filled) >= 2, "a corpus in one bucket cannot be split"
    held_out = np.cumsum(bucket_bytes[filled[:-1]])
    best = int(np.argmin(np.abs(held_out - fraction * bucket_bytes.sum())))
    bits = len(bucket_bytes).bit_length() - 1
    return (int(filled[best]) + 1) << (64 - bits)
