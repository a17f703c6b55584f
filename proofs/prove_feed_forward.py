"""Proofs of varprop/theory/feed_forward.py, at d = 2 inputs and 2 hidden units; both sides are linear in each count."""

from __future__ import annotations

import sympy

from proofs.check import Proof, equal, expect, normal_moments
from varprop.theory.feed_forward import gated_kernel, plain_kernel

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


PROOFS = [
    Proof("gated output: gain_down gain_up C E phi phi'", "independent zero-mean weights", prove_gated),
    Proof("plain output: gain_down E phi phi'", "independent zero-mean weights", prove_plain),
]
