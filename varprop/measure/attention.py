"""Statistics of attention that never hold all of its probabilities.

Shape suffixes: `T` tokens, `N` query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from varprop.measure.mixing import attention_concentration, attention_entropy

CHUNK_NUMBERS = 2**26
"""Probabilities that are held at a time: 256 MiB in float32."""

ATTENTION_THRESHOLDS = (0.001, 0.01, 0.1)
"""Probabilities above which a key counts in `query_statistics`."""
QUERY_STATISTICS = (
    *("concentration", "entropy", "sink_mass", "first_4_mass", "total_mass", "effective_density"),
    *(f"mass_above_{threshold:g}" for threshold in ATTENTION_THRESHOLDS),
    *(f"key_share_above_{threshold:g}" for threshold in ATTENTION_THRESHOLDS),
)
"""What the last axis of `query_statistics` holds."""


class AttentionStatistics(NamedTuple):
    """Means over the queries of each head, float64 of shape (*lead, N).

    concentration: sum_j p_ij^2; entropy: -sum_j p_ij log p_ij in nats; first_key_mass: p_i0, what goes to position 0.
    """

    concentration: Tensor
    entropy: Tensor
    first_key_mass: Tensor


def attention_statistics(
    probabilities: Callable[[slice], Tensor], n_tokens: int, numbers_per_query: int
) -> AttentionStatistics:
    """Concentration, entropy and mass on position 0 of every head, from chunks of queries.

    probabilities: gives those of a slice of the queries, (*lead, N, queries, T). numbers_per_query: how many
    numbers one query has, all heads and leading axes; a chunk holds `CHUNK_NUMBERS` of them or one query. Rows are
    summed in their own type, over rows in float64. The mean over heads of the first two are `attention_concentration`
    and `attention_entropy` of all probabilities, to rounding.

    >>> import torch
    >>> uniform = lambda queries: torch.full((2, 8, 8), 0.125)[:, queries]
    >>> [value.tolist() for value in attention_statistics(uniform, 8, 16)][::2]
    [[0.125, 0.125], [0.125, 0.125]]
    """
    size = max(1, CHUNK_NUMBERS // numbers_per_query)
    total: list[Tensor] = []
    for start in range(0, n_tokens, size):
        part = probabilities(slice(start, start + size))
        alone = part.unsqueeze(-3)  # each head as one of its own
        means = (attention_concentration(alone), attention_entropy(alone), part[..., 0].double().mean(dim=-1))
        weighted = [mean * (part.shape[-2] / n_tokens) for mean in means]
        total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
    return AttentionStatistics(*total)


def query_statistics(probabilities: Tensor, n_visible: Tensor | int) -> Tensor:
    """Statistics of single queries, (*lead, queries, statistics) float64, by the names of `QUERY_STATISTICS`.

    With p_j the probabilities of a query: concentration sum_j p_j^2; entropy -sum_j p_j log p_j in nats; sink_mass
    p_0; first_4_mass p_0 + ... + p_3; total_mass sum_j p_j, less than 1 where a sink logit takes a share;
    effective_density (sum_j p_j)^2 / (n sum_j p_j^2), the participation ratio over the n keys that the query may see:
    1 where it sees them equally, 1/n where it sees one; mass_above_t: sum of the p_j > t; key_share_above_t: number of
    the p_j > t, over n.
    probabilities: (*lead, queries, T). n_visible: n, broadcast to (*lead, queries). Rows are summed in their own type.
    Checked by: tests/measure/test_attention.py.

    >>> import torch
    >>> found = query_statistics(torch.tensor([[0.5, 0.25, 0.25, 0.0]]), 4)[0]
    >>> dict(zip(QUERY_STATISTICS, found.round(decimals=4).tolist()))["effective_density"]
    0.6667
    """
    p = probabilities
    squares, total = p.square().sum(dim=-1).double(), p.sum(dim=-1).double()
    density = torch.where(squares > 0, total.square() / (squares * n_visible), 0.0)
    found = [squares, torch.special.entr(p).sum(dim=-1), p[..., 0], p[..., :4].sum(dim=-1), total, density]
    found += [functional.threshold(p, threshold, 0.0).sum(dim=-1) for threshold in ATTENTION_THRESHOLDS]
    found += [torch.count_nonzero(p > threshold, dim=-1).double() / n_visible for threshold in ATTENTION_THRESHOLDS]
    return torch.stack([values.double() for values in found], dim=-1)
