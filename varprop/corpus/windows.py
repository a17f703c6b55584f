"""Windows of a text: non-overlapping runs of tokens, in an order that is drawn once per epoch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from varprop.corpus.order import permuted
from varprop.errors import ArgumentError, require


def n_windows(tokens: np.ndarray, n_tokens: int) -> int:
    """Non-overlapping windows of `n_tokens` inputs, each with the token that follows it, in a token array.

    Raises `ArgumentError` if the text is shorter than one of them, or n_tokens is below 1.

    >>> n_windows(np.arange(9), 4)
    2
    """
    require(n_tokens >= 1, ArgumentError, "n_tokens", n_tokens, "outside the domain", "an integer >= 1")
    size = max(0, (len(tokens) - 1) // n_tokens)
    wrong = f"too long for a text of {len(tokens)} tokens"
    require(size > 0, ArgumentError, "n_tokens", n_tokens, wrong, "a shorter sequence")
    return size


def window_starts(tokens: np.ndarray, n_tokens: int, seed: int, numbers: range | np.ndarray) -> np.ndarray:
    """First positions, int64, of the windows with these numbers in the order of (seed, epoch).

    Each epoch has every window once; number i belongs to epoch i // n_windows. No table of the order is kept, whatever
    the length of the text (`order.permuted`). Raises `ArgumentError` if the text is shorter than one window.

    >>> sorted(window_starts(np.arange(9), 4, 0, range(2)).tolist())
    [0, 4]
    """
    size = n_windows(tokens, n_tokens)
    epochs, places = np.divmod(np.asarray(numbers, dtype=np.int64), size)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        places[here] = permuted(places[here], size, (seed, int(epoch)))
    return places * n_tokens


def windows(tokens: np.ndarray, starts: Iterable[int], length: int) -> np.ndarray:
    """Token ids (len(starts), length), int64.

    >>> windows(np.arange(9), [0, 4], 3).tolist()
    [[0, 1, 2], [4, 5, 6]]
    """
    return np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)
