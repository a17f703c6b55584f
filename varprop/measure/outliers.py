"""Entries far larger than the others, among N numbers: of a token, or of all tokens of a sequence.

Every function reduces the last axis of x (*lead, N) and gives float64 (*lead).
"""

from __future__ import annotations

import torch
from torch import Tensor


def outlier_share(x: Tensor, threshold: float) -> Tensor:
    """Share of entries with |x - mean| > threshold * standard deviation, both over the N entries (population form).

    Exact; 0 where all entries are equal. A Gaussian has 0.0027 beyond 3.

    >>> outlier_share(torch.tensor([10.0] + [0.0] * 19), 3.0).item()
    0.05
    """
    wide = x.double()
    gap = wide - wide.mean(dim=-1, keepdim=True)
    scale = gap.square().mean(dim=-1, keepdim=True).sqrt()
    return (gap.abs() > threshold * scale).double().mean(dim=-1)


def largest_energy_share(x: Tensor, count: int) -> Tensor:
    """Sum of the `count` largest x^2 (all, where N is less) over the sum of all; 0 where all entries are 0.

    Exact to rounding.

    >>> largest_energy_share(torch.tensor([3.0, 1.0, -1.0, 1.0]), 1).item()
    0.75
    """
    largest = x.abs().topk(min(count, x.shape[-1]), dim=-1).values.double().square().sum(dim=-1)
    total = x.double().square().sum(dim=-1)
    return torch.where(total > 0, largest / total, 0.0)


def max_to_median(x: Tensor) -> Tensor:
    """max |x| / median |x|; of an even number the lower middle one is the median; 0 where it is 0.

    Exact. Source: massive activations, arXiv 2402.17762.

    >>> max_to_median(torch.tensor([-8.0, 2.0, 1.0, 2.0])).item()
    4.0
    """
    sizes = x.abs().flatten(0, -2) if x.ndim > 1 else x.abs()[None]
    # Row by row: the median along an axis is not among CUDA's deterministic algorithms, that of all entries is.
    median = torch.stack([row.median() for row in sizes]).double().reshape(x.shape[:-1])
    largest = x.abs().amax(dim=-1).double()
    return torch.where(median > 0, largest / median, 0.0)
