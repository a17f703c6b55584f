"""BLiMP (arXiv 1912.00582): of two sentences that differ in one point of grammar, is the right one the likelier?"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from tokenizers import Tokenizer

from varprop.errors import ArgumentError, require
from varprop.evaluate.common import dataset, share, shares
from varprop.evaluate.score import score
from varprop.nn import Transformer

FILE = "blimp.tsv.xz"


class Pair(NamedTuple):
    """A minimal pair; a paradigm has a thousand of them, a term (island effects, ...) several paradigms."""

    paradigm: str
    term: str
    good: str
    bad: str


def load_pairs(corpus_dir: str | Path, limit: int | None = None) -> list[Pair]:
    """The pairs of `blimp.tsv.xz` in a corpus directory; limit: so many of each paradigm, the first ones.

    Raises `ArgumentError` for a missing or damaged file.
    """
    path = Path(corpus_dir) / FILE
    require(path.is_file(), ArgumentError, "corpus", str(corpus_dir), f"without {FILE}", "a corpus directory")
    try:
        lines = lzma.decompress(path.read_bytes()).decode().splitlines()
        pairs = [Pair(*line.split("\t")) for line in lines]
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, TypeError):
        raise ArgumentError(f"file={str(path)!r} is damaged; expected four columns in a whole xz file") from None
    if limit is None:
        return pairs
    require(limit >= 2, ArgumentError, "limit", limit, "too small", "an integer >= 2, or none")
    seen: dict[str, int] = {}
    kept = []
    for pair in pairs:
        seen[pair.paradigm] = seen.get(pair.paradigm, 0) + 1
        if seen[pair.paradigm] <= limit:
            kept.append(pair)
    return kept


def score_pairs(model: Transformer, pairs: Sequence[Pair], tokenizer: Tokenizer, first_token: int) -> np.ndarray:
    """Log-probability in nats of the good and the bad sentence of each pair, (n, 2), given the token before it.

    first_token: the id that a text is read behind: the tokenizer's bos where it has one, else the end of a document,
    as in training (`hf.SpecialTokens.first`). It is what `lm_eval` sums: all tokens of the sentence, not the first one.
    """
    require(len(pairs) > 0, ArgumentError, "pairs", len(pairs), "empty", "at least one pair")
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    # One at a time: a batch starts threads, which warn when a user forks.
    ids = [[first_token, *tokenizer.encode(text, add_special_tokens=False).ids] for text in texts]
    sums, _ = score(model, ids, [len(row) - 1 for row in ids])
    return sums.reshape(-1, 2)


def blimp(model: Transformer, pairs: Sequence[Pair], tokenizer: Tokenizer, first_token: int) -> xr.Dataset:
    """Share of pairs whose good sentence is the likelier, in all and by paradigm and term; chance is 1/2.

    Variables: blimp_accuracy, blimp_paradigm_accuracy (paradigm), blimp_term_accuracy (term), each with its
    `_stderr` over pairs (two or more of each paradigm), and blimp_pairs, their number. Equal log-probabilities count
    as wrong. tokenizer, first_token: as of `score_pairs`. Raises as `score` does.
    """
    scores = score_pairs(model, pairs, tokenizer, first_token)
    correct = scores[:, 0] > scores[:, 1]
    in_all, stderr = share(correct, "pairs")
    paradigms, of_paradigm, of_paradigm_stderr = shares(correct, [pair.paradigm for pair in pairs], "pairs")
    terms, of_term, of_term_stderr = shares(correct, [pair.term for pair in pairs], "pairs")
    variables = {
        "blimp_accuracy": ((), in_all),
        "blimp_accuracy_stderr": ((), stderr),
        "blimp_pairs": ((), len(pairs)),
        "blimp_paradigm_accuracy": (("paradigm",), of_paradigm),
        "blimp_paradigm_accuracy_stderr": (("paradigm",), of_paradigm_stderr),
        "blimp_term_accuracy": (("term",), of_term),
        "blimp_term_accuracy_stderr": (("term",), of_term_stderr),
    }
    coords = {"paradigm": paradigms, "term": terms}
    return dataset(model, variables, n_tokens=0, coords=coords)
