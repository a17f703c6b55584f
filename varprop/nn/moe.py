"""A mixture of experts: router, gates, routed and shared experts.

Shape suffixes: `T` tokens, `D` d_model, `E` experts. Gates are a dense (*lead, T, E) tensor, zero where an expert does
not act, so that every routing rule ends in the same few lines; the experts see only their own tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varprop.nn.feed_forward import two_layers
from varprop.nn.linear import Weights, multiply
from varprop.spec import ModelSpec, MoESpec


def moe(
    x: Tensor, weights: Weights, spec: ModelSpec, layer: int, observe: Callable[[str, Tensor], None] | None = None
) -> Tensor:
    """Output of the mixture of a layer, (*lead, T, D): gated sum over active experts, mixed with the shared ones.

    observe: called with `gates` and their (*lead, T, E) values, zero where an expert does not act.
    """
    part = spec.moe
    assert part is not None
    gates, active = route(x, weights, part)
    if observe is not None:
        observe("gates", gates)
    experts = {name: w for name, w in weights.items() if name.startswith("moe.experts.")}
    out = (routed if _shared(experts) else routed_stack)(x, gates, active, experts, part.activation)
    if not part.n_shared_experts:
        return out
    shared = two_layers(x, weights, "moe.shared", part.activation)
    if part.shared_gate:
        shared = shared * torch.sigmoid(multiply(x, weights["moe.shared_gate"]))
    if part.shared_mixing == "mean":
        return (shared + part.top_k * out) / (part.top_k + 1)
    return shared + out


def route(x: Tensor, weights: Weights, part: MoESpec) -> tuple[Tensor, Tensor]:
    """Gates and which expert acts on which token, both (*lead, T, E); the gates in float32 or better.

    Token choice: each token takes its `top_k` experts. Expert choice (arXiv 2202.09368): each expert takes its
    max(1, T top_k // E) best tokens of a sequence. `top_k_then_score` selects by logit and scores over the experts that
    act on the token. The router bias enters the selection only.
    """
    logits = multiply(x, weights["moe.router"])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    score_first = part.gate_order == "score_then_top_k"
    selection = _score(logits, part) if score_first else logits
    if part.router_bias:
        selection = selection + weights["moe.router_bias"].unsqueeze(-2)
    if part.routing == "token_choice":
        chosen, axis = selection.topk(part.top_k, dim=-1).indices, -1
    else:
        capacity = max(1, x.shape[-2] * part.top_k // part.n_experts)
        chosen, axis = selection.topk(capacity, dim=-2).indices, -2
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(axis, chosen, True)
    if score_first:
        gates = _score(logits, part) * active
    else:  # a token that no expert chose has a row of -inf: its softmax is set to zero
        gates = _score(logits.masked_fill(~active, -torch.inf), part).masked_fill(~active, 0.0)
    if part.normalize_gates:
        total = gates.sum(dim=-1, keepdim=True)
        gates = gates / torch.where(total > 0, total, 1.0)
    return gates * part.gate_multiplier, active


def _score(logits: Tensor, part: MoESpec) -> Tensor:
    return logits.softmax(dim=-1) if part.router == "softmax" else torch.sigmoid(logits)


def _shared(experts: Weights) -> bool:
    """Whether all sequences have the same experts: (E, out, in), not (*lead, E, out, in)."""
    up = experts["moe.experts.up"]
    return isinstance(up, Tensor) and up.dim() == 3


def routed(x: Tensor, gates: Tensor, active: Tensor, experts: Weights, activation: str) -> Tensor:
    """Sum over the experts of gate times expert output, (*lead, T, D). experts: their weights, (E, out, in)."""
    tokens, gates, active = x.flatten(0, -2), gates.flatten(0, -2).to(x.dtype), active.flatten(0, -2)
    out = torch.zeros_like(tokens)
    for expert in range(active.shape[-1]):
        rows = active[:, expert].nonzero().squeeze(-1)
        own = {name: w[expert] for name, w in experts.items()}
        y = two_layers(tokens[rows], own, "moe.experts", activation)
        out = out.index_add(0, rows, (y * gates[rows, expert, None]).to(out.dtype))
    return out.view_as(x)


def routed_stack(x: Tensor, gates: Tensor, active: Tensor, experts: Weights, activation: str) -> Tensor:
    """`routed` for networks with experts of their own, (B, E, out, in) or maps: one product for all of them.

    Every expert has as many slots as the busiest one has tokens. Slots are gathered, evaluated and gathered back, in
    a fixed order: no atomic additions.
    """
    n_networks, _, d_model = x.shape
    load = active.sum(dim=-2)  # (B, E)
    # One wait for the device.
    n_slots, most = torch.stack((load.max(), active.sum(dim=-1).max())).clamp(min=1).tolist()
    # A stable sort of "not active" lists the tokens of each expert first, in order: (B, E, slots).
    token = (~active).mT.to(torch.uint8).argsort(dim=-1, stable=True)[..., :n_slots]
    used = torch.arange(n_slots, device=x.device) < load.unsqueeze(-1)
    row = (torch.arange(n_networks, device=x.device)[:, None, None], token)
    y = two_layers(x[row] * used.unsqueeze(-1), experts, "moe.experts", activation)  # (B, E, slots, D)
    # The slot of token t at expert e is the number of earlier tokens there; a token reads the experts that act on it.
    slot = active.cumsum(dim=-2) - 1  # (B, T, E)
    expert = gates.masked_fill(~active, -1.0).topk(most, dim=-1).indices  # (B, T, most)
    gate = (gates * active).gather(-1, expert).to(x.dtype)
    place = expert * n_slots + slot.gather(-1, expert).clamp(min=0)
    flat = y.flatten(1, 2)
    out = torch.zeros_like(x)
    for i in range(most):
        index = place[..., i, None].expand(-1, -1, d_model)
        out = out + flat.gather(1, index) * gate[..., i, None]
    return out
