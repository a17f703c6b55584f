"""Proofs of varprop/theory/patterns.py: sums over positions, the trace of a rotation, the mean slope of a soft cap."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, Proof, close, equal, normal_average
from varprop.theory.attention import rotate
from varprop.theory.patterns import (
    causal_uniform_participation,
    document_uniform_participation,
    qk_norm_logit_variance,
    rotary_kernel,
    sink_uniform_form,
    softcap_slope,
    window_uniform_participation,
)


def _uniform_mean(n_tokens: int, window: int) -> Any:
    return sum(sympy.Rational(1, min(t, window)) for t in range(1, n_tokens + 1)) / sympy.Integer(n_tokens)


def prove_causal_uniform(rule=causal_uniform_participation):
    for n in range(1, 8):
        equal(rule(sympy.Integer(n), sympy), _uniform_mean(n, n))
        close(rule(n), mpmath.harmonic(n) / n)
    close(10**7 * rule(10**7), mpmath.harmonic(10**7))


def prove_window_uniform(rule=window_uniform_participation):
    for n in range(1, 8):
        for window in range(1, n + 1):
            equal(rule(sympy.Integer(n), sympy.Integer(window), sympy), _uniform_mean(n, window))
        close(rule(n, n + 3), causal_uniform_participation(n))


def prove_documents(rule=document_uniform_participation):
    lengths = [3, 1, 5]
    known: Any = sum(_uniform_mean(n, n) * n for n in lengths) / sympy.Integer(sum(lengths))
    close(rule(lengths), mpmath.mpf(known.p) / known.q)


def prove_rotary_kernel(rule=rotary_kernel):
    """E q'R_t' R_j k k'R_m' R_u q' over unit-gain k, q with E k_j k_m' = I: the mean of (R_{j-t})' R_{m-u}."""
    for head_dim, theta, fraction in ((8, 100.0, 1.0), (8, 100.0, 0.5), (6, 10_000.0, 0.75)):
        turned = rotate(np.broadcast_to(np.eye(head_dim)[:, None], (head_dim, 7, head_dim)), theta, fraction)
        for t, j, u, m in ((0, 0, 0, 0), (5, 2, 3, 1), (6, 0, 4, 4)):
            here, there = turned[:, t] @ turned[:, j].T, turned[:, u] @ turned[:, m].T
            close(np.sum(here * there) / head_dim, float(rule(np.array((t - j) - (u - m)), theta, fraction, head_dim)))


def prove_softcap_slope(rule=softcap_slope):
    """E cap'(l) = E l cap(l) / s^2 (Stein): the slope of the best linear fit."""
    for std, cap in ((0.5, 4.0), (1.3, 10.0), (1.0, 5.0)):
        fit = normal_average(lambda z, s=std, b=cap: z * b * mpmath.tanh(s * z / b)) / std
        close(rule(std, cap), fit, 1e-9)


def prove_qk_norm(rule=qk_norm_logit_variance, size=3):
    """E (q.k)^2 over the signs and the order of the entries of k: |q|^2 |k|^2 / n, as over a sphere."""
    mq, mk, eps, scale = sympy.symbols("m_q m_k eps scale", positive=True)
    q, k = sympy.symbols(f"q0:{size}"), sympy.symbols(f"k0:{size}")
    total = sum(
        sum(sign * x * y for sign, x, y in zip(signs, q, order, strict=True)) ** 2
        for order in itertools.permutations(k)
        for signs in itertools.product((1, -1), repeat=size)
    ) / sympy.Integer(math.factorial(size) * 2**size)
    norms = [sum(x**2 for x in vector) for vector in (q, k)]
    equal(total, norms[0] * norms[1] / size)
    lengths = {mq: size * mq / (mq + eps), mk: size * mk / (mk + eps)}  # |q|^2, |k|^2 after the norm
    equal(rule(mq, mk, eps, sympy.Integer(size), scale), scale**2 * lengths[mq] * lengths[mk] / size)
    equal(rule(mq, mk, eps, sympy.Integer(size)), lengths[mq] * lengths[mk] / size**2)


def prove_sink_uniform(rule=sink_uniform_form, size=3):
    v = sympy.Matrix(size, size, lambda i, j: sympy.Symbol(f"V{min(i, j)}{max(i, j)}"))
    with_sink, without = (sympy.ones(1, size) / n for n in (size + 1, size))
    equal(rule((without * v * without.T)[0], sympy.Integer(size)), (with_sink * v * with_sink.T)[0])


PROOFS = [
    Proof("causal uniform attention: H_T / T, T = 1..7", "no logits", prove_causal_uniform, CASES),
    Proof("window: (H_w + (T - w) / w) / T, T = 1..7", "no logits", prove_window_uniform, CASES),
    Proof("documents: sum H_i / sum T_i", "no logits", prove_documents),
    Proof("rotary kernel: covariance of rotated logits", "Gaussian queries and keys", prove_rotary_kernel),
    Proof("logit variance under QK-norm", "given moments, key directions uniform", prove_qk_norm, CASES),
    Proof("sink logit beside uniform attention", "no logits", prove_sink_uniform, CASES),
    Proof("mean slope of a soft cap (1e-9)", "normal logits", prove_softcap_slope),
]
