"""Proofs of varprop/theory/expert_choice.py: two tokens, one expert, counts and loads."""

from __future__ import annotations

import mpmath
import numpy as np
import sympy

from proofs.check import Proof, close, equal, normal_average
from varprop.theory.expert_choice import expert_choice_gates, experts_per_token, load_variance


def prove_counts(rule=experts_per_token):
    """Each expert takes a uniform m of T tokens: E independent events of probability m/T."""
    for n_experts, top_k, n_tokens in ((3, 1, 9), (8, 2, 16), (4, 4, 7)):
        share = mpmath.mpf(max(1, n_tokens * top_k // n_experts)) / n_tokens
        for taken, value in enumerate(rule(n_experts, top_k, n_tokens)):
            close(value, mpmath.binomial(n_experts, taken) * share**taken * (1 - share) ** (n_experts - taken))


def prove_two_tokens(rule=expert_choice_gates):
    """E = 2, k = 1, T = 2: each expert takes the larger of two logits; no two tokens share an expert."""
    std = 1.2
    sigmoid = rule(2, 1, std, 2, normalize=False, router="sigmoid")
    close(sigmoid.second_moment, normal_average(lambda z: 2 * mpmath.ncdf(z) / (1 + mpmath.exp(-std * z)) ** 2))
    close(sigmoid.overlap, mpmath.mpf(0))
    close(sigmoid.unchosen, mpmath.mpf(1) / 4)
    # top k first: the gate is 1 for a token taken once (probability 1/2), else a softmax over two larger logits
    nodes, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    larger = weight * (1 + np.vectorize(lambda z: float(mpmath.erf(z / mpmath.sqrt(2))))(nodes))
    p = 1 / (1 + np.exp(-std * (nodes[:, None] - nodes)))
    both = float(larger @ (p**2 + (1 - p) ** 2) @ larger)
    chosen = rule(2, 1, std, 2, normalize=False, gate_order="top_k_then_score")
    close(chosen.second_moment, mpmath.mpf(0.5 + both / 4), 1e-9)


def prove_every_token_taken(rule=expert_choice_gates):
    """k = E: token choice of all experts; flat scores of 1/2 or 1/E."""
    for correlation in (0.0, 0.5, 1.0):
        choice = rule(4, 4, 0.0, 10, correlation, normalize=False, router="sigmoid")
        close(choice.second_moment, mpmath.mpf(1))
        close(choice.overlap, mpmath.mpf(1))
        close(rule(4, 4, 0.0, 10, correlation, normalize=True).overlap, mpmath.mpf(1) / 4)
        close(choice.unchosen, mpmath.mpf(0))


def prove_load(rule=load_variance):
    """Variance of a mean of T exchangeable indicators and its limits; two experts: P = (1 - arccos(c) / pi) / 2."""
    p, both, size = sympy.symbols("p P T", positive=True)
    total = (size * p + size * (size - 1) * both) / size**2 - p**2
    equal(total.subs(both, p**2), p * (1 - p) / size)
    equal(total.subs(both, p), p * (1 - p))
    for n_experts, top_k, n_tokens in ((4, 1, 64), (64, 8, 7)):
        share = mpmath.mpf(top_k) / n_experts
        close(rule(n_experts, top_k, 0.0, n_tokens), share * (1 - share) / n_tokens)
        close(rule(n_experts, top_k, 1.0, n_tokens), share * (1 - share))
    same = (1 - mpmath.acos(0.5) / mpmath.pi) / 2
    close(rule(2, 1, 0.5, 10), (0.5 + 9 * same) / 10 - 0.25, 2e-3)


PROOFS = [
    Proof("experts of a token: Binomial(E, m/T)", "experts rank by own logit", prove_counts),
    Proof("two tokens, two experts (1e-9)", "i.i.d. normal router logits", prove_two_tokens),
    Proof("all tokens taken by all experts", "flat scores", prove_every_token_taken),
    Proof("variance of an expert's load, limits", "exchangeable tokens", prove_load),
]
