"""Proofs of the signs in varprop/theory/mitigation.py that prove_coherent.py does not hold already."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import sympy

from proofs.check import CASES, Proof, ProofError, close, equal
from varprop.theory.attention import incoherent_average
from varprop.theory.gates import gate_first_moment, gate_second_moment
from varprop.theory.linear import magnitude_retained_variance
from varprop.theory.softmax import softmax_participation

c, rho = sympy.symbols("c rho", nonnegative=True)


def prove_key_mask_after(rule=incoherent_average):
    """Mean over masks m of (m p)' C (m p) = rho^2 p'Cp + rho (1 - rho) Y; it is at most p'Cp, by (1 - rho) times a
    sum of terms >= 0 for c, rho in [0, 1] and Y <= 1.
    """
    weights = sympy.symbols("p_0:3", positive=True)
    overlap = sum(x**2 for x in weights)
    total = sympy.Integer(0)
    for mask in itertools.product((0, 1), repeat=3):
        kept = [m * x for m, x in zip(mask, weights, strict=True)]
        cross = sum(x * y for i, x in enumerate(kept) for j, y in enumerate(kept) if i != j)
        total += rho ** sum(mask) * (1 - rho) ** (3 - sum(mask)) * (sum(x**2 for x in kept) + c * cross)
    sums = {weights[2]: 1 - weights[0] - weights[1]}
    masked = rho**2 * rule(c, overlap) + rho * (1 - rho) * overlap
    equal(sympy.expand(masked.subs(sums)), sympy.expand(total.subs(sums)))
    y = sympy.symbols("Y", positive=True)
    gain = rule(c, y) - (rho**2 * rule(c, y) + rho * (1 - rho) * y)
    equal(gain, (1 - rho) * (c * (1 + rho * (1 - y)) + (1 - c) * y))


def prove_key_mask_before(rule=softmax_participation):
    """n = 1 + Bin(T - 1, rho) keys: E Y(n) = (1 - (1 - rho)^T) / (rho T) for flat logits, above Y(T) = 1 / T by Jensen;
    at other logits by quadrature, Y(n) falling with n. The same inequality is the long-context row, read backwards.
    """
    n_tokens = 6

    def mean(density, function):
        return sum(
            sympy.binomial(n_tokens - 1, k) * density**k * (1 - density) ** (n_tokens - 1 - k) * function(k + 1)
            for k in range(n_tokens)
        )

    flat = mean(rho, lambda n: sympy.Rational(1, n))
    equal(sympy.expand(flat * rho * n_tokens), sympy.expand(1 - (1 - rho) ** n_tokens))
    for n in (1, 2, 6):
        close(rule(n, 0.0), mpmath.mpf(1) / n)
    for std in (0.5, 1.5, 4.0):
        values = [rule(n, std) for n in range(1, n_tokens + 1)]
        if not all(earlier > later for earlier, later in itertools.pairwise(values)):
            raise ProofError(f"participation {values} does not fall with the number of keys")


def prove_gate_bounds():
    """(sum g)^2 - sum g^2 = 2 sum_{i<j} g_i g_j > 0 and k sum g^2 - (sum g)^2 = sum_{i<j} (g_i - g_j)^2 >= 0."""
    for k in (2, 3, 4):
        gates = sympy.symbols(f"g_0:{k}", positive=True)
        total, square = sum(gates), sum(g**2 for g in gates)
        pairs = list(itertools.combinations(gates, 2))
        equal(total**2 - square, 2 * sum(x * y for x, y in pairs))
        equal(k * square - total**2, sum((x - y) ** 2 for x, y in pairs))


def prove_gates(rule=gate_second_moment):
    """Normalised gates inside the bounds of `prove_gate_bounds`; not normalised: S_2 below S_1."""
    close(rule(16, 1, 0.9, normalize=True), mpmath.mpf(1))
    for k in (2, 8):
        value = rule(16, k, 0.9, normalize=True)
        free = rule(16, k, 0.9, normalize=False)
        if not (1 / k < value < 1 and 0 < free < gate_first_moment(16, k, 0.9, normalize=False) < 1):
            raise ProofError(f"S_2 = {value}, {free} outside its bounds")


def prove_magnitude_common(rule=magnitude_retained_variance):
    """A small common entry m under noise of unit variance: d/dm E[w 1(|w| > tau)] at m = 0 is e(rho) as well, so the
    common amplitude falls by e and its power by e^2; and e - rho = 2 tau phi(tau) >= 0.
    """
    tau, x, m = sympy.symbols("tau w m", positive=True)
    density: Any = sympy.exp(-((x - m) ** 2) / 2) / sympy.sqrt(2 * sympy.pi)
    slope = sympy.diff(x * density, m).subs(m, 0)
    kept = 2 * sympy.integrate(slope, (x, tau, sympy.oo))  # the integrand is even
    share = sympy.integrate(2 * density.subs(m, 0), (x, 0, tau))
    equal(rule(1 - share, sympy), kept.rewrite(sympy.erf))
    equal(rule(1 - share, sympy) - (1 - share), 2 * tau * density.subs({m: 0, x: tau}))


PROOFS = [
    Proof(
        "key mask after the softmax lowers the variance", "mask independent of the rows", prove_key_mask_after, CASES
    ),
    Proof("key mask before the softmax raises it (flat logits)", "random keys kept", prove_key_mask_before),
    Proof("(sum g)^2 / k <= sum g^2 < (sum g)^2, k = 2, 3, 4", "positive gates", prove_gate_bounds, CASES),
    Proof("1/k < S_2 < 1 at k = 2, 8; S_2 = 1 at k = 1", "i.i.d. normal router logits", prove_gates),
    Proof("magnitude mask: noise e, common component e^2", "small common entries", prove_magnitude_common),
]
