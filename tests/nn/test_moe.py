"""The mixture: reductions to simpler networks, and conservation of what the router hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varprop.nn import draw_layer
from varprop.nn.feed_forward import two_layers
from varprop.nn.init import make_generator
from varprop.nn.moe import moe, route
from varprop.spec import ModelSpec

from ..reference.specs import SPECS

EXPERTS = SPECS["moe"]


def setting(**fields: Any) -> tuple[ModelSpec, dict[str, torch.Tensor], torch.Tensor]:
    spec = EXPERTS.with_fields({f"moe.{name}": value for name, value in fields.items()})
    weights = draw_layer(spec, 1, make_generator(1), dtype=torch.float64)
    return spec, weights, torch.randn(2, 9, 16, generator=make_generator(2), dtype=torch.float64)


def test_all_experts_active_is_the_weighted_sum() -> None:
    spec, weights, x = setting(top_k=4, normalize_gates=True)
    gates = (x @ weights["moe.router"].mT).softmax(dim=-1)
    expected = torch.zeros_like(x)
    for expert in range(4):
        own = {name: w[expert] for name, w in weights.items() if name.startswith("moe.experts.")}
        expected += gates[..., expert, None] * two_layers(x, own, "moe.experts", "silu")
    torch.testing.assert_close(moe(x, weights, spec, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["score_then_top_k", "top_k_then_score"])
def test_equal_experts_with_normalised_gates_are_one_network(order: str) -> None:
    spec, weights, x = setting(normalize_gates=True, gate_order=order)
    for name in weights:
        if name.startswith("moe.experts."):
            weights[name] = weights[name][:1].expand_as(weights[name])
    own = {name: w[0] for name, w in weights.items() if name.startswith("moe.experts.")}
    expected = two_layers(x, own, "moe.experts", "silu")
    torch.testing.assert_close(moe(x, weights, spec, 1), expected, rtol=0, atol=1e-12)


def test_normalised_softmax_gates_do_not_depend_on_the_order() -> None:
    spec, weights, x = setting(normalize_gates=True)
    other, _, _ = setting(normalize_gates=True, gate_order="top_k_then_score")
    torch.testing.assert_close(moe(x, weights, spec, 1), moe(x, weights, other, 1), rtol=0, atol=1e-12)


def test_router_bias_selects_and_does_not_weigh() -> None:
    spec, weights, x = setting(router_bias=True)
    assert spec.moe is not None
    weights["moe.router_bias"] = torch.tensor([0.0, 0.0, 9.0, 9.0], dtype=torch.float64)
    gates, active = route(x, weights, spec.moe).dense(spec.moe)
    assert bool(active[..., 2:].all())
    assert not bool(active[..., :2].any())
    scores = (x @ weights["moe.router"].mT).softmax(dim=-1)
    torch.testing.assert_close(gates[..., 2:], scores[..., 2:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("routing, axis, count", [("token_choice", -1, 2), ("expert_choice", -2, 4)])
def test_number_of_active_pairs(routing: str, axis: int, count: int) -> None:
    spec, weights, x = setting(routing=routing)
    assert spec.moe is not None
    _, active = route(x, weights, spec.moe).dense(spec.moe)
    assert bool((active.sum(dim=axis) == count).all())


def test_gate_multiplier_scales_the_routed_part_only() -> None:
    spec, weights, x = setting(n_shared_experts=1)
    tripled = spec.with_fields({"moe.gate_multiplier": 3.0})
    shared = two_layers(x, weights, "moe.shared", "silu")
    routed, routed_tripled = moe(x, weights, spec, 1) - shared, moe(x, weights, tripled, 1) - shared
    torch.testing.assert_close(routed_tripled, 3 * routed, rtol=0, atol=1e-12)
