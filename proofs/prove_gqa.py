"""Proofs of varprop/theory/gqa.py: Wick sums over Gaussian values and output weights of one group of heads."""

from __future__ import annotations

import numpy as np
import sympy

from proofs.check import CASES, Proof, close, equal, expect, normal_moments
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, ModelSpec, layer_table
from varprop.theory.gqa import (
    aligned_mean_factor,
    attention_relative_variance,
    head_cosine,
    head_covariance,
    xavier_value_gain,
)
from varprop.theory.softmax import softmax_overlap

c, d, g, n, h, kappa, eta = sympy.symbols("c d g n h kappa eta", positive=True)


def prove_head_covariance(rule=head_covariance):
    """Two rows p, q over three tokens that share values: v_j = sqrt(c) a + sqrt(1 - c) b_j, entries of variance s2."""
    s2, a = sympy.symbols("s2 a", positive=True)
    b, p, q = (sympy.symbols(f"{name}:3") for name in "bpq")
    value = [sympy.sqrt(c) * a + sympy.sqrt(1 - c) * x for x in b]
    product = sum(x * v for x, v in zip(p, value, strict=True)) * sum(x * v for x, v in zip(q, value, strict=True))
    total = expect(product, {x: normal_moments(s2) for x in (a, *b)})
    one = {p[2]: 1 - p[0] - p[1], q[2]: 1 - q[0] - q[1]}
    overlap = sum(x * y for x, y in zip(p, q, strict=True))
    equal(rule(c, overlap, s2).subs(one), total.subs(one))


def prove_head_cosine(rule=head_cosine):
    x, y, s2 = sympy.symbols("X Y s2", positive=True)
    equal(rule(c, x, y), head_covariance(c, x, s2) / head_covariance(c, y, s2))
    equal(rule(c, y, y), 1)
    equal(rule(1, x, y), 1)


def prove_independent_queries():
    """Rows of two independent queries over exchangeable keys, independent of each other: E sum p_j q_j = 1/T."""
    for n_tokens, std in ((2, 0.5), (16, 1.0), (64, 2.0)):
        close(n_tokens * softmax_overlap(n_tokens, std, 0.0), 1, 1e-5)


def prove_aligned_mean(rule=aligned_mean_factor):
    """Output maps w_h = sqrt(eta) w + sqrt(1 - eta) w'_h of a group, heads o_h of unit power and correlation kappa."""
    for size in (1, 2, 4):
        common, own = sympy.Symbol("w"), sympy.symbols(f"w:{size}")
        shared, alone = sympy.Symbol("o"), sympy.symbols(f"o:{size}")
        maps = [sympy.sqrt(eta) * common + sympy.sqrt(1 - eta) * x for x in own]
        heads = [sympy.sqrt(kappa) * shared + sympy.sqrt(1 - kappa) * x for x in alone]
        output = sum(w * o for w, o in zip(maps, heads, strict=True))
        moments = {x: normal_moments(1) for x in (common, *own, shared, *alone)}
        equal(rule(size, eta, kappa), expect(output**2, moments) / size)
    equal(rule(g, 0, kappa), 1)


def prove_relative_variance(rule=attention_relative_variance):
    """Power of a group: sum_h o_h^2 for one value dimension; groups and dimensions are independent."""
    for size in (1, 2, 3):
        shared, alone = sympy.Symbol("o"), sympy.symbols(f"o:{size}")
        heads = [sympy.sqrt(kappa) * shared + sympy.sqrt(1 - kappa) * x for x in alone]
        power = sum(o**2 for o in heads)
        moments = {x: normal_moments(1) for x in (shared, *alone)}
        variance = expect(power**2, moments) - expect(power, moments) ** 2
        copies = n * h / size  # n / size groups of h dimensions
        relative = copies * variance / (copies * size) ** 2
        equal(rule(n, h, size, kappa, d), (1 + 2 / d) * (1 + relative) - 1)


def prove_output_factor():
    """Given the heads, out is N(0, P) in d entries: E (sum out^2 / d)^2 = (1 + 2/d) P^2."""
    power, size = sympy.Symbol("P", positive=True), 3
    out = sympy.symbols(f"y:{size}")
    moments = {y: normal_moments(power) for y in out}
    square = expect((sum(y**2 for y in out) / size) ** 2, moments)
    equal(square, (1 + sympy.Rational(2, size)) * power**2)


def prove_xavier(rule=xavier_value_gain):
    """The gain fan_in * Var(w) of the tensor table, and its limits."""
    for n_kv in (1, 2, 4, 8):
        attention = AttentionSpec(n_heads=8, n_kv_heads=n_kv)
        spec = ModelSpec(
            d_model=64,
            n_layers=1,
            attention=attention,
            feed_forward=FeedForwardSpec(d_ff=8),
            init=InitSpec(rule="xavier"),
        )
        for name in "kv":
            close(layer_table(spec, 1)[f"attention.{name}"].gain, rule(64, n_kv, 8))
    equal(rule(d, n, d / n), 1)
    equal(sympy.limit(rule(d, n, h), d, sympy.oo), 2)
    drop = sympy.diff(rule(d, n, h), n)
    equal(drop, -2 * d * h / (d + n * h) ** 2)  # negative: fewer key/value heads, a larger gain
    assert np.all(np.diff([rule(64, k, 8) for k in range(1, 9)]) < 0)


PROOFS = [
    Proof(
        "E o_h.o_h' / head_dim = sigma_V^2 (c + (1 - c) p.p')",
        "Gaussian values, rows given",
        prove_head_covariance,
        CASES,
    ),
    Proof("correlation of two heads of a group, limits", "ratio of means", prove_head_cosine),
    Proof("heads of a group share 1/T of their keys", "independent queries, i.i.d. logits", prove_independent_queries),
    Proof("aligned output maps: 1 + eta (g - 1) kappa", "heads of one correlation kappa", prove_aligned_mean, CASES),
    Proof(
        "variance of the heads' power, (2/(n h))(1 + (g-1) kappa^2)",
        "Gaussian values, rows given",
        prove_relative_variance,
        CASES,
    ),
    Proof("output weights multiply E P^2 by 1 + 2/d", "Gaussian output weights", prove_output_factor, CASES),
    Proof("Xavier value gain 2d / (d + G h), falling in G", "Xavier initialisation", prove_xavier),
]
