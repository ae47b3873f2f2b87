"""Shuffles that are computed, not stored: which element lies at place i of a shuffled list of n?

A Feistel network with cycle walking gives a keyed bijection of [0, n), so that an epoch over a billion samples needs no
memory. All arithmetic is on 64-bit integers, with equal results on every machine and for every library version.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

_ROUNDS = 6


def key_of(*parts: object) -> int:
    """A 64-bit key from a seed, names and numbers, e.g. key_of(seed, "stdlib", epoch)."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def permute(places: Indices, size: int, key: int) -> Indices:
    """places [n] in [0, size) -> their images under the shuffle that `key` names, a bijection of [0, size)."""
    if size < 1 or (len(places) and (places.min() < 0 or places.max() >= size)):
        raise ValueError(f"places must lie in [0, {size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    values = places.astype(np.uint64)
    walking = np.ones(len(values), dtype=bool)
    while walking.any():  # the domain 4**half is under 4x size: a few walks bring all values back below size
        values[walking] = _feistel(values[walking], half, key)
        walking = values >= size
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, key: int) -> NDArray[np.uint64]:
    low = np.uint64((1 << half) - 1)
    left, right = values >> np.uint64(half), values & low
    for number in range(_ROUNDS):
        left, right = right, left ^ (mix(right + np.uint64((key + number * 0x9E3779B97F4A7C15) & (2**64 - 1))) & low)
    return (left << np.uint64(half)) | right


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014); arithmetic modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
