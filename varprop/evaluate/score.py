"""Log-probabilities of the last tokens of many sequences, in batches of like length.

Shape suffixes: `B` sequences, `T` tokens, `n` scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.errors import ArgumentError, require
from varprop.nn import Transformer

BATCH_TOKENS = {"cpu": 4096, "cuda": 2**17}
"""Tokens of a batch, padding included, by type of device; a longer sequence makes a batch of its own."""
LOGITS_HELD = {"cpu": 2**22, "cuda": 2**28}
"""Logits that are held at a time, by type of device."""


@torch.inference_mode()
def score(
    model: Transformer,
    sequences: Sequence[Sequence[int]],
    n_scored: Sequence[int],
    *,
    batch_tokens: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of log p(token | all before it) over the last n_scored tokens, and whether all of them are the likeliest.

    sequences: token ids, at least two each; n_scored: in 1..length - 1, one for each. batch_tokens: at most so many
    in a batch, padding included. The softmax is in float32 whatever the compute type of the network.
    Returns a float64 and a boolean array. Padding follows a sequence, so that it changes nothing in a causal network.
    Raises `ArgumentError` for ids beyond the vocabulary, unfit lengths, a network that sees later tokens, and scores
    that are not finite.

    >>> from varprop import presets
    >>> model = Transformer(presets.tiny().with_fields(n_layers=1, d_model=16, d_ff=8))
    >>> sums, greedy = score(model, [[0, 5, 7], [0, 5]], [2, 1])
    >>> sums.shape, bool(sums[0] < sums[1] < 0)
    ((2,), True)
    """
    _require_causal(model)
    _require_sequences(model, sequences, n_scored)
    device = model.get_parameter("embed").device
    sums = torch.zeros(len(sequences), dtype=torch.float64, device=device)
    missed = torch.zeros(len(sequences), dtype=torch.int64, device=device)
    limit = batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])
    chunk = max(1, LOGITS_HELD.get(device.type, LOGITS_HELD["cpu"]) // model.spec.vocab_size)
    for rows in _batches([len(sequence) for sequence in sequences], limit):
        tokens, scored = _padded([sequences[i] for i in rows], [n_scored[i] for i in rows])
        tokens, scored = tokens.to(device), scored.to(device)
        which = torch.tensor(rows, device=device)[:, None].expand_as(scored)[scored]  # (n), the sequence of each token
        targets = tokens[:, 1:][scored]
        hidden = model.hidden(tokens[:, :-1])[scored]  # (n, D)
        for part, target, index in zip(hidden.split(chunk), targets.split(chunk), which.split(chunk), strict=True):
            logits = model.logits(part[None])[0]
            log_p = logits.float().log_softmax(dim=-1).gather(-1, target[:, None])[:, 0]
            sums.index_add_(0, index, log_p.double())
            missed.index_add_(0, index, (logits.argmax(dim=-1) != target).long())
    found = sums.cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ArgumentError(f"log-probability of sequence {bad[0]} is {found[bad[0]]}; expected a finite one")
    return found, (missed == 0).cpu().numpy()


def _require_causal(model: Transformer) -> None:
    spec = model.spec
    full = spec.attention is not None and spec.attention.pattern == "full"
    require(not full, ArgumentError, "attention.pattern", "full", "not causal", "a network that sees no later token")
    chosen = spec.moe is not None and spec.moe.routing == "expert_choice"
    wrong, expected = "not causal", "a network that sees no later token"
    require(not chosen, ArgumentError, "moe.routing", "expert_choice", wrong, expected)


def _require_sequences(model: Transformer, sequences: Sequence[Sequence[int]], n_scored: Sequence[int]) -> None:
    good = len(sequences) > 0 and len(sequences) == len(n_scored)
    require(good, ArgumentError, "sequences", len(sequences), "unfit in number", "one or more, each with its n_scored")
    for sequence, n in zip(sequences, n_scored, strict=True):
        domain = f"an integer in 1..{len(sequence) - 1} for a sequence of {len(sequence)} tokens"
        require(0 < n < len(sequence), ArgumentError, "n_scored", n, "outside the domain", domain)
    largest, size = max(map(max, sequences)), model.spec.vocab_size
    wrong = "beyond the vocabulary of the model"
    require(largest < size, ArgumentError, "token id", int(largest), wrong, f"ids below {size}: the model's tokenizer")


def _batches(lengths: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Indices of sequences in batches of at most `limit` tokens with their padding, the longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > limit:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _padded(sequences: Sequence[Sequence[int]], n_scored: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) with zeros after the end, and which of the targets, tokens 1..T - 1, are scored (B, T - 1)."""
    longest = max(map(len, sequences))
    tokens = np.zeros((len(sequences), longest), dtype=np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    last = np.array([len(sequence) - 1 for sequence in sequences])[:, None]  # targets of a sequence
    position = np.arange(longest - 1)
    scored = (position < last) & (position >= last - np.asarray(n_scored)[:, None])
    return torch.from_numpy(tokens), torch.from_numpy(scored)
