"""The streams and branches of a pass, layer by layer, for the scores that read them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.diagnose.session import Session
from varprop.errors import ArgumentError, BranchesWarning

WIDE_COPIES = 10
"""Copies in float64 of the stream that the statistics of a layer hold."""
FEW_TOKENS = 8
"""Tokens that branches are looked for on."""


def few_rows(replay: Replay, captured: Captured) -> Iterator[slice]:
    """Sequences of a pass, so many at a time as the memory allows in float64."""
    size = replay.limits.batch_sequences(WIDE_COPIES * 8 * captured.n_tokens * replay.d_model)
    for start in range(0, captured.n_sequences, size):
        yield slice(start, start + size)


@torch.no_grad()
def each_layer(replay: Replay, captured: Captured, branches: bool) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Layers 0..L and what stands at their sites, (B, T, D): all of `results.SITES`, at layer 0 `resid_post` alone.

    branches: False = the ends of the layers alone, `resid_pre` and `resid_post`. Each layer runs once, as it is asked
    for, and no stream is kept.
    """
    stream = captured.start
    yield 0, {"resid_post": stream}
    for index in range(replay.n_layers):
        if branches:
            sites = replay.sites(index, stream, captured)
        else:
            sites = {"resid_pre": stream, "resid_post": replay.layer(index, stream[None], captured)[0]}
        yield index + 1, sites
        stream = sites["resid_post"]


def branches_apart(session: Session) -> bool:
    """Whether attention and feed-forward can be told apart in every layer; if not, a `BranchesWarning` says why."""
    replay, few = session.replay, (slice(0, 1), slice(0, FEW_TOKENS))
    tokens, targets = (x[few].to(replay.device) for x in (session.batch.tokens, session.batch.targets))
    try:
        for _ in each_layer(replay, replay.capture(Batch(tokens, targets)), branches=True):
            pass
    except ArgumentError as error:
        warnings.warn(f"statistics of single branches are left out: {error}", BranchesWarning, stacklevel=3)
        return False
    return True
