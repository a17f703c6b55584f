"""Statistics of attention that never hold all of its probabilities.

Shape suffixes: `T` tokens, `N` query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from varprop.measure.mixing import attention_concentration, attention_entropy

CHUNK_NUMBERS = 2**26
"""Probabilities that are held at a time: 256 MiB in float32."""


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
