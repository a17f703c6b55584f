"""Statistics of a stream of tokens, accumulated in float64.

Every function takes x of shape (*lead, T, D), tokens by neurons, and reduces the last two axes: one number per network,
sequence or whatever the leading axes are.
Shape suffixes: `T` tokens, `D` d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BRANCH_STREAM = {"attn_out": "resid_pre", "mlp_out": "resid_mid"}
"""Site of the stream that a branch is added to, in parallel blocks too: with r its correlation with the branch,
q_after = q + v + 2 r sqrt(q v) whatever the block (skip multiplier 1, no norm on the sum)."""


@dataclass(frozen=True)
class PowerSums:
    """Sums over x (*lead, T, D), float64 of shape (*lead): what the statistics below are made of, each read off x once.

    squares: sum of x^2; fourth_powers: of x^4; squared_means: of the squared token means over neurons;
    squared_total: of the squared sum of the tokens.
    """

    n_tokens: int
    d_model: int
    squares: Tensor
    fourth_powers: Tensor
    squared_means: Tensor
    squared_total: Tensor

    @classmethod
    def of(cls, x: Tensor) -> PowerSums:
        """The sums of x, in float64."""
        x = x.double()
        n_tokens, d_model = x.shape[-2:]
        squares = x.square()
        fourth = torch.linalg.vector_norm(squares, dim=(-2, -1)).square()
        means, total = x.mean(dim=-1), x.sum(dim=-2)
        return cls(n_tokens, d_model, squares.sum(dim=(-2, -1)), fourth, _dot(means, means), _dot(total, total))

    def second_moment(self) -> Tensor:
        """As the function of this name."""
        return self.squares / (self.n_tokens * self.d_model)

    def fourth_moment(self) -> Tensor:
        """As the function of this name."""
        return self.fourth_powers / (self.n_tokens * self.d_model)

    def variance(self) -> Tensor:
        """As the function of this name; cancels only where the squared mean is nearly all of the second moment."""
        return (self.second_moment() - self.squared_means / self.n_tokens).clamp(min=0)

    def token_correlation(self) -> Tensor:
        """As the function of this name."""
        if self.n_tokens == 1:
            return (self.squares > 0).double()
        pairs = self.squared_total - self.squares
        return torch.where(self.squares > 0, pairs / ((self.n_tokens - 1) * self.squares), 0.0)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


def second_moment(x: Tensor) -> Tensor:
    """Mean of x^2 over tokens and neurons, shape (*lead), float64; exact to rounding.

    >>> second_moment(torch.tensor([[1.0, 3.0]])).item()
    5.0
    """
    return x.double().square().mean(dim=(-2, -1))


def fourth_moment(x: Tensor) -> Tensor:
    """Mean of x^4 over tokens and neurons, shape (*lead), float64; exact to rounding. 3 q^2 for Gaussian neurons.

    >>> fourth_moment(torch.tensor([[1.0, 3.0]])).item()
    41.0
    """
    return x.double().square().square().mean(dim=(-2, -1))


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

    >>> round(token_correlation(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).item(), 12)
    0.333333333333
    """
    return PowerSums.of(x).token_correlation()


def branch_correlation(stream: Tensor, branch: Tensor) -> Tensor:
    """sum_t x_t . f_t / sqrt(sum_t |x_t|^2 sum_t |f_t|^2) of a stream x and what is added to it; 0 for a zero branch.

    stream, branch: (*lead, T, D). Returns (*lead), float64; exact to rounding.

    >>> branch_correlation(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]])).item()
    0.7071067811865475
    """
    x, f = stream.double().flatten(-2), branch.double().flatten(-2)
    return cosine(_dot(x, f), _dot(x, x) * _dot(f, f))


def cosine(product: Tensor, power: Tensor) -> Tensor:
    """product / sqrt(power), 0 where the power is."""
    return torch.where(power > 0, product / power.sqrt(), 0.0)
