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
    return _share(expert_load(gates).double()).square().sum(dim=-1)


def expert_load(gates: Tensor) -> Tensor:
    """Tokens that each expert acts on, (*lead, E), int64: sums over leading axes, micro-batches and ranks are exact.

    gates: (*lead, T, E), zero where an expert does not act; a gate that underflows to zero does not count.

    >>> expert_load(torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])).tolist()
    [2, 1, 0]
    """
    return (gates != 0).sum(dim=-2)


def load_balance_loss(logits: Tensor, load: Tensor, router: str = "softmax") -> Tensor:
    """E sum_e f_e P_e, a scalar, differentiable in the logits: 1 when balanced, E when one expert takes everything.

    f_e = load_e / sum(load), which with k experts a token is (tokens of e / tokens) / k; P_e the mean over tokens of
    the probability of e: the softmax of the logits, or, for a sigmoid router, its scores divided by their sum over all
    experts (arXiv 2412.19437, equation 18).

    logits: (*lead, T, E). load: (E), as from `expert_load`, no gradient; with the load of all ranks and micro-batches,
    the mean over equal ranks and micro-batches of this value is exactly the loss of the whole batch, and so for the
    gradients. Source: arXiv 2101.03961, equations 4-6, over top_k as in OLMo-core. Checked by:
    tests/measure/test_mixing.py.

    >>> load_balance_loss(torch.zeros(3, 4), torch.tensor([2, 1, 2, 1])).item()
    1.0
    """
    scores = logits.softmax(dim=-1) if router == "softmax" else _share(torch.sigmoid(logits))
    return logits.shape[-1] * (_share(load.detach().to(scores.dtype)) * scores.flatten(0, -2).mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (log sum_e exp logit_e)^2, a scalar, differentiable.

    logits: (*lead, T, E), of a softmax router or a sigmoid one. Source: arXiv 2202.08906, equation 5. Checked by:
    tests/measure/test_mixing.py.

    >>> round(router_z_loss(torch.zeros(3, 4)).item() ** 0.5, 4)  # log 4
    1.3863
    """
    return logits.logsumexp(dim=-1).square().mean()


def router_entropy(logits: Tensor, router: str = "softmax") -> Tensor:
    """Entropy in nats of a token's distribution over all experts, averaged over tokens, (*lead), float64; exact.

    The distribution is the softmax of the logits, or, for a sigmoid router, its scores divided by their sum, as in
    `load_balance_loss`. log E where the router does not prefer. logits: (*lead, T, E).

    >>> round(router_entropy(torch.zeros(3, 4)).exp().item(), 6)
    4.0
    """
    scores = logits.softmax(dim=-1) if router == "softmax" else _share(torch.sigmoid(logits))
    return torch.special.entr(scores).sum(dim=-1).double().mean(dim=-1)


def balance_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias + rate sign(mean load - load), (E): the selection bias after a step without an auxiliary loss.

    load: (E), tokens of each expert in the whole batch, all ranks. Source: arXiv 2408.15664, algorithm 1. Checked by:
    tests/measure/test_mixing.py.

    >>> balance_bias(torch.zeros(3), torch.tensor([5, 3, 1]), 0.001)
    tensor([-0.0010,  0.0000,  0.0010])
    """
    load = load.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


def _share(values: Tensor) -> Tensor:
    """Values over their sum along the last axis; zeros where that is zero."""
    total = values.sum(dim=-1, keepdim=True)
    return values / torch.where(total > 0, total, 1.0)


def _squared_rows(x: Tensor) -> Tensor:
    return x.square().sum(dim=-1).double()
