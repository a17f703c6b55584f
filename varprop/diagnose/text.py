"""Sequences that a model is measured on: windows of a text in the model's own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from varprop.corpus import embedded_text, load_corpus, n_windows, require_same_tokenizer, window_starts, windows
from varprop.diagnose.open import Tokens
from varprop.diagnose.replay import IGNORED, Batch
from varprop.errors import ArgumentError, require

MASKED_SHARE = 0.15
"""Of the tokens of a sequence that a masked language model is asked for, as BERT was trained."""
Begin = Literal["auto", "yes", "no"]


def sequences(
    data: str | Path,
    tokens: Tokens | None,
    *,
    vocab_size: int,
    n_sequences: int = 16,
    length: int = 512,
    seed: int = 0,
    begin: Begin = "auto",
    mask_token: int | None = None,
    corpus_dir: str | Path | None = None,
) -> Batch:
    """`n_sequences` sequences of `length` tokens of a text, as token ids and targets, on the CPU.

    data: "embedded" (the novel of the package that no run of ours is trained on), a .txt file, or a corpus as
    `corpus.load_corpus` knows them (its held-out part; corpus_dir is passed on), whose tokenizer has to be the model's:
    windows that do not overlap, drawn by `seed`; fewer are the first of more. Or a .npy file of token ids, (n,) as a
    text or (S, T) as sequences, of which rows are drawn and their first `length` ids taken as they stand.
    tokens: of the model, as `open_model` gives them. vocab_size: ids are below it.
    begin: whether the first token is the one that begins a text; "auto" = where the tokenizer itself adds one. A
    sequence for a masked language model then also ends as the tokenizer ends a text.
    mask_token: None = the target of a token is the next one. Else the token that 15 % of the text's tokens of every
    sequence, drawn by `seed`, are replaced by; what they were are the only targets.

    Raises `ArgumentError`, one line, for files that are missing or wrong, a text with too few windows, sequences
    shorter than asked, and ids beyond the vocabulary. Checked by: tests/diagnose/test_text.py.
    """
    for name, value, least in (("n_sequences", n_sequences, 1), ("length", length, 2), ("seed", seed, 0)):
        require(value >= least, ArgumentError, name, value, "outside the domain", f"an integer >= {least}")
    require(begin in ("auto", "yes", "no"), ArgumentError, "begin", begin, "unknown", "auto, yes or no")
    if tokens is not None:
        _require_fit(tokens[0], vocab_size)
    ids = _ids(data, tokens, corpus_dir)
    if ids.ndim == 2:
        first, last, rows = [], [], _rows(ids, n_sequences, length, seed)
    else:
        first, last = _frame(tokens, begin, mask_token is not None)
        rows = _windows(ids, n_sequences, length - len(first) - len(last), seed)
    highest = int(rows.max())
    require(
        highest < vocab_size, ArgumentError, "token id", highest, "beyond the vocabulary", f"ids below {vocab_size}"
    )
    framed = torch.from_numpy(np.pad(rows, ((0, 0), (len(first), len(last)))))
    framed[:, : len(first)] = torch.tensor(first)
    framed[:, length - len(last) :] = torch.tensor(last)
    if mask_token is None:
        return Batch.causal(framed)
    return masked(framed, mask_token, slice(len(first), length - len(last)), seed)


def masked(tokens: torch.Tensor, mask_token: int, where: slice, seed: int) -> Batch:
    """The batch of a masked language model: 15 % of the tokens (S, T) at the places `where` are asked for.

    All of them become the mask token (in training a tenth stays and a tenth becomes another word).

    >>> batch = masked(torch.arange(20).reshape(1, 20), 99, slice(0, 20), 0)
    >>> (batch.tokens == 99).sum().item(), bool((batch.targets == torch.arange(20))[batch.tokens == 99].all())
    (3, True)
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.arange(tokens.shape[1])[where]
    n_asked = max(1, round(MASKED_SHARE * len(places)))
    order = torch.rand(len(tokens), len(places), generator=generator).argsort(dim=1)
    asked = torch.zeros(tokens.shape, dtype=torch.bool).scatter_(1, places[order[:, :n_asked]], True)
    return Batch(torch.where(asked, mask_token, tokens), torch.where(asked, tokens, IGNORED))


def _require_fit(tokenizer: Tokenizer, vocab_size: int) -> None:
    """`ArgumentError` where the vocabulary is larger than the embedding; tokens added to it may be (Gemma's images)."""
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=False).values())
    wrong, expected = f"too small for a tokenizer of {size} entries", f"at least {size}, or the model's own tokenizer"
    require(size <= vocab_size, ArgumentError, "vocab_size", vocab_size, wrong, expected)


def _ids(data: str | Path, tokens: Tokens | None, corpus_dir: str | Path | None) -> np.ndarray:
    """Token ids (n,) of a text, or (S, T) of sequences."""
    name = str(data)
    if name == "embedded":
        return _encoded(embedded_text(), name, tokens)
    if name.endswith(".npy"):
        return _of_array(Path(name))
    if name.endswith(".txt"):
        try:
            return _encoded(Path(name).read_text(encoding="utf-8"), name, tokens)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ArgumentError(f"data={name!r} cannot be read ({reason}); expected a text file in UTF-8") from None
    corpus = load_corpus(name, corpus_dir)
    if tokens is not None:
        require_same_tokenizer(tokens[0], corpus)
    return corpus.validation


def _encoded(text: str, name: str, tokens: Tokens | None) -> np.ndarray:
    if tokens is None:
        wrong = "a text, and the model has no tokenizer.json"
        raise ArgumentError(f"data={name!r} is {wrong}; expected token ids in a .npy file, or a tokenizer")
    return np.array(tokens[0].encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _of_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise ArgumentError(f"data={str(path)!r} is missing or no array; expected token ids in a .npy file") from None
    good = isinstance(array, np.ndarray) and array.ndim in (1, 2) and array.dtype.kind in "iu" and array.size > 0
    shape = "" if not isinstance(array, np.ndarray) else f"{array.shape} {array.dtype}"
    require(good, ArgumentError, "data", str(path), f"no token ids ({shape})", "integers (n,) or (S, T)")
    lowest, highest = int(array.min()), int(array.max())
    require(lowest >= 0, ArgumentError, "token id", lowest, "negative", "ids >= 0")
    require(highest < 2**31, ArgumentError, "token id", highest, "beyond any vocabulary", "ids below 2^31")
    return array.astype(np.int64)


def _rows(ids: np.ndarray, n_sequences: int, length: int, seed: int) -> np.ndarray:
    """Rows of sequences (S, T), cut."""
    longest = f"at most {ids.shape[1]}"
    require(length <= ids.shape[1], ArgumentError, "length", length, "longer than the sequences", longest)
    wrong = f"more than the {len(ids)} sequences"
    require(n_sequences <= len(ids), ArgumentError, "n_sequences", n_sequences, wrong, f"1..{len(ids)}")
    order = np.random.default_rng([seed, len(ids)]).permutation(len(ids))
    return ids[order[:n_sequences], :length].astype(np.int64)


def _windows(ids: np.ndarray, n_sequences: int, length: int, seed: int) -> np.ndarray:
    require(length >= 1, ArgumentError, "length", length, "left beside the tokens that frame a text", "a longer one")
    size = n_windows(ids, length)
    wrong = f"more than the {size} windows of {length} tokens in the text"
    require(n_sequences <= size, ArgumentError, "n_sequences", n_sequences, wrong, f"1..{size}, or a longer text")
    return windows(ids, window_starts(ids, length, seed, range(n_sequences)), length)


def _frame(tokens: Tokens | None, begin: Begin, is_masked: bool) -> tuple[list[int], list[int]]:
    """The ids before and behind the text of a sequence."""
    if begin == "no" or (tokens is None and begin == "auto"):
        return [], []
    first, last = _added(tokens[0]) if tokens is not None else ([], [])
    if begin == "yes" and not first:
        own = None if tokens is None else tokens[1].begin
        if own is None:
            raise ArgumentError(f"begin={begin!r} is without a token for it; expected auto or no")
        first = [own]
    return first, last if is_masked else []


def _added(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before a text and behind it."""
    encoding = tokenizer.encode("a")
    text = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
    return encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]
