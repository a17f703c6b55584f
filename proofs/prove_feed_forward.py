"""Proofs of varprop/theory/feed_forward.py, at d = 2 inputs and 2 hidden units; both sides are linear in each count."""

from __future__ import annotations

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, Proof, close, equal, expect, normal_average, normal_moments, plane_integral
from varprop.theory.activation import activation_second_moment
from varprop.theory.feed_forward import (
    FeedForwardGains,
    feed_forward_covariance,
    feed_forward_mask_factor,
    feed_forward_second_moment,
    gated_kernel,
    plain_kernel,
)

D = 2
down_std, up_std, kernel = sympy.symbols("sigma_down sigma_up kappa", positive=True)
inputs, others = sympy.symbols(f"u:{D}"), sympy.symbols(f"w:{D}")
down = sympy.symbols(f"o:{D}")
up = [[sympy.Symbol(f"v{i}{j}") for j in range(D)] for i in range(D)]


def _output_product(gated):
    """E f f' of one output entry: activations of unit i at the two tokens enter as the symbols a_i, b_i."""
    a, b = sympy.symbols(f"a:{D}"), sympy.symbols(f"b:{D}")

    def output(activations, tokens):
        units = [sum(up[i][j] * tokens[j] for j in range(D)) if gated else 1 for i in range(D)]
        return sum(down[i] * activations[i] * units[i] for i in range(D))

    moments = {o: normal_moments(down_std**2) for o in down}
    moments |= {v: normal_moments(up_std**2) for row in up for v in row}
    mean = sympy.expand(expect(output(a, inputs) * output(b, others), moments))
    for i in range(D):
        mean = mean.subs(a[i] * b[i], kernel)
    return sympy.expand(mean)


def prove_gated(rule=gated_kernel):
    covariance = sum(u * w for u, w in zip(inputs, others, strict=True)) / D
    equal(rule(covariance * kernel, D * up_std**2, D * down_std**2), _output_product(gated=True))


def prove_plain(rule=plain_kernel):
    equal(rule(kernel, D * down_std**2), _output_product(gated=False))


GAINS = FeedForwardGains(0.8, 0.7, 0.6)


def prove_second_moment(rule=feed_forward_second_moment):
    m = 1.5
    for gated in (True, False):
        moment = normal_average(lambda z: (_silu(mpmath.sqrt(0.8 * m) * z, mpmath)) ** 2)
        close(rule(m, GAINS, "silu", gated), 0.6 * moment * (0.7 * m if gated else 1))


def _silu(h, xp):
    return h / (1 + xp.exp(-h))


def prove_pair(rule=feed_forward_covariance):
    m, other, c = 1.5, 0.4, 0.7

    def product(a, b):
        h, g = np.sqrt(0.8 * m) * a, np.sqrt(0.8 * other) * (c * a + np.sqrt(1 - c**2) * b)
        return _silu(h, np) * _silu(g, np) * np.exp(-(a**2 + b**2) / 2) / (2 * np.pi)

    moment = plane_integral(product, [-9, -3, 0, 3, 9])
    for gated in (True, False):
        factor = 0.7 * c * np.sqrt(m * other) if gated else 1
        close(rule(m, other, c, GAINS, "silu", gated), 0.6 * factor * moment)


def prove_width(rule=feed_forward_covariance):
    # the mean over the law of a cosine, second order: m + (1 - c^2)^2 m'' / (2 d) - c (1 - c^2) m' / (2 d)
    d, c, step = 1e6, 0.5, 1e-3

    def fixed(cosine):
        return float(feed_forward_covariance(1.0, 1.0, cosine, GAINS, "silu", True))

    slope = (fixed(c + step) - fixed(c - step)) / (2 * step)
    bend = (fixed(c + step) - 2 * fixed(c) + fixed(c - step)) / step**2
    expected = ((1 - c**2) ** 2 * bend - c * (1 - c**2) * slope) / 2
    close(d * (float(rule(1.0, 1.0, c, GAINS, "silu", True, d)) - fixed(c)), expected, 1e-5)


def prove_mask_factor(rule=feed_forward_mask_factor):
    retained = FeedForwardGains(0.5, 0.3, 0.2)
    close(rule(retained, GAINS, "relu", False), 0.5 * 0.2)
    close(rule(retained, GAINS, "relu", True), 0.5 * 0.3 * 0.2)
    close(rule(retained, GAINS, "relu2", False), 0.5**2 * 0.2)


def prove_silu_share(rule=activation_second_moment):
    # sigmoid(x)^2 + sigmoid(-x)^2 = (1 + tanh(x/2)^2) / 2 grows with |x| from 1/2 to 1, so that
    # E silu(h)^2 / v = E z^2 (1 + tanh(sqrt(v) z / 2)^2) / 4 grows with v from 1/4 to 1/2
    x = sympy.symbols("x", real=True)
    both = 1 / (1 + sympy.exp(-x)) ** 2 + 1 / (1 + sympy.exp(x)) ** 2
    equal((both - (1 + sympy.tanh(x / 2) ** 2) / 2).rewrite(sympy.exp), 0)
    for v in (0.01, 1.0, 100.0):
        share = normal_average(lambda z, v=v: z**2 * (1 + mpmath.tanh(mpmath.sqrt(v) * z / 2) ** 2) / 4)
        close(float(rule("silu", v)) / v, share)


PROOFS = [
    Proof("gated output: gain_down gain_up C E phi phi'", "independent zero-mean weights", prove_gated, CASES),
    Proof("plain output: gain_down E phi phi'", "independent zero-mean weights", prove_plain, CASES),
    Proof("second moment of the output, silu (1e-10)", "Gaussian weights", prove_second_moment),
    Proof("covariance of two tokens, silu (1e-10)", "Gaussian weights", prove_pair),
    Proof("its first correction in 1/d (1e-5)", "Gaussian entries", prove_width),
    Proof("masks of relu and relu2 networks multiply", "homogeneous activations", prove_mask_factor),
    Proof("E silu^2 / v rises from 1/4 to 1/2", "Gaussian pre-activations", prove_silu_share),
]
