"""How far the contributions of different layers to the stream point the same way.

Shape suffixes: `T` tokens, `D` d_model, `K` contributions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**24
"""Numbers that are held in float64 at a time: 128 MiB."""


def overlap_sums(contributions: Sequence[Tensor]) -> Tensor:
    """sum over tokens and leading axes of f_k . f_l, (K, K), float64: C_kl = it / (tokens D) is the mean overlap.

    contributions: K tensors (*lead, T, D). Sums over tokens in a fixed order, `CHUNK_NUMBERS` at a time; exact to
    rounding in float64. C_kl / sqrt(C_kk C_ll) is the cosine. Where a stream is the sum of the contributions, the sum
    of all C_kl is its second moment.

    >>> overlap_sums([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])])
    tensor([[ 5.,  1.],
            [ 1., 10.]], dtype=torch.float64)
    """
    d_model = contributions[0].shape[-1]
    rows = [f.reshape(-1, d_model) for f in contributions]
    size = max(1, CHUNK_NUMBERS // (len(rows) * d_model))
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows[0].device)
    for start in range(0, rows[0].shape[0], size):
        chunk = torch.stack([row[start : start + size].flatten() for row in rows]).double()
        total += chunk @ chunk.mT
    return total
