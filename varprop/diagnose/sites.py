"""The streams and branches of a pass, layer by layer, for the scores that read them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor

from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session
from varprop.errors import ArgumentError, BranchesWarning

WIDE_COPIES = 6
"""Copies in float64 of the stream that a statistic holds."""


def few_rows(replay: Replay, captured: Captured) -> Iterator[slice]:
    """Sequences of a pass, so many at a time as the memory allows in float64."""
    size = replay.limits.batch_sequences(WIDE_COPIES * 8 * captured.n_tokens * replay.d_model)
    for start in range(0, captured.n_sequences, size):
        yield slice(start, start + size)


def each_layer(replay: Replay, captured: Captured, branches: bool) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Layers 0..L and what stands at their sites, (B, T, D): all of `results.SITES`, at layer 0 `resid_post` alone.

    branches: False = the ends of the layers alone, `resid_pre` and `resid_post`.
    """
    streams = captured.streams
    yield 0, {"resid_post": streams[0]}
    for layer in range(1, replay.n_layers + 1):
        ends = {"resid_pre": streams[layer - 1], "resid_post": streams[layer]}
        yield layer, replay.sites(layer - 1, captured) if branches else ends


def branches_apart(session: Session) -> bool:
    """Whether attention and feed-forward can be told apart in every layer; if not, a `BranchesWarning` says why."""
    captured = session.capture(slice(0, 1))
    try:
        for layer in range(session.replay.n_layers):
            session.replay.sites(layer, captured)
    except ArgumentError as error:
        warnings.warn(f"statistics of single branches are left out: {error}", BranchesWarning, stacklevel=3)
        return False
    return True
