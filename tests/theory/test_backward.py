"""Jacobians and gradients: autograd on explicit networks, known limits, domains.

Networks are the replicate: 32 of width 128 on 8 tokens for each case, at 4.5 standard errors beyond the claimed error
`jacobian_error`. With 31 degrees of freedom and the 60 numbers tested here, the false-fail rate is below 1 %; an error
of 10 % is seen everywhere, of 5 % in the feed-forward cases.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varprop import presets
from varprop.nn.block import block_forward
from varprop.nn.init import draw_layer, make_generator
from varprop.nn.moe import route
from varprop.nn.norm import rms_norm
from varprop.spec import ModelSpec, MoESpec
from varprop.theory.backward import gradient_second_moment, jacobian_product
from varprop.theory.branch_jacobian import branch_powers, projected_share
from varprop.theory.gate_jacobian import gate_jacobian, gate_jacobian_at
from varprop.theory.gates import Router
from varprop.theory.jacobian import (
    DEFINITIONS,
    block_jacobian,
    jacobian_error,
)
from varprop.theory.weight_gradient import weight_gradients

N_NETWORKS, N_TOKENS = 32, 8


def model(**changes) -> ModelSpec:
    """One layer of width 128, full attention with logits of standard deviation 0.5."""
    plain = {"d_model": 128, "n_layers": 1, "n_heads": 4, "d_ff": 256, "eps": 0.0, "rope_theta": None}
    return presets.tiny().with_fields({**plain, "pattern": "full", "logit_scale": 0.5 / 32**0.5, **changes})


def mixture(**changes) -> ModelSpec:
    plain = {"d_model": 128, "n_layers": 1, "d_expert": 64, "attention": None, "eps": 0.0}
    return presets.tiny_moe().with_fields({**plain, **changes})


def tokens(correlation: float, generator: torch.Generator, d_model: int) -> torch.Tensor:
    """Tokens with |x|^2 / d = 1.7."""
    shared, own = (torch.randn(n, d_model, generator=generator, dtype=torch.float64) for n in (1, N_TOKENS))
    x = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
    return x * (1.7 / x.square().mean(-1, keepdim=True)) ** 0.5


def moments_of(x: torch.Tensor) -> tuple[float, float]:
    gram = x @ x.T / x.shape[1]
    q = float(gram.diagonal().mean())
    return q, (float(gram.mean()) - q / len(x)) / (q * (1 - 1 / len(x)))


def measured_deviation(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> list[float]:
    """||J - I||^2 / d in the three definitions: one random direction for each token, and as many for their mean."""
    n_tokens, d = x.shape
    probes = torch.randn(n_tokens, d, generator=generator, dtype=x.dtype)
    probes /= probes.square().mean(-1, keepdim=True).sqrt()
    each = torch.diag_embed(probes.T).permute(1, 2, 0)  # (probe, token, d), one token at a time
    mean = probes[:, None].expand(n_tokens, n_tokens, d) / n_tokens
    (grads,) = torch.autograd.grad(y, x, torch.cat((each, mean)), is_grads_batched=True)
    gap = grads[:n_tokens] - each
    own = gap.diagonal(dim1=0, dim2=1)
    summed = grads[n_tokens:].sum(1) - probes
    return [float(v.square().sum() / (n_tokens * d)) for v in (gap, own, summed)]


CASES = {
    "relu": (model(attention=None, activation="relu", gated=False), 0.4),
    "relu2_layer_norm": (
        model(attention=None, activation="relu2", gated=False).with_fields({"norm.kind": "layer"}),
        0.2,
    ),
    "gelu_lns": (model(attention=None, activation="gelu", gated=False, placement="lns", n_layers=3), 0.0),
    "swiglu_masked": (model(attention=None, density=0.5), 0.4),
    "mixture": (mixture(), 0.3),
    "mixture_plain_gates": (
        mixture(
            n_experts=4, activation="gelu", n_shared_experts=1, shared_gate=True, normalize_gates=False
        ).with_fields({"moe.gated": False}),
        0.3,
    ),
    "mixture_sigmoid": (mixture(n_shared_experts=1, shared_mixing="mean").with_fields({"moe.router": "sigmoid"}), 0.3),
    "attention": (model(feed_forward=None), 0.3),
    "attention_grouped_sharp": (model(feed_forward=None, n_kv_heads=1, logit_scale=None), 0.0),
    "attention_causal": (model(feed_forward=None, pattern="causal"), 0.3),
    "attention_window": (model(feed_forward=None, pattern="window", window=3), 0.3),
    "attention_rotary": (model(feed_forward=None, pattern="causal", rope_theta=10_000.0), 0.3),
    "attention_qk_norm": (model(feed_forward=None, qk_norm="head"), 0.3),
    "block": (model(), 0.3),
    "block_scaled": (model(branch_multiplier=0.7, skip_multiplier=0.9), 0.3),
    "parallel": (model(block="parallel", skip_multiplier=0.9), 0.3),
    "post": (model(placement="post"), 0.3),
    "peri": (model(placement="peri"), 0.3),
    "reordered": (model(placement="reordered"), 0.3),
}


@pytest.mark.parametrize("case", CASES)
def test_block_against_autograd(case):
    spec, correlation = CASES[case]
    layer = spec.n_layers
    generator = make_generator(11, list(CASES).index(case))
    found, forward = [], []
    for _ in range(N_NETWORKS):
        x = tokens(correlation, generator, spec.d_model).requires_grad_()
        sites: dict[str, torch.Tensor] = {}
        weights = draw_layer(spec, layer, generator, (), dtype=torch.float64)
        y = block_forward(x, weights, spec, layer, lambda _, site, value, sites=sites: sites.__setitem__(site, value))
        found.append(measured_deviation(x, y, generator))
        forward.append([*moments_of(x.detach()), *moments_of(sites["resid_mid"].detach())])
    q, c, middle_q, middle_c = np.mean(forward, axis=0)
    predicted = block_jacobian(
        spec,
        layer,
        n_tokens=N_TOKENS,
        second_moment=q,
        token_correlation=c,
        middle_second_moment=middle_q,
        middle_token_correlation=middle_c,
    )
    for name, values in zip(DEFINITIONS, np.array(found).T, strict=True):
        stderr = values.std(ddof=1) / N_NETWORKS**0.5
        assert abs(values.mean() - predicted[name]) < jacobian_error(spec, layer) * predicted[name] + 4.5 * stderr, name


@pytest.mark.parametrize("n_experts, top_k", [(8, 2), (12, 4)])
def test_gates_against_autograd(n_experts, top_k):
    """20,000 routers, five standard errors (false-fail rate 1e-5)."""
    law = {"n_experts": n_experts, "top_k": top_k}
    logits = (1.1 * torch.randn(20_000, n_experts, generator=make_generator(3), dtype=torch.float64)).requires_grad_()
    for router, normalize in (("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)):
        part = MoESpec(d_expert=4, router=router, normalize_gates=normalize, **law)
        gates, _ = route(logits, {"moe.router": torch.eye(n_experts, dtype=torch.float64)}, part).dense(part)
        rows = [torch.autograd.grad(gates[:, i].sum(), logits, retain_graph=True)[0] for i in range(n_experts)]
        matrix = torch.stack(rows, 1)
        drawn = matrix.square().sum((1, 2)), matrix.diagonal(dim1=1, dim2=2).sum(-1)
        predicted = gate_jacobian(logit_std=1.1, normalize=normalize, router=router, **law)
        for value, sample in zip(predicted, drawn, strict=True):
            assert abs(float(sample.mean()) - value) < 5 * float(sample.std()) / 20_000**0.5 + 1e-3 * value


@pytest.mark.parametrize("std", [0.03, 0.2, 0.95, 2.2, 6.0])
def test_gate_table_between_its_nodes(std):
    table = gate_jacobian(16, 4, std, normalize=True)
    np.testing.assert_allclose(table, gate_jacobian_at(Router(16, 4, "softmax", True), std), rtol=1e-3)


# Gradients through depth


def profile(spec: ModelSpec, q, c=0.0, start: float = 0.0, n_tokens: int = N_TOKENS):
    q, c = np.broadcast_to(q, spec.n_layers), np.broadcast_to(c, spec.n_layers)
    moments = {"second_moment": q, "token_correlation": c, "middle_second_moment": q, "middle_token_correlation": c}
    return gradient_second_moment(spec, n_tokens=n_tokens, gradient_token_correlation=start, **moments)


@pytest.mark.parametrize("case", ["feed_forward", "full", "causal", "parallel", "peri"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_one_layer_gradient_against_autograd(case, start):
    """The gradient's second moment and token covariance after one block, 32 networks. Causal: 10 % for positions."""
    changes = {
        "feed_forward": {"attention": None},
        "full": {},
        "causal": {"pattern": "causal"},
        "parallel": {"block": "parallel", "branch_multiplier": 0.7},
        "peri": {"placement": "peri"},
    }
    spec, generator, found = model(**changes[case]), make_generator(5), []
    for _ in range(N_NETWORKS):
        x = tokens(0.3, generator, spec.d_model).requires_grad_()
        weights = draw_layer(spec, 1, generator, (), dtype=torch.float64)
        y = block_forward(x, weights, spec, 1)
        shared, own = (torch.randn(n, spec.d_model, generator=generator, dtype=torch.float64) for n in (1, N_TOKENS))
        (gradient,) = torch.autograd.grad(y, x, start**0.5 * shared + (1 - start) ** 0.5 * own)
        g, k = moments_of(gradient)
        found.append((g, g * k))
    predicted = profile(spec, 1.7, 0.3, start)
    expected = predicted.second_moment[0], predicted.second_moment[0] * predicted.token_correlation[0]
    claim = jacobian_error(spec, 1) + (0.1 if case == "causal" else 0.0)
    if case in ("full", "causal"):  # the stream before the feed-forward is not the one given: 6 % of its power
        claim += 0.06
    for value, sample in zip(expected, np.array(found).T, strict=True):
        assert abs(sample.mean() - value) < claim * expected[0] + 4.5 * sample.std(ddof=1) / N_NETWORKS**0.5


@pytest.mark.parametrize(
    "spec",
    [
        model(n_kv_heads=2, logit_scale=None, branch_multiplier=0.8),
        model(pattern="causal", qk_norm="head", block="parallel"),
        model(attention=None, gated=False, activation="gelu", placement="lns"),
        mixture(normalize_gates=False),
    ],
    ids=["grouped", "causal_parallel", "plain_lns", "mixture"],
)
def test_weight_gradients_against_autograd(spec):
    """Every matrix of a block, uncorrelated gradients on the tokens; 15 numbers, 32 networks."""
    generator, found, forward = make_generator(4), {}, []
    for _ in range(N_NETWORKS):
        x = tokens(0.3, generator, 128)
        drawn = draw_layer(spec, 1, generator, (), dtype=torch.float64)
        weights = {name: weight.requires_grad_() for name, weight in drawn.items()}
        sites: dict[str, torch.Tensor] = {}
        y = block_forward(x, weights, spec, 1, lambda _, site, value, sites=sites: sites.__setitem__(site, value))
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum().backward()
        forward.append([*moments_of(x), *moments_of(sites["resid_mid"].detach())])
        for name, weight in weights.items():
            if weight.dim() > 1:
                assert weight.grad is not None
                found.setdefault(name, []).append(float(weight.grad.square().mean()))
    q, c, middle_q, middle_c = np.mean(forward, axis=0)
    predicted = weight_gradients(
        spec,
        1,
        n_tokens=N_TOKENS,
        second_moment=q,
        token_correlation=c,
        middle_second_moment=middle_q,
        middle_token_correlation=middle_c,
    )
    assert predicted.keys() == found.keys()
    for name, values in found.items():
        stderr = np.std(values, ddof=1) / N_NETWORKS**0.5
        assert abs(np.mean(values) - predicted[name]) < jacobian_error(spec, 1) * predicted[name] + 4.5 * stderr, name


def test_rank_collapse_stops_queries_and_keys():
    """Equal tokens: no gradient for W_Q and W_K (arXiv 2206.03126), and the whole one for W_V."""
    moments = {"second_moment": 1.0, "token_correlation": 1.0}
    middle = {f"middle_{name}": value for name, value in moments.items()}
    found = weight_gradients(model(), 1, n_tokens=8, **moments, **middle)
    assert found["attention.q"] == found["attention.k"] == 0
    assert found["attention.v"] == pytest.approx(found["attention.o"]) != 0


def test_relu_gradients_telescope():
    """v_J = v for relu: the product of 1 + v / q_l is q_L / q_0, up to 1/d."""
    spec = model(attention=None, activation="relu", gated=False, d_model=10**6, d_ff=64, n_layers=24, n_heads=1)
    q = 1 + 0.5 * np.arange(24)
    found = profile(spec, q)
    np.testing.assert_allclose(found.second_moment, 13 / np.append(q, 13), rtol=1e-4)
    np.testing.assert_allclose(found.second_moment[0], jacobian_product(1.0, 0.5, 0.5, 24), rtol=1e-4)


def test_interval_of_xiong():
    """Relu Pre-LN: 1 + L/2 <= q_L <= 1 + 3L/2 (arXiv 2002.04745, lemma 2); the gradient grows by the same factor at
    the upper end, where one token's attention is linear."""
    spec = model(activation="relu", gated=False, n_layers=6, d_model=2**16, n_heads=2**11, d_ff=64)
    layers = np.arange(6)
    for n_tokens, step in ((1, 1.5), (64, 0.5)):
        q = 1 + step * layers
        moments = {"second_moment": q, "token_correlation": q * 0, "middle_second_moment": q + step - 0.5}
        found = gradient_second_moment(spec, n_tokens=n_tokens, middle_token_correlation=q * 0, **moments)
        growth = found.second_moment[0]
        assert growth == pytest.approx(10, rel=1e-3) if n_tokens == 1 else 4 < growth < 10


def test_gelu_residual_stack_of_partial_jacobians():
    """1 + E gelu'^2 / q: 1.4559, 1.3199, 1.2463 for the first blocks (arXiv 2111.12143's code measures 1.4753 ...)."""
    spec = model(attention=None, activation="gelu", gated=False, d_model=10**6, d_ff=64, n_layers=3, n_heads=1)
    q = 1 + 0.425221 * np.arange(3)
    second_moment = profile(spec, q).second_moment
    np.testing.assert_allclose(second_moment[:-1] / second_moment[1:], [1.4559, 1.3199, 1.2463], atol=2e-4)


def test_masks_multiply_the_factor():
    """1 + density^2 E phi'^2 / q for two masked matrices."""
    changes = {"attention": None, "activation": "relu", "gated": False, "d_model": 10**6, "d_ff": 64, "n_heads": 1}
    assert profile(model(**changes, density=0.5), 2.0).second_moment[0] == pytest.approx(1 + 0.25 * 0.5 / 2, rel=1e-5)
    assert profile(model(**changes, density=1.0), 2.0).second_moment[0] == pytest.approx(1 + 0.5 / 2, rel=1e-5)


@pytest.mark.long
def test_finite_width_bias_of_the_product():
    """Relu stack, d = 64, 16 layers, 400 networks: above q_L / q_0 by less than 0.6 L / d."""
    spec = model(attention=None, activation="relu", gated=False, d_model=64, d_ff=64, n_layers=16)
    generator, growth = make_generator(9), []
    for _ in range(400):
        x = tokens(0.0, generator, 64)[:1].requires_grad_()
        y = x
        for layer in range(1, 17):
            weights = draw_layer(spec, layer, generator, (), dtype=torch.float64)
            y = block_forward(y, weights, spec, layer)
        (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator, dtype=torch.float64))
        growth.append(float(gradient.square().mean()))
    ratio = np.array(growth) / ((1.7 + 8) / 1.7)
    stderr = ratio.std(ddof=1) / 20
    assert -4 * stderr < ratio.mean() - 1 < 0.6 * 16 / 64 + 4 * stderr


@pytest.mark.parametrize("kind", ["head", "projection"])
def test_qk_norm_removes_a_direction(kind):
    """|dl/dk|^2 rms(k)^2 of logits of normalised queries and keys, 40,000 draws at 5 standard errors (1e-6)."""
    spec = model(qk_norm=kind, d_model=16)
    head, width = spec.head_dim, spec.head_dim * (spec.n_heads if kind == "projection" else 1)
    q, k = torch.randn(2, 40_000, width, generator=make_generator(6), dtype=torch.float64)
    k.requires_grad_()
    q, normalised = (rms_norm(x, torch.ones(width, dtype=torch.float64), 0.0) for x in (q, k))
    logits = (q * normalised)[:, :head].sum(-1) / head**0.5
    (gradient,) = torch.autograd.grad(logits.sum(), k)
    power = gradient.square().sum(-1) * k.detach().square().mean(-1)
    assert abs(float(power.mean()) - projected_share(spec)) < 5 * float(power.std()) / 40_000**0.5


def test_sharp_attention_moves_correlated_gradients():
    """Full attention with logits of standard deviation 2, gradients of correlation 0 and 1: 64 networks, 5 % for 1/d.

    At 4.5 standard errors (1 % to 2 % each) the false-fail rate is 1e-4; errors of 15 % are seen.
    """
    spec, c, n_networks, n_probes = model(feed_forward=None, logit_scale=2 / 32**0.5), 0.5, 64, 16
    generator, found, forward = make_generator(8), [], []
    for _ in range(n_networks):
        x = tokens(c, generator, spec.d_model).requires_grad_()
        y = block_forward(x, draw_layer(spec, 1, generator, (), dtype=torch.float64), spec, 1) - x
        shape = (n_probes, N_TOKENS, spec.d_model)
        own = torch.randn(shape, generator=generator, dtype=torch.float64)
        shared = torch.randn(n_probes, 1, spec.d_model, generator=generator, dtype=torch.float64).expand(shape)
        (gradient,) = torch.autograd.grad(y, x, torch.cat((own, shared)), is_grads_batched=True)
        gram = gradient @ gradient.mT / spec.d_model
        diagonal = gram.diagonal(dim1=1, dim2=2).mean(-1)
        between = (gram.mean((1, 2)) - diagonal / N_TOKENS) / (1 - 1 / N_TOKENS)
        found.append([float(v) for m in (diagonal, between) for v in m.unflatten(0, (2, -1)).mean(-1)])
        forward.append(moments_of(x.detach()))
    q, c = np.mean(forward, axis=0)
    powers = branch_powers(spec, 1, N_TOKENS, "attention", q, c)
    own = powers.values["all_sources"]
    predicted = [own, own + powers.own_pair, powers.pair_own, powers.pair_own + powers.pair]
    for value, sample in zip(predicted, np.array(found).T, strict=True):
        assert abs(sample.mean() - value) < 0.05 * value + 4.5 * sample.std(ddof=1) / n_networks**0.5
