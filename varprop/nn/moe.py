"""A mixture of experts: router, gates, routed and shared experts.

Shape suffixes: `T` tokens, `D` d_model, `E` experts, `K` active experts of a token, `C` tokens that an expert takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from varprop.nn.experts import apply_experts, assign_experts, assign_tokens
from varprop.nn.feed_forward import two_layers
from varprop.nn.linear import Weights, multiply
from varprop.spec import ModelSpec, MoESpec


class Routing(NamedTuple):
    """Which expert acts on which token, the gates in float32 or better.

    logits: (*lead, T, E). chosen: the experts of each token, (*lead, T, K), or, where experts choose, the tokens of
    each expert, (*lead, C, E). gates: those of the chosen pairs, in the shape of `chosen`.
    """

    logits: Tensor
    chosen: Tensor
    gates: Tensor

    def dense(self, part: MoESpec) -> tuple[Tensor, Tensor]:
        """Gates, zero where an expert does not act, and whether it does, both (*lead, T, E).

        For statistics: the products do not need them. 4 bytes a number: 17 MB for 65,536 tokens and 64 experts.
        """
        axis = _axis(part)
        active = torch.zeros_like(self.logits, dtype=torch.bool).scatter(axis, self.chosen, True)
        return torch.zeros_like(self.logits).scatter(axis, self.chosen, self.gates), active


def moe(
    x: Tensor, weights: Weights, spec: ModelSpec, layer: int, observe: Callable[[str, Tensor], None] | None = None
) -> Tensor:
    """Output of the mixture of a layer, (*lead, T, D): gated sum over active experts, mixed with the shared ones.

    observe: called with `router_logits` and `gates`, both (*lead, T, E) in float32 or better, the gates zero where an
    expert does not act.
    """
    part = spec.moe
    assert part is not None
    routing = route(x, weights, part)
    if observe is not None:
        observe("router_logits", routing.logits)
        observe("gates", routing.dense(part)[0])
    experts = {name: w for name, w in weights.items() if name.startswith("moe.experts.")}
    out = (routed if _shared(experts) else routed_stack)(x, routing, experts, part)
    if not part.n_shared_experts:
        return out
    shared = two_layers(x, weights, "moe.shared", part.activation)
    if part.shared_gate:
        shared = shared * torch.sigmoid(multiply(x, weights["moe.shared_gate"]))
    if part.shared_mixing == "mean":
        return (shared + part.top_k * out) / (part.top_k + 1)
    return shared + out


def route(x: Tensor, weights: Weights, part: MoESpec) -> Routing:
    """The router's choice and gates for x (*lead, T, D), computed in float32 or better whatever the type of x.

    Token choice: each token takes its `top_k` experts, the first of equal ones. Expert choice (arXiv 2202.09368): each
    expert takes its max(1, T top_k // E) best tokens of a sequence. `top_k_then_score` selects by logit and scores over
    the experts that act on the token. The router bias enters the selection only.
    """
    logits = _logits(x, weights["moe.router"])
    scores = _score(logits, part) if part.gate_order == "score_then_top_k" else None
    selection = (logits if scores is None else scores).detach()
    if part.router_bias:
        selection = selection + weights["moe.router_bias"].unsqueeze(-2)
    if part.routing == "token_choice":
        # Sorting the few experts of a token compiles into one kernel, which torch.topk does not.
        chosen = selection.sort(dim=-1, descending=True, stable=True).indices[..., : part.top_k]
        gates = _score(logits.gather(-1, chosen), part) if scores is None else scores.gather(-1, chosen)
        return Routing(logits, chosen, _finished(gates, part))
    capacity = max(1, x.shape[-2] * part.top_k // part.n_experts)
    chosen = selection.topk(capacity, dim=-2).indices
    active = torch.zeros_like(logits, dtype=torch.bool).scatter(-2, chosen, True)
    if scores is None:  # a token that no expert chose has a row of -inf: its softmax is set to zero below
        scores = _score(logits.masked_fill(~active, -torch.inf), part)
    gates = _finished(scores.masked_fill(~active, 0.0), part)
    return Routing(logits, chosen, gates.gather(-2, chosen))


def _logits(x: Tensor, router: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(router, Tensor):
        router = router.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        return multiply(x.to(wide), router)


def _score(logits: Tensor, part: MoESpec) -> Tensor:
    return logits.softmax(dim=-1) if part.router == "softmax" else torch.sigmoid(logits)


def _finished(gates: Tensor, part: MoESpec) -> Tensor:
    """Normalised over the experts of a token, which are all along the last axis, and multiplied, where asked for."""
    if part.normalize_gates:
        total = gates.sum(dim=-1, keepdim=True)
        gates = gates / torch.where(total > 0, total, 1.0)
    return gates * part.gate_multiplier


def _axis(part: MoESpec) -> int:
    """The axis of (T, E) that `Routing.chosen` indexes."""
    return -1 if part.routing == "token_choice" else -2


def _shared(experts: Weights) -> bool:
    """Whether all sequences have the same experts: (E, out, in), not (*lead, E, out, in)."""
    up = experts["moe.experts.up"]
    return isinstance(up, Tensor) and up.dim() == 3


def routed(x: Tensor, routing: Routing, experts: Weights, part: MoESpec) -> Tensor:
    """Sum over the experts of gate times expert output, (*lead, T, D). experts: their weights, (E, out, in)."""
    chosen, gates = routing.chosen, routing.gates
    if part.routing == "token_choice":
        pairs = assign_tokens(chosen.flatten(0, -2), gates.flatten(0, -2), part.n_experts)
    else:
        by_sequence = (-1, *chosen.shape[-2:])
        pairs = assign_experts(chosen.view(by_sequence), gates.view(by_sequence), x.shape[-2])
    return apply_experts(x.flatten(0, -2), pairs, experts, part.activation).view_as(x)


def routed_stack(x: Tensor, routing: Routing, experts: Weights, part: MoESpec) -> Tensor:
    """`routed` for networks with experts of their own, (B, E, out, in) or maps: one product for all of them.

    Every expert has as many slots as the busiest one has tokens. Slots are gathered, evaluated and gathered back, in
    a fixed order: no atomic additions.
    """
    gates, active = routing.dense(part)
    n_networks, _, d_model = x.shape
    load = active.sum(dim=-2)  # (B, E)
    # One wait for the device.
    n_slots, most = torch.stack((load.max(), active.sum(dim=-1).max())).clamp(min=1).tolist()
    # A stable sort of "not active" lists the tokens of each expert first, in order: (B, E, slots).
    token = (~active).mT.to(torch.uint8).argsort(dim=-1, stable=True)[..., :n_slots]
    used = torch.arange(n_slots, device=x.device) < load.unsqueeze(-1)
    row = (torch.arange(n_networks, device=x.device)[:, None, None], token)
    y = two_layers(x[row] * used.unsqueeze(-1), experts, "moe.experts", part.activation)  # (B, E, slots, D)
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
