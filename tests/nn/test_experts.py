"""Experts on their own tokens: against a loop-written mixture, derivatives, compiled, in every type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from varprop.nn import draw_layer, experts
from varprop.nn.experts import assign_tokens, grouped_linear
from varprop.nn.init import make_generator
from varprop.nn.moe import moe, route
from varprop.spec import ModelSpec

from ..reference.forward import mixture
from ..reference.specs import SPECS

RULES = sorted(name for name in SPECS if name.startswith("moe") and name != "moe_pattern")
EDGES: dict[str, dict[str, Any]] = {
    "all_experts": {"moe.top_k": 4},
    "one_expert": {"moe.n_experts": 1, "moe.top_k": 1},
    "more_experts_than_tokens": {"moe.n_experts": 40},
    "expert_choice_all": {"moe.routing": "expert_choice", "moe.top_k": 4},
    "expert_choice_few": {"moe.routing": "expert_choice", "moe.n_experts": 40, "moe.top_k": 1},
}
CASES = {**{name: SPECS[name] for name in RULES}, **{name: SPECS["moe"].with_fields(f) for name, f in EDGES.items()}}
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
CUDA = pytest.param("cuda", marks=GPU)
ROUNDINGS = 12
"""At most so many roundings to bfloat16, 2^-9 each, stand one after the other in an output or a gradient."""


def setting(spec: ModelSpec, n_tokens: int = 9, n_sequences: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """x (B, T, D) and the weights of layer 1, float64; a router bias that is not zero."""
    weights = draw_layer(spec, 1, make_generator(1), dtype=torch.float64)
    if "moe.router_bias" in weights:
        weights["moe.router_bias"] = torch.linspace(-0.3, 0.3, len(weights["moe.router_bias"]), dtype=torch.float64)
    return torch.randn(n_sequences, n_tokens, spec.d_model, generator=make_generator(2), dtype=torch.float64), weights


def outcome(
    spec: ModelSpec, x: Tensor, weights: dict[str, Tensor], function: Any = moe
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of half its squared sum by name, `x` included, in float64."""
    x = x.detach().requires_grad_()
    weights = {name: w.detach().requires_grad_() for name, w in weights.items() if name.startswith("moe.")}
    y = function(x, weights, spec, 1)
    (y.double().square().sum() / 2).backward()
    gradients = {name: w.grad.double() for name, w in {"x": x, **weights}.items() if w.grad is not None}
    return y.detach().double(), gradients


def assert_near(value: Tensor, expected: Tensor, relative: float) -> None:
    """Error in norm at most `relative`; of zeros exactly none."""
    value, expected = value.detach(), expected.detach()
    assert float((value - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("n_tokens", [1, 9])
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_loops(name: str, n_tokens: int) -> None:
    spec = CASES[name]
    x, weights = setting(spec, n_tokens)
    arrays = {key: w.numpy() for key, w in weights.items()}
    expected = np.stack([mixture(sequence.numpy(), arrays, spec) for sequence in x])
    torch.testing.assert_close(moe(x, weights, spec, 1).numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(moe(x[0], weights, spec, 1).numpy(), expected[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_differences(name: str) -> None:
    spec = CASES[name].with_fields({"d_model": 4, "attention": None})
    x, weights = setting(spec, 5, 1)
    names = [name for name in weights if name.startswith("moe.") and name != "moe.router_bias"]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        return moe(x, {**weights, **dict(zip(names, values, strict=True))}, spec, 1)

    inputs = [value.requires_grad_() for value in (x, *(weights[name] for name in names))]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.bfloat16, ROUNDINGS * 2**-9)])
@pytest.mark.parametrize("name", CASES)
def test_narrow_types_are_within_their_rounding(name: str, dtype: torch.dtype, relative: float, device: str) -> None:
    spec = CASES[name]
    x, weights = setting(spec)
    x, weights = x.to(dtype).double(), {key: w.float().double() for key, w in weights.items()}
    expected = outcome(spec, x, weights)
    # The shared experts are not cast by the mixture; the router and its bias stay in float32.
    narrow = {key: w.to(dtype if ".shared" in key else torch.float32) for key, w in weights.items()}
    y, gradients = outcome(spec, x.to(device, dtype), {key: w.to(device) for key, w in narrow.items()})
    assert_near(y.cpu(), expected[0], relative)
    assert gradients.keys() == expected[1].keys()
    for key, gradient in gradients.items():
        assert_near(gradient.cpu(), expected[1][key], relative)


def test_router_is_in_float32_for_a_bfloat16_stream() -> None:
    spec = SPECS["moe"]
    x, weights = setting(spec)
    x, router = x.bfloat16(), weights["moe.router"].float()
    assert spec.moe is not None
    with torch.autocast("cpu", torch.bfloat16):
        routing = route(x, {"moe.router": router}, spec.moe)
    assert routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x.float() @ router.mT, rtol=0, atol=0)


def test_autocast_is_the_narrow_type() -> None:
    spec = SPECS["moe"]
    x, weights = setting(spec)
    x, weights = x.bfloat16().float(), {name: w.float() for name, w in weights.items()}
    with torch.autocast("cpu", torch.bfloat16):
        y, gradients = outcome(spec, x, weights)
    expected, others = outcome(spec, x.bfloat16(), weights)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients["moe.experts.up"], others["moe.experts.up"], rtol=0, atol=0)


def test_permuted_tokens_and_permuted_experts() -> None:
    spec = SPECS["moe_normalised"]
    x, weights = setting(spec)
    y, gradients = outcome(spec, x, weights)
    order = torch.tensor([4, 2, 8, 0, 1, 7, 3, 6, 5])
    torch.testing.assert_close(moe(x[:, order], weights, spec, 1), y[:, order], rtol=0, atol=1e-13)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = {name: w[order] for name, w in weights.items() if name.startswith("moe.")}
    other, others = outcome(spec, x, permuted)
    torch.testing.assert_close(other, y, rtol=0, atol=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient if name == "x" else gradient[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("idle", [[0], [1, 2], [3]])
def test_experts_without_tokens(idle: list[int], dtype: torch.dtype, device: str) -> None:
    spec = SPECS["moe"].with_fields({"moe.router_bias": True, "moe.top_k": 1})
    x, weights = setting(spec)
    weights["moe.router_bias"] = torch.zeros(4, dtype=torch.float64).index_fill(0, torch.tensor(idle), -9.0)
    busy = [e for e in range(4) if e not in idle]
    rest = spec.with_fields({"moe.n_experts": len(busy), "moe.gate_order": "top_k_then_score"})
    kept = {name: w[busy] for name, w in weights.items() if name.startswith("moe.")}
    spec = spec.with_fields({"moe.gate_order": "top_k_then_score"})
    y, gradients = outcome(spec, x.to(device, dtype), {name: w.to(device) for name, w in weights.items()})
    expected, others = outcome(rest, x.to(device, dtype), {name: w.to(device) for name, w in kept.items()})
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    for name in ("gate", "up", "down"):
        gradient = gradients[f"moe.experts.{name}"]
        assert float(gradient[idle].abs().max()) == 0.0
        torch.testing.assert_close(gradient[busy], others[f"moe.experts.{name}"], rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("n_in, n_out", [(16, 24), (18, 24), (16, 21), (5, 3)])
def test_widths_that_the_kernel_does_not_take(n_in: int, n_out: int, device: str) -> None:
    generator = make_generator(7)
    rows = torch.randn(11, n_in, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(3, n_out, n_in, generator=generator).to(device, torch.bfloat16).requires_grad_()
    ends = torch.tensor([4, 4, 11], dtype=torch.int32, device=device)
    y = grouped_linear(rows, weight, ends)
    grad = torch.ones_like(y)
    found = torch.autograd.grad(y, (rows, weight), grad)
    wide = [value.detach().double().requires_grad_() for value in (rows, weight)]
    expected = grouped_linear(wide[0], wide[1], ends)
    for value, other in zip(found, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert_near(value.double(), other, 2**-8)
    assert_near(y.double(), expected, 2**-8)


def test_gathers_and_products_twice_differentiable() -> None:
    generator = make_generator(8)
    chosen = torch.rand(6, 4, generator=generator).argsort(dim=-1)[:, :2]
    gates = torch.rand(6, 2, generator=generator, dtype=torch.float64).requires_grad_()
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def spread(x: Tensor, gates: Tensor) -> Tensor:
        pairs = assign_tokens(chosen, gates, 4)
        return experts._spread(x, pairs) * pairs.gate.unsqueeze(-1)

    def collect(x: Tensor, gates: Tensor) -> Tensor:
        return experts._collect(spread(x, gates).square(), assign_tokens(chosen, gates, 4), 6)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        pairs = assign_tokens(chosen, gates, 4)
        return grouped_linear(experts._spread(x, pairs), weight, pairs.ends)

    for function, inputs in ((spread, (x, gates)), (collect, (x, gates)), (product, (x, weight))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_assignments_list_every_pair_once_by_expert() -> None:
    chosen = torch.rand(50, 300, generator=make_generator(9)).argsort(dim=-1)[:, :3]
    pairs = assign_tokens(chosen, torch.arange(150.0).view(50, 3), 300)
    assert pairs.places is not None
    found, start = set(), 0
    for expert, end in enumerate(pairs.ends.tolist()):
        tokens = pairs.token[start:end].tolist()
        assert tokens == sorted(tokens)
        found |= {(token, expert) for token in tokens}
        start = end
    assert start == 150
    assert found == {(token, expert) for token, row in enumerate(chosen.tolist()) for expert in row}
    torch.testing.assert_close(pairs.gate[pairs.places], torch.arange(150.0).view(50, 3))


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", torch.float32, marks=pytest.mark.long),
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=GPU),
    ],
)
def test_compiled_in_one_graph(device: str, dtype: torch.dtype) -> None:
    spec = SPECS["moe_top_k_first"].with_fields({"moe.d_expert": 10, "moe.normalize_gates": True})
    x, weights = setting(spec)
    x, weights = x.to(device, dtype), {name: w.to(device, torch.float32) for name, w in weights.items()}
    seen: dict[str, Tensor] = {}

    def function(x: Tensor, weights: dict[str, Tensor], spec: ModelSpec, layer: int) -> Tensor:
        return moe(x, weights, spec, layer, seen.__setitem__)

    y, gradients = outcome(spec, x, weights, torch.compile(function, fullgraph=True, dynamic=False))
    compiled = dict(seen)
    expected, others = outcome(spec, x, weights, function)
    relative = 1e-5 if dtype == torch.float32 else ROUNDINGS * 2**-9
    assert_near(y, expected, relative)
    for name, gradient in gradients.items():
        assert_near(gradient, others[name], relative)
    for name in ("router_logits", "gates"):
        torch.testing.assert_close(compiled[name], seen[name])


@pytest.mark.parametrize("name", ["moe", "moe_shared", "moe_expert_choice"])
def test_one_graph_serves_every_layer(name: str) -> None:
    spec = SPECS[name]
    x, weights = setting(spec)
    count = CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(
        lambda x, weights, layer: moe(x, weights, spec, layer), backend=count, fullgraph=True, dynamic=False
    )
    for layer in range(1, 5):
        function(x, {key: w.clone() for key, w in weights.items()}, layer)
    assert count.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_same_bits_twice_and_no_wait() -> None:
    spec = SPECS["moe"].with_fields({"d_model": 256, "n_experts": 16, "top_k": 4, "d_expert": 128})
    x, weights = setting(spec, 512, 4)
    x, weights = x.cuda().bfloat16(), {name: w.cuda().float() for name, w in weights.items()}
    expected = outcome(spec, x, weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        y, gradients = outcome(spec, x, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, expected[0])
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())
