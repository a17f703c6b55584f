"""Statistics of single tokens over their neurons, their quantiles over tokens, and the sink positions kept apart.

Shape suffixes: `T` tokens, `D` d_model, `S` sequences, `L` layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Levels of `token_quantiles`."""
SINK_RATIO = 100.0
"""A position is a sink where its second moment is more than this times the median over positions."""


class TokenMoments(NamedTuple):
    """Statistics over the neurons of each token, float64 of shape (*lead, T)."""

    second_moment: Tensor
    variance: Tensor
    skewness: Tensor
    excess_kurtosis: Tensor


def token_moments(x: Tensor) -> TokenMoments:
    """Second moment, population variance m_2, skewness m_3 / m_2^(3/2) and excess kurtosis m_4 / m_2^2 - 3 of a token.

    m_n = mean over neurons of (x - mean x)^n; x: (*lead, T, D). Exact to rounding. The mean over tokens of the first
    two are `second_moment` and `variance`. Skewness and kurtosis are 0 where all neurons are equal; a Gaussian has 0.

    >>> [round(value.item(), 12) for value in token_moments(torch.tensor([[0.0, 0.0, 0.0, 4.0]]))]
    [4.0, 3.0, 1.154700538379, -0.666666666667]
    """
    x = x.double()
    gap = x - x.mean(dim=-1, keepdim=True)
    square = gap.square()
    variance = square.mean(dim=-1)
    third, fourth = (square * gap).mean(dim=-1), square.square().mean(dim=-1)
    some = variance > 0
    scale = torch.where(some, variance, 1.0)
    skewness, kurtosis = third / scale**1.5, torch.where(some, fourth / scale.square() - 3, 0.0)
    return TokenMoments(x.square().mean(dim=-1), variance, skewness, kurtosis)


def sink_positions(second_moment: Tensor) -> Tensor:
    """(S, T) boolean: the first position of each sequence, and each whose second moment is far above the others'.

    second_moment: of the stream after each layer, (L, S, T). Far above = more than `SINK_RATIO` times the median over
    the S T positions, at one layer or more (massive activations, arXiv 2402.17762).

    >>> sink_positions(torch.tensor([[[1.0, 1.0, 101.0, 2.0]], [[1.0, 99.0, 1.0, 1.0]]]))
    tensor([[ True, False,  True, False]])
    """
    # By sorting: CUDA's median is not among the deterministic algorithms. Of an even number the lower middle one.
    ordered = second_moment.flatten(1).sort(dim=-1).values
    median = ordered[:, (ordered.shape[1] - 1) // 2, None, None]
    sinks = (second_moment > SINK_RATIO * median).any(dim=0)
    sinks[:, 0] = True
    return sinks


def token_quantiles(values: Tensor, kept: Tensor) -> Tensor:
    """Quantiles of `values` (*lead, S, T) over the positions `kept` (S, T), at the levels of `QUANTILES`; (*lead, 5).

    Linear interpolation between order statistics, as numpy's default; exact to rounding.

    >>> token_quantiles(torch.arange(22.0)[None], torch.arange(22)[None] > 0)
    tensor([ 2.,  6., 11., 16., 20.])
    """
    levels = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
    return torch.quantile(values[..., kept], levels, dim=-1).movedim(0, -1)
