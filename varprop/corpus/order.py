"""An order of any number of items without a table of them: the place of an item is computed when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

N_ROUNDS = 8
"""Rounds of the permutation: each half is changed four times."""


def permuted(numbers: np.ndarray, size: int, key: Sequence[int]) -> np.ndarray:
    """Images, int64, of `numbers` under a permutation of 0 .. size - 1 that is drawn by `key`.

    A number is the pair (left, right) of its remainder and quotient by n_left = ceil(sqrt(size)). Each round adds a
    hash of one half to the other one, modulo its range: a bijection of the pairs. A pair beyond `size`, at most one
    in sqrt(size), goes through the rounds again, until it is below. Memory and time grow with len(numbers) alone.

    numbers: integers in 0 .. size - 1, any shape. size: at least 1, below 2^62. key: integers >= 0. Exact: every image
    occurs once. Over keys every image of a number is as likely as any other; whole orders are close to uniform, not
    exactly, and of a few numbers some orders are plainly more likely than others. Source: Black and Rogaway, Ciphers
    with Arbitrary Finite Domains (2002), generalised Feistel and cycle walking; the hash is the finaliser of SplitMix64
    (Steele et al. 2014).
    Checked by: tests/corpus/test_order.py.

    >>> sorted(permuted(np.arange(5), 5, [0, 1]).tolist())
    [0, 1, 2, 3, 4]
    """
    n_left = math.isqrt(size - 1) + 1
    ranges = np.uint64(n_left), np.uint64(-(-size // n_left))
    keys = np.random.SeedSequence(list(key)).generate_state(N_ROUNDS, np.uint64)
    images = np.array(numbers, dtype=np.uint64).ravel()
    outside = np.ones(images.shape, dtype=bool)
    while outside.any():
        halves = [images[outside] % ranges[0], images[outside] // ranges[0]]
        for index, round_key in enumerate(keys):
            one = index % 2
            halves[one] = (halves[one] + _hash(halves[1 - one] + round_key) % ranges[one]) % ranges[one]
        images[outside] = halves[0] + ranges[0] * halves[1]
        outside = images >= size
    return images.astype(np.int64).reshape(np.shape(numbers))


def _hash(x: np.ndarray) -> np.ndarray:
    """64 mixed bits of each 64-bit integer (modulo 2^64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
