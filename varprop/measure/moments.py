"""Second-order statistics of a stream of tokens, accumulated in float64.

Every function takes x of shape (*lead, T, D), tokens by neurons, and reduces the last two axes: one number per network,
sequence or whatever the leading axes are. Shape suffixes: `T` tokens, `D` d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment(x: Tensor) -> Tensor:
    """Mean of x^2 over tokens and neurons, shape (*lead), float64; exact to rounding.

    >>> second_moment(torch.tensor([[1.0, 3.0]])).item()
    5.0
    """
    return x.double().square().mean(dim=(-2, -1))


def variance(x: Tensor) -> Tensor:
    """Population variance over the neurons of each token, averaged over tokens, shape (*lead), float64.

    >>> variance(torch.tensor([[1.0, 3.0]])).item()
    1.0
    """
    x = x.double()
    return (x - x.mean(dim=-1, keepdim=True)).square().mean(dim=(-2, -1))


def token_correlation(x: Tensor) -> Tensor:
    """Mean of x_i . x_j over token pairs i != j, divided by the mean of |x_i|^2; shape (*lead), float64.

    (|sum_t x_t|^2 - sum_t |x_t|^2) / ((T - 1) sum_t |x_t|^2), which needs no T x T matrix; exact to rounding.
    An all-zero tensor gives 0, else a single token gives 1.

    >>> token_correlation(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).item()
    0.3333333333333333
    """
    x = x.double()
    n_tokens = x.shape[-2]
    power = x.square().sum(dim=(-2, -1))
    if n_tokens == 1:
        return (power > 0).double()
    pairs = x.sum(dim=-2).square().sum(dim=-1) - power
    return torch.where(power > 0, pairs / ((n_tokens - 1) * power), 0.0)


def branch_correlation(stream: Tensor, branch: Tensor) -> Tensor:
    """sum_t x_t . f_t / sqrt(sum_t |x_t|^2 sum_t |f_t|^2) of a stream x and what is added to it; 0 for a zero branch.

    stream, branch: (*lead, T, D). Returns (*lead), float64; exact to rounding.

    >>> branch_correlation(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]])).item()
    0.7071067811865475
    """
    stream, branch = stream.double(), branch.double()
    scale = (stream.square().sum(dim=(-2, -1)) * branch.square().sum(dim=(-2, -1))).sqrt()
    return torch.where(scale > 0, (stream * branch).sum(dim=(-2, -1)) / scale, 0.0)
