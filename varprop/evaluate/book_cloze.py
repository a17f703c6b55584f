"""Two questions made from held-out books: which passage goes on here, and which word comes next."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xarray as xr
from tokenizers import Tokenizer

from varprop.errors import ArgumentError, require
from varprop.evaluate.common import dataset, share
from varprop.evaluate.score import score
from varprop.nn import Transformer

N_CHOICES = 4
TASKS = ("continuation", "last_word")
MIN_LETTERS = 5
"""Of the word asked for: shorter ones are mostly function words."""
WORD_START, WORD_REST = re.compile(r"Ġ[A-Za-z]+"), re.compile(r"[A-Za-z]+")


def cloze(
    model: Transformer,
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    *,
    document_end: int,
    n_items: int = 2000,
    n_context: int = 128,
    n_next: int = 32,
    seed: int = 0,
) -> xr.Dataset:
    """Share of right answers to two questions about books that were held out.

    `continuation`: after n_context tokens, the true next n_next against those at three other places of the same book,
    by log-probability; chance is 1/4. `last_word`: after n_context tokens, a word of five or more letters that occurs
    among them; right if each of its tokens is the likeliest.

    tokens: ids of the books; tokenizer: theirs, a byte-level one; document_end: the id behind each book. n_items: of
    each question, drawn by `seed`.
    Variables: cloze_accuracy and cloze_accuracy_stderr over items (cloze_task), cloze_items.
    Raises as `score` does, and `ArgumentError` where the books hold too few passages.
    """
    rng = np.random.default_rng([seed, n_items, n_context, n_next])
    require(n_items >= 2, ArgumentError, "n_items", n_items, "too small", "an integer >= 2")
    for name, value in (("n_context", n_context), ("n_next", n_next)):
        require(value >= 1, ArgumentError, name, value, "too small", "an integer >= 1")
    books = books_of(tokens, document_end)
    passages = _passages(tokens, books, n_items, n_context, n_next, rng)
    sums, _ = score(model, passages, [n_next] * len(passages))
    best = sums.reshape(-1, N_CHOICES).argmax(axis=1) == 0
    asked = _last_words(tokens, books, tokenizer, n_context)
    wrong, expected = f"too many for a text with {len(asked)} repeated words", "fewer items or more text"
    require(len(asked) >= n_items, ArgumentError, "n_items", n_items, wrong, expected)
    chosen = [asked[i] for i in sorted(rng.choice(len(asked), n_items, replace=False))]
    texts = [tokens[start - n_context : end].tolist() for start, end in chosen]
    _, greedy = score(model, texts, [end - start for start, end in chosen])
    pairs = np.array([share(best, "n_items"), share(greedy, "n_items")])
    variables = {
        "cloze_accuracy": (("cloze_task",), pairs[:, 0]),
        "cloze_accuracy_stderr": (("cloze_task",), pairs[:, 1]),
        "cloze_items": (("cloze_task",), [n_items, n_items]),
    }
    coords = {"cloze_task": list(TASKS)}
    return dataset(model, variables, n_tokens=n_context, seed=seed, coords=coords)


def books_of(tokens: np.ndarray, document_end: int) -> list[tuple[int, int]]:
    """First position and end of each document, the token that ends it left out.

    >>> books_of(np.array([5, 6, 0, 7, 0, 0, 8]), 0)
    [(0, 2), (3, 4), (6, 7)]
    """
    ends = [*np.flatnonzero(tokens == document_end).tolist(), len(tokens)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end > start]


def _passages(
    tokens: np.ndarray,
    books: Sequence[tuple[int, int]],
    n_items: int,
    n_context: int,
    n_next: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    """Four sequences for each item, the true one first: a context and what follows it here or elsewhere in the book."""
    size = n_context + n_next
    # Room for three other passages that do not meet the item, wherever it lies.
    books = [(start, end) for start, end in books if end - start >= 2 * size + 4 * n_next]
    expected = f"a text with a document of at least {2 * size + 4 * n_next} tokens"
    require(len(books) > 0, ArgumentError, "tokens", len(tokens), "too short", expected)
    weights = np.array([end - start for start, end in books], dtype=float)
    sequences = []
    for book in rng.choice(len(books), n_items, p=weights / weights.sum()):
        start, end = books[book]
        at = int(rng.integers(start, end - size + 1))
        context = tokens[at : at + n_context].tolist()
        # Passages elsewhere start n_next or more before the context, or after the true continuation.
        places = np.concatenate((np.arange(start, at - n_next + 1), np.arange(at + size, end - n_next + 1)))
        others = rng.choice(places, N_CHOICES - 1, replace=False)
        sequences += [context + tokens[p : p + n_next].tolist() for p in (at + n_context, *others.tolist())]
    return sequences


def _last_words(
    tokens: np.ndarray, books: Sequence[tuple[int, int]], tokenizer: Tokenizer, n_context: int
) -> list[tuple[int, int]]:
    """First position and end of the words that occur, whole, in the n_context tokens of their book before them."""
    names = [tokenizer.id_to_token(i) or "" for i in range(1 + int(tokens.max()))]
    begins = np.array([WORD_START.fullmatch(name) is not None for name in names])[tokens]
    goes_on = np.array([WORD_REST.fullmatch(name) is not None for name in names])[tokens]
    letters = np.array([len(name.removeprefix("Ġ")) for name in names])[tokens]
    found = []
    for first, last in books:
        latest: dict[tuple[int, ...], int] = {}
        for start in (first + np.flatnonzero(begins[first:last])).tolist():
            end = start + 1
            while end < last and goes_on[end]:
                end += 1
            word = tuple(tokens[start:end].tolist())
            near = latest.get(word, first - 1) >= max(first, start - n_context)
            if near and start - n_context >= first and letters[start:end].sum() >= MIN_LETTERS:
                found.append((start, end))
            latest[word] = start
    return found
