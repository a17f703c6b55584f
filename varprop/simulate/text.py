"""Real text as input: windows of a corpus, and how often they repeat their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from varprop.corpus import load_corpus, n_windows, window_starts, windows
from varprop.errors import ArgumentError, require
from varprop.simulate.inputs import positive_integer


def text_tokens(
    n_tokens: int,
    *,
    n_sequences: int,
    corpus: str | Path = "embedded",
    corpus_dir: str | Path | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Token ids (n_sequences, n_tokens), int64, of windows of a training text: `inputs` of `sample`.

    The windows do not overlap and are those of the first `n_sequences` sequences that `train.batch` would visit with
    this seed, so that fewer sequences are the first of more. corpus, corpus_dir: as of `corpus.load_corpus`; ids are
    below 8192 in the package's tokenizer. Raises `ArgumentError` for a text with fewer windows.

    >>> ids = text_tokens(16, n_sequences=2)
    >>> ids.shape, bool((ids == text_tokens(16, n_sequences=3)[:2]).all())
    ((2, 16), True)
    """
    n_tokens, n_sequences = positive_integer("n_tokens", n_tokens), positive_integer("n_sequences", n_sequences)
    seed = positive_integer("seed", seed, minimum=0)
    tokens = load_corpus(corpus, corpus_dir).train
    size = n_windows(tokens, n_tokens)
    wrong = f"more than the {size} windows of {n_tokens} tokens in the text"
    require(n_sequences <= size, ArgumentError, "n_sequences", n_sequences, wrong, f"1..{size}")
    return windows(tokens, window_starts(tokens, n_tokens, seed, range(n_sequences)), n_tokens)


def same_token(ids: Any) -> np.ndarray:
    """1.0 where two positions hold the same token: the correlation matrix of the embeddings of a text.

    ids: (..., T) to (..., T, T): `token_correlation` of `theory.predict`. Exact: embeddings of distinct tokens are
    independent and centred. The mean over sequences (their first dimension) is that of a text drawn among them.
    Checked by: tests/simulate/test_text.py.

    >>> same_token([3, 5, 3]).astype(int).tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """
    array = np.asarray(ids)
    return (array[..., :, None] == array[..., None, :]).astype(float)


def repetition(ids: Any) -> np.ndarray:
    """Share of the pairs of positions that hold the same token: sum_i n_i (n_i - 1) / (T (T - 1)), n_i counts of T.

    The unbiased estimate of sum_i p_i^2 of a text with token frequencies p_i, and exactly the token correlation of
    the embeddings at layer 0 (E x_s . x_t over s != t, divided by E |x|^2). ids: (..., T), T >= 2, to (...).
    Raises `ArgumentError` for fewer tokens. Source: Simpson 1949. Checked by: tests/simulate/test_text.py.

    >>> repetition([[3, 5, 3], [1, 2, 3]]).round(4).tolist()
    [0.3333, 0.0]
    """
    array = np.asarray(ids)
    n_tokens = array.shape[-1] if array.ndim else 0
    require(n_tokens >= 2, ArgumentError, "n_tokens", n_tokens, "too few for a pair", "at least 2 tokens")
    counts = [np.unique(row, return_counts=True)[1] for row in array.reshape(-1, n_tokens)]
    pairs = np.array([(n * (n - 1)).sum() for n in counts]).reshape(array.shape[:-1])
    return pairs / (n_tokens * (n_tokens - 1))
