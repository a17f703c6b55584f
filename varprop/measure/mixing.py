"""How attention mixes tokens and how a router mixes experts.

A row of probabilities is summed in its own type (float32 at least; positive numbers), rows in float64.

Shape suffixes: `T` tokens, `N` query heads, `E` experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_concentration(probabilities: Tensor) -> Tensor:
    """sum_j p_ij^2, averaged over queries and heads, (*lead): the inverse of it is the effective number of keys.

    probabilities: (*lead, N, T, T), queries by keys. Returns float64; exact to rounding.

    >>> attention_concentration(torch.full((1, 3, 4), 0.25)).item()
    0.25
    """
    return _squared_rows(probabilities).mean(dim=(-2, -1))


def attention_entropy(probabilities: Tensor) -> Tensor:
    """-sum_j p_ij log p_ij in nats, averaged over queries and heads, (*lead), float64; exact to rounding.

    probabilities: (*lead, N, T, T), queries by keys.

    >>> round(attention_entropy(torch.full((1, 3, 4), 0.25)).exp().item(), 6)
    4.0
    """
    return torch.special.entr(probabilities).sum(dim=-1).double().mean(dim=(-2, -1))


def gate_second_moment(gates: Tensor) -> Tensor:
    """Sum of the squared gates of a token, averaged over tokens, (*lead), float64; exact to rounding.

    gates: (*lead, T, E), zero where an expert does not act.

    >>> gate_second_moment(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).item()
    0.75
    """
    return _squared_rows(gates).mean(dim=-1)


def expert_load_concentration(gates: Tensor) -> Tensor:
    """sum_e f_e^2 with f_e the share of expert e in all assignments, (*lead), float64: 1/E when balanced, exact.

    gates: (*lead, T, E), zero where an expert does not act. 0 where no expert acts on any token.

    >>> expert_load_concentration(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).item()
    0.5555555555555556
    """
    load = (gates != 0).sum(dim=-2).double()
    total = load.sum(dim=-1, keepdim=True)
    return (load / torch.where(total > 0, total, 1.0)).square().sum(dim=-1)


def _squared_rows(x: Tensor) -> Tensor:
    return x.square().sum(dim=-1).double()
