"""A shuffled order that needs no memory: keyed permutations of any size. Torch-free.

A Feistel network (Luby and Rackoff 1988) permutes the numbers of 2k bits; numbers outside [0, size) are sent through
it again until they fall inside (cycle walking: Black and Rogaway 2002), which permutes [0, size) itself.
"""

import hashlib

import numpy as np

ROUNDS = 6
SMALLEST_HALF_BITS = 2


def permute(indices: np.ndarray, size: int, *key: int) -> np.ndarray:
    """Where a permutation of [0, size) that depends on ``key`` sends ``indices`` [n]; result [n] int64.

    The same on every machine and at every version of numpy.
    """
    half_bits = max(SMALLEST_HALF_BITS, -(-(size - 1).bit_length() // 2))
    round_keys = [_round_key(number, key) for number in range(ROUNDS)]
    result = _feistel(indices.astype(np.uint64), half_bits, round_keys)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], half_bits, round_keys)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _round_key(number: int, key: tuple[int, ...]) -> np.uint64:
    text = ",".join(str(part) for part in (number, *key))
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _feistel(values: np.ndarray, half_bits: int, round_keys: list[np.uint64]) -> np.ndarray:
    """One permutation of the numbers of ``2 * half_bits`` bits; values [n] uint64."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit; overflow intended."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
