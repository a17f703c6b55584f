"""Proofs of varprop/theory/linear.py."""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import sympy

from proofs.check import CASES, Proof, ProofError, close, equal, expect, normal_moments
from varprop.theory.linear import (
    attention_mask_factors,
    bernoulli_excess_kurtosis,
    bernoulli_fourth_moment,
    bernoulli_retained_variance,
    block_concentration,
    block_excess_kurtosis,
    linear_second_moment,
    magnitude_fourth_moment,
    magnitude_retained_variance,
    ranked_moment,
    structured_second_moment,
)

FAN_IN = 3
density, factor, std = sympy.symbols("rho f sigma", positive=True)
inputs = sympy.symbols(f"u:{FAN_IN}", positive=True)


def _mask_average(function):
    """Sum over all 0/1 masks of P(mask) * function(mask)."""
    total = 0
    for mask in itertools.product((0, 1), repeat=FAN_IN):
        total += density ** sum(mask) * (1 - density) ** (FAN_IN - sum(mask)) * function(mask)
    return total


def _moment(mask, power):
    """E y^power of y = sum_j m_j f w_j u_j for a given mask, over Gaussian w."""
    weights = sympy.symbols(f"w:{FAN_IN}")
    y = sum(m * factor * w * u for m, w, u in zip(mask, weights, inputs, strict=True))
    return expect(y**power, {w: normal_moments(std**2) for w in weights})


def prove_second_moment(rule=linear_second_moment, retained=bernoulli_retained_variance):
    actual = rule(sum(u**2 for u in inputs) / FAN_IN, FAN_IN * std**2, retained(density, factor))
    equal(actual, _mask_average(lambda mask: _moment(mask, 2)))


def prove_kurtosis(rule=bernoulli_excess_kurtosis):
    fourth = _mask_average(lambda mask: _moment(mask, 4))
    second = _mask_average(lambda mask: _moment(mask, 2))
    kurtosis = FAN_IN * sum(u**4 for u in inputs) / sum(u**2 for u in inputs) ** 2
    equal(rule(density, kurtosis, FAN_IN), fourth / second**2 - 3)


def _sign(expression, positive=True):
    """Raise `ProofError` unless sympy can tell that an expression is positive (else negative)."""
    simple = sympy.factor(sympy.simplify(expression))
    if not (simple.is_positive if positive else simple.is_negative):
        raise ProofError(f"the sign of {simple} is not shown")


def prove_retained_variance_increases(rule=bernoulli_retained_variance):
    slope = sympy.diff(rule(density, factor), density)
    equal(slope, factor**2)
    _sign(slope)


def prove_kurtosis_falls(rule=bernoulli_excess_kurtosis):
    kurtosis, fan_in = sympy.symbols("kappa n", positive=True)
    slope = sympy.diff(rule(density, kurtosis, fan_in), density)
    equal(slope, -3 * kurtosis / (density**2 * fan_in))
    _sign(slope, positive=False)


def prove_fourth_moment(rule=bernoulli_fourth_moment):
    gain = FAN_IN * std**2 * factor**2
    fourth = sympy.expand(_mask_average(lambda mask: _moment(mask, 4)))
    square, single = (sum(u**2 for u in inputs) / FAN_IN) ** 2, sum(u**4 for u in inputs) / FAN_IN
    equal(gain**2 * rule(density, square, single, FAN_IN), fourth)
    moments = {u: normal_moments(1) for u in inputs}
    averages = expect(square, moments), expect(single, moments)
    equal(averages[0], 1 + sympy.Rational(2, FAN_IN))
    equal(gain**2 * rule(density, *averages, FAN_IN), expect(fourth, moments))


def prove_block_kurtosis(rule=block_excess_kurtosis):
    # Given the mask y is Gaussian of variance sum_b m_b P_b with P_b = sigma^2 |u_b|^2
    powers = sympy.symbols("P:3", positive=True)

    def average(power):
        return _mask_average(lambda mask: sum(m * p for m, p in zip(mask, powers, strict=True)) ** power)

    concentration = sum(p**2 for p in powers) / sum(powers) ** 2
    equal(rule(density, concentration), 3 * average(2) / average(1) ** 2 - 3)


def prove_block_concentration(rule=block_concentration):
    # |u|^2 is independent of u / |u| for Gaussian u, so the mean of a ratio is the ratio of means
    for block, fan_in in ((1, 3), (2, 4), (3, 3), (2, 6)):
        u = sympy.symbols(f"g:{fan_in}")
        moments = {x: normal_moments(1) for x in u}
        powers = [sum(x**2 for x in u[b : b + block]) for b in range(0, fan_in, block)]
        ratio = sum(expect(p**2, moments) for p in powers) / expect(sum(x**2 for x in u) ** 2, moments)
        equal(rule(sympy.Integer(block), sympy.Integer(fan_in)), ratio)


def prove_structured(rule=structured_second_moment):
    fixed, noise = sympy.symbols(f"W:{FAN_IN}", real=True), sympy.symbols(f"n:{FAN_IN}")

    def square(mask):
        terms = zip(mask, fixed, noise, inputs, strict=True)
        y = sum(m * factor * (w + n) * u for m, w, n, u in terms)
        return expect(y**2, {n: normal_moments(std**2) for n in noise})

    coherent = sum(w * u for w, u in zip(fixed, inputs, strict=True)) ** 2
    entries = sum(w**2 * u**2 for w, u in zip(fixed, inputs, strict=True))
    power = std**2 * sum(u**2 for u in inputs)
    equal(rule(density, coherent, entries, power, factor), _mask_average(square))


def prove_structured_increases(rule=structured_second_moment):
    coherent, noise, slack = sympy.symbols("S N x", positive=True)
    e = sympy.symbols("D", positive=True)
    slope = sympy.diff(rule(density, coherent, e, noise), density)
    equal(slope, 2 * density * coherent + (1 - 2 * density) * e + noise)
    at_one, at_zero = (slope.subs(density, value) for value in (1, 0))  # linear in the density: its ends decide
    equal(sympy.diff(slope, density, 2), 0)
    _sign(at_one.subs(e, 2 * coherent + noise - slack))
    _sign(at_zero)


def prove_attention_factors(rule=lambda *retained: sympy.Matrix(attention_mask_factors(*retained))):
    """Logit q.k and value path o v x of one-dimensional heads, each weight masked on its own."""
    shares = sympy.symbols("r_q r_k r_v r_o", positive=True)
    stds = sympy.symbols("s_q s_k s_v s_o", positive=True)
    w = sympy.symbols("w_q w_k w_v w_o")
    moments = {x: [1, 0, r * s**2] for x, r, s in zip(w, shares, stds, strict=True)}
    dense = {x: [1, 0, s**2] for x, s in zip(w, stds, strict=True)}
    paths = ((w[0] * w[1]) ** 2, (w[2] * w[3]) ** 2)
    for factor_, path in zip(rule(*shares), paths, strict=True):
        equal(factor_, expect(path, moments) / expect(path, dense))


def _magnitude_integral(power):
    """E |w|^power 1(|w| > tau) and P(|w| > tau) as functions of tau."""
    tau, w = sympy.symbols("tau w", positive=True)
    normal = sympy.exp(-(w**2) / 2) / sympy.sqrt(2 * sympy.pi)
    kept = 2 * sympy.integrate(w**power * normal, (w, tau, sympy.oo))
    return tau, kept.rewrite(sympy.erf), 1 - sympy.integrate(2 * normal, (w, 0, tau))


def prove_magnitude(rule=magnitude_retained_variance):
    _, kept, share = _magnitude_integral(2)
    equal(rule(share, sympy), kept)


def prove_magnitude_fourth(rule=magnitude_fourth_moment):
    _, kept, share = _magnitude_integral(4)
    equal(rule(share, sympy), kept)


def prove_magnitude_concave(rule=magnitude_retained_variance):
    # slope tau^2 > 0 and, tau falling with the share, a negative second derivative; 1 at share 1 and 0 at share 0
    tau, _, share = _magnitude_integral(2)
    slope = sympy.simplify(sympy.diff(rule(share, sympy), tau) / sympy.diff(share, tau))
    equal(slope, tau**2)
    _sign(sympy.diff(slope, tau) / sympy.diff(share, tau), positive=False)
    equal(rule(sympy.Integer(1), sympy), 1)


def _largest_moment(rank: int, group: int, power: int) -> Any:
    """E |w|^power of the rank-th largest of `group` standard normal magnitudes."""
    count = rank * mpmath.binomial(group, rank)

    def integrand(w):
        above = mpmath.erfc(w / mpmath.sqrt(2))
        return w**power * count * above ** (rank - 1) * (1 - above) ** (group - rank) * 2 * mpmath.npdf(w)

    return mpmath.quad(integrand, [0, 2, 5, 12])


def prove_ranked(rule=ranked_moment):
    close(rule(1, 2, 2), mpmath.mpf(1) / 2 + 1 / mpmath.pi)  # E max(a^2, b^2) = 1 + 2 / pi
    for kept, group, power in ((2, 4, 2), (1, 3, 4)):
        close(rule(kept, group, power), sum(_largest_moment(r, group, power) for r in range(1, kept + 1)) / group)


PROOFS = [
    Proof(
        "second moment of a Bernoulli-masked output", "independent mask, Gaussian weights", prove_second_moment, CASES
    ),
    Proof("it increases with the density", "independent mask", prove_retained_variance_increases),
    Proof("its excess kurtosis", "independent mask, Gaussian weights", prove_kurtosis, CASES),
    Proof("which falls with the density", "independent mask, Gaussian weights", prove_kurtosis_falls),
    Proof(
        "its fourth moment, given and Gaussian inputs", "independent mask, Gaussian weights", prove_fourth_moment, CASES
    ),
    Proof("excess kurtosis under a block mask", "independent blocks, Gaussian weights", prove_block_kurtosis, CASES),
    Proof("concentration of blocks of inputs", "Gaussian inputs", prove_block_concentration, CASES),
    Proof("coherent + noise: density^2 against density", "independent mask", prove_structured, CASES),
    Proof("it increases with the density", "entries <= 2 coherent + noise", prove_structured_increases),
    Proof("masks on Q, K against V, O", "independent masks", prove_attention_factors, CASES),
    Proof("variance kept by a magnitude mask", "Gaussian weights, infinite matrix", prove_magnitude),
    Proof("fourth moment kept by a magnitude mask", "Gaussian weights, infinite matrix", prove_magnitude_fourth),
    Proof("kept variance is concave in the density", "Gaussian weights, infinite matrix", prove_magnitude_concave),
    Proof("moments kept by an n-of-m mask (1e-10)", "Gaussian weights", prove_ranked),
]
