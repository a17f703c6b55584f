"""How sparse attention is: effective number of keys, entropy, mass above thresholds, sinks.

Shape suffixes: `B` sequences, `T` tokens, `N` query heads, `L` layers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from varprop.diagnose.attention_rows import attention_rows
from varprop.diagnose.bootstrap import ratio, stderr
from varprop.diagnose.layers import from_1
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.errors import ArgumentError, require
from varprop.measure import ATTENTION_THRESHOLDS, QUERY_STATISTICS, query_statistics

NUMBER_BYTES = 32
"""Memory for each probability that is formed: logits, probabilities, and what statistics make of them."""
PLAIN = ("concentration", "entropy", "sink_mass", "first_4_mass", "total_mass", "effective_density")
"""Statistics that are a number for each query, those of thresholds apart."""
BY_THRESHOLD = ("mass_above", "key_share_above")
CONCENTRATION, TOTAL_MASS = QUERY_STATISTICS.index("concentration"), QUERY_STATISTICS.index("total_mass")


def attention(session: Session) -> Variables:
    """Sparsity of the attention of every layer and head, with standard errors over sequences.

    Means over the queries of all sequences of what `varprop.measure.query_statistics` defines for one:
    attention_concentration, attention_entropy (nats), attention_sink_mass (to position 0), attention_first_4_mass,
    attention_total_mass, attention_effective_density, attention_mass_above and attention_key_share_above (with a
    dimension attention_threshold), over heads too; head_* for each head, averaged over queries alone.
    attention_effective_keys and head_effective_keys: total_mass^2 / concentration of these means, which is
    1 / concentration where no sink logit takes a share. Causal queries see different numbers of keys, so
    attention_*_by_position has some of them apart for the octaves of query positions: query_position is the first of
    0, 1, 2-3, 4-7, ... Layer 0 is NaN.
    Exact to the rounding of logits and softmax in float32, or float64 for a model in it. Memory: as `replay.limits`
    say, whatever T, in every family whose own passes hold no T x T numbers. Raises `UnsuitedError` for layers without
    softmax attention, and where it is neither sdpa nor eager.
    Source: effective keys arXiv 2603.15389; sinks arXiv 2309.17453. Checked by: tests/diagnose/test_attention.py,
    against the probabilities that eager implementations give.
    """
    replay = session.replay
    arrays = session.each_batch(
        "attention", lambda captured: replay.limits.retried(lambda: _of_batch(replay, captured))
    )
    head, queries = arrays["head"], arrays["position"]  # (S, L, N, statistics), (S, L, positions, statistics)
    names = [f"{name}_{t:g}" for name in BY_THRESHOLD for t in ATTENTION_THRESHOLDS]
    assert (*PLAIN, *names) == QUERY_STATISTICS
    starts = octave_starts(session.n_tokens)
    count = np.diff([*starts, session.n_tokens]).astype(float)[:, None]
    variables: Variables = {
        "attention_threshold": (("attention_threshold",), np.array(ATTENTION_THRESHOLDS)),
        "query_position": (("query_position",), np.array(starts)),
    }
    groups = (
        ("attention_{}", ("layer",), head.mean(axis=2)),
        ("head_{}", ("layer", "head"), head),
        ("attention_{}_by_position", ("layer", "query_position"), queries / count),
    )
    for pattern, dims, values in groups:
        errors = stderr(lambda mean: mean, values, seed=session.seed)
        for name, of_name in _split(values.mean(axis=0), errors).items():
            if name in BY_THRESHOLD and "query_position" in dims:
                continue
            own = (*dims, "attention_threshold") if name in BY_THRESHOLD else dims
            for suffix, table in zip(("", "_stderr"), of_name, strict=True):
                variables[pattern.format(name) + suffix] = (own, from_1(table))
        keys = pattern.format("effective_keys")
        variables[keys] = (dims, from_1(_effective_keys(values.mean(axis=0))))
        variables[f"{keys}_stderr"] = (dims, from_1(stderr(_effective_keys, values, seed=session.seed)))
    return variables


def octave_starts(n_tokens: int) -> list[int]:
    """First positions of the octaves of query positions.

    >>> octave_starts(10)
    [0, 1, 2, 4, 8]
    """
    return [0] + [2**i for i in range((n_tokens - 1).bit_length())]


def _split(*tables: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Tables (..., statistics) by name; statistics of thresholds keep an axis for these."""
    found = {name: [table[..., i] for table in tables] for i, name in enumerate(PLAIN)}
    n_thresholds = len(ATTENTION_THRESHOLDS)
    for i, name in enumerate(BY_THRESHOLD):
        first = len(PLAIN) + i * n_thresholds
        found[name] = [table[..., first : first + n_thresholds] for table in tables]
    return found


def _effective_keys(means: np.ndarray) -> np.ndarray:
    return ratio(means[..., TOTAL_MASS] ** 2, means[..., CONCENTRATION])


@torch.no_grad()
def _of_batch(replay: Replay, captured: Captured) -> dict[str, Tensor]:
    """Per sequence: means over queries (B, L, N, statistics), sums over those of an octave (B, L, positions, ...)."""
    layers = [_of_layer(replay, index, captured) for index in range(replay.n_layers)]
    heads = {layer.shape[1] for layer in layers}
    require(len(heads) == 1, ArgumentError, "n_heads", sorted(heads), "different in layers", "as many heads in each")
    sums = torch.stack(layers, dim=1)  # (B, L, N, positions, statistics)
    return {"head": sums.sum(dim=3) / captured.n_tokens, "position": sums.mean(dim=2)}


def _of_layer(replay: Replay, index: int, captured: Captured) -> Tensor:
    """Sums over the queries of each octave, (B, N, positions, statistics)."""
    n_tokens = captured.n_tokens
    starts = torch.tensor(octave_starts(n_tokens), device=replay.device)
    octave = torch.searchsorted(starts, torch.arange(n_tokens, device=replay.device), right=True) - 1
    into = functional.one_hot(octave, len(starts)).double()  # (T, positions)
    found = []
    for rows in attention_rows(replay, index, captured):
        total = into.new_zeros(rows.n_sequences, rows.n_heads, len(starts), len(QUERY_STATISTICS))
        for queries in _chunks(replay, n_tokens, rows.n_sequences * rows.n_heads * n_tokens):
            total += into[queries].mT @ query_statistics(*rows.of(queries))
        found.append(total)
    return torch.cat(found)


def _chunks(replay: Replay, n_tokens: int, numbers_per_query: int) -> Iterator[slice]:
    """Queries whose probabilities are formed at a time: a quarter of the memory, and few enough to skip later keys."""
    size = max(1, int(replay.limits.memory / 4 / NUMBER_BYTES) // numbers_per_query)
    size = min(size, max(64, n_tokens // 8))
    for start in range(0, n_tokens, size):
        yield slice(start, min(n_tokens, start + size))
