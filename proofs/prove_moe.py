"""Proofs of varprop/theory/moe.py: shared experts, and the gates' place in the mixture's moments."""

from __future__ import annotations

import sympy

from proofs.check import CASES, Proof, close, equal, expect, normal_moments
from varprop import presets
from varprop.spec import MoESpec
from varprop.theory.feed_forward import FeedForwardGains
from varprop.theory.moe import MoEGains, mix_shared, moe_against_dense, moe_covariance, moe_second_moment


def prove_mix_shared(rule=mix_shared):
    shared, routed = sympy.symbols("f_S f_R")
    first, second = sympy.symbols("v_S v_R", positive=True)
    moments = {shared: normal_moments(first), routed: normal_moments(second)}
    equal(rule(second, first, 4, "sum"), expect((shared + routed) ** 2, moments))
    equal(rule(second, first, 4, "mean"), expect(((shared + 4 * routed) / 5) ** 2, moments))


def prove_independent_experts():
    """Sums over experts of gate times output, for two tokens: E f f' = (sum g g') K, whatever the gates."""
    kernel, power = sympy.symbols("K v", positive=True)
    g, h = sympy.symbols("g:3"), sympy.symbols("h:3")
    x, w = sympy.symbols("x:3"), sympy.symbols("w:3")
    first = sum(a * b for a, b in zip(g, x, strict=True))
    correlation = kernel / power  # the other token's output is (K / v) x + an independent part w
    other = sum(a * (correlation * b + e) for a, b, e in zip(h, x, w, strict=True))
    moments = {**{s: normal_moments(power) for s in x}, **{s: normal_moments(power - kernel**2 / power) for s in w}}
    equal(expect(first * other, moments), kernel * sum(a * b for a, b in zip(g, h, strict=True)))


def prove_reductions(second=moe_second_moment, covariance=moe_covariance):
    """ReLU experts, m = 1: v_E = 1/2 and K_E(0) = 1 / (2 pi). One expert of gate 1 is a dense network; k = E, flat
    logits average; independent tokens take 1/E; the shared gate is E sigmoid^2 -> 1/4."""
    one = FeedForwardGains(1.0, 1.0, 1.0)
    plain = {"d_expert": 8, "activation": "relu", "gated": False, "normalize_gates": True}
    pi = float(sympy.pi)
    for n_experts, top_k in ((1, 1), (4, 1), (4, 4)):
        part = MoESpec(n_experts=n_experts, top_k=top_k, **plain)
        gains = MoEGains(1e-14, one)
        close(second(1.0, gains, part), 0.5 / top_k)
        close(covariance(1.0, 1.0, 1.0, gains, part), 0.5 / top_k)
        close(covariance(1.0, 1.0, 0.0, gains, part), 1 / (2 * pi * n_experts))
    shared = MoESpec(n_experts=2, top_k=2, n_shared_experts=1, shared_gate=True, gate_multiplier=3.0, **plain)
    close(second(1.0, MoEGains(1e-14, one, one, 1e-14), shared), 0.5 * 9 / 2 + 0.5 / 4)


def prove_factors(rule=moe_against_dense):
    for correlation in (1.0, 0.3):
        factors = rule(presets.tiny_moe(), presets.tiny(), correlation=correlation)
        product = factors["gates"] * factors["expert_width"] * factors["routing"] * factors["shared"]
        close(factors["total"], product)
    wide = presets.tiny().with_fields({"init.rule": "fixed"})
    narrow = presets.tiny_moe().with_fields({"init.rule": "fixed"})
    assert narrow.moe is not None
    assert wide.feed_forward is not None
    close(rule(narrow, wide)["expert_width"], narrow.moe.d_expert / wide.feed_forward.d_ff)


PROOFS = [
    Proof("shared and routed outputs add in variance", "independent zero-mean experts", prove_mix_shared, CASES),
    Proof(
        "E f_t.f_s = (sum of products of gates) K_E", "independent zero-mean experts", prove_independent_experts, CASES
    ),
    Proof("one expert, flat gates, independent tokens, shared gate", "ReLU experts", prove_reductions),
    Proof("MoE against dense: the factors multiply to the ratio", "equal inputs", prove_factors),
]
