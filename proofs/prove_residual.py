"""Proofs of varprop/theory/residual.py."""

from __future__ import annotations

import sympy

from proofs.check import CASES, Proof, equal, expect, normal_moments
from varprop.theory.residual import residual_second_moment


def prove_master_identity(rule=residual_second_moment):
    x, y, skip, branch, std = sympy.symbols("x y a b sigma", positive=True)
    hidden, other, weights = sympy.symbols("h:2"), sympy.symbols("g:2"), sympy.symbols("w:2")
    output = sum(w * h for w, h in zip(weights, hidden, strict=True))
    second = sum(w * g for w, g in zip(weights, other, strict=True))
    total = (skip * x + branch * output) * (skip * y + branch * second)
    moments = {w: normal_moments(std**2) for w in weights}
    equal(rule(x * y, expect(output * second, moments), skip, branch), expect(total, moments))


PROOFS = [
    Proof(
        "skip^2 q + branch^2 v: cross terms vanish",
        "zero-mean independent output weights",
        prove_master_identity,
        CASES,
    )
]
