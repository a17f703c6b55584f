"""Proofs of varprop/theory/coherent.py: f_l = m + xi_l, second moments a of xi and b of m; factors f, g."""

from __future__ import annotations

import itertools
import math

import sympy

from proofs.check import CASES, NUMERICAL, Proof, ProofError, branches_agree, equal, expect, normal_moments
from varprop.theory.coherent import (
    break_even_common_factor,
    break_even_density,
    coherent_correlation,
    coherent_second_moment,
    coherent_share,
    critical_correlation,
    log_share,
    masked_noise_factor,
    mitigation_onset,
    optimal_density,
)

a, b, q0, f, g, k, rho = sympy.symbols("a b q_0 f g k rho", positive=True)
layer = sympy.symbols("l", positive=True)
w = sympy.symbols("w", nonnegative=True)


def _stream(n_layers):
    """The stream as a sum of independent variables, those variables' moments, and one block output after it."""
    start, common = sympy.symbols("x_0 m")
    noise = sympy.symbols(f"xi:{n_layers + 1}")
    moments = {start: normal_moments(q0), common: normal_moments(b), **{x: normal_moments(a) for x in noise}}
    return start + sum(common + x for x in noise[:-1]), moments, common + noise[-1]


def prove_second_moment(rule=coherent_second_moment):
    for n_layers in (1, 3):
        stream, moments, _ = _stream(n_layers)
        equal(rule(n_layers, a, b, q0, xp=sympy), expect(stream**2, moments))
    equal(rule(layer, a, b, q0, f, g, sympy), rule(layer, f * a, g * b, q0, xp=sympy))


def prove_share(rule=coherent_share):
    """The share itself, and its gradient: dU/df > 0, d/d(common scale) > 0, and the sign of dU/dg."""
    equal(rule(layer, a, b, q0, f, g, sympy) * coherent_second_moment(layer, a, b, q0, f, g, sympy), f * a + g * b)
    share, square = rule(layer, a, b, q0, f, g, sympy), coherent_second_moment(layer, a, b, q0, f, g, sympy) ** 2
    more = sympy.symbols("n", nonnegative=True)  # l = 1 + n
    by_noise = sympy.expand(sympy.simplify(sympy.diff(share, f) * square).subs(layer, 1 + more))
    equal(by_noise, sympy.expand(a * (q0 + g * b * (1 + more) * more)))
    by_common = sympy.simplify(sympy.diff(share, g) * square)
    equal(by_common, b * (q0 - f * a * layer * (layer - 1)))
    scaled = rule(layer, a, b, q0, k * f, k * g, sympy)
    total = coherent_second_moment(layer, a, b, q0, k * f, k * g, sympy)
    equal(sympy.diff(scaled, k) * total**2, q0 * (f * a + g * b))


def prove_correlation(rule=coherent_correlation):
    for n_layers in (1, 3):
        stream, moments, output = _stream(n_layers)
        size = sympy.sqrt(expect(stream**2, moments) * expect(output**2, moments))
        equal(rule(n_layers, a, b, q0, sympy), expect(stream * output, moments) / size)
    equal(sympy.limit(rule(layer, a, b, q0, sympy), layer, sympy.oo), sympy.sqrt(b / (a + b)))


def prove_masked(rule=masked_noise_factor):
    """A masked row (M + Z) u with fixed M and noise Z: E y^2 over masks and Z, split in M u and the rest."""
    entries, inputs = sympy.symbols("M_0:3", real=True), sympy.symbols("u_0:3", real=True)
    noise = sympy.symbols("Z_0:3")
    std = sympy.symbols("s", positive=True)
    total = 0
    for mask in itertools.product((0, 1), repeat=3):
        output = sum(m * (e + z) * u for m, e, z, u in zip(mask, entries, noise, inputs, strict=True))
        probability = rho ** sum(mask) * (1 - rho) ** (3 - sum(mask))
        total += probability * expect(output**2, {z: normal_moments(std**2) for z in noise})
    coherent = sum(e * u for e, u in zip(entries, inputs, strict=True)) ** 2
    spread = sum(e**2 * u**2 for e, u in zip(entries, inputs, strict=True))
    random = std**2 * sum(u**2 for u in inputs)
    equal(rule(rho, spread, random, sympy) * random + rho**2 * coherent, total)


def _masked_share(density):
    """U_l with noise and spread of an output mask."""
    noise = masked_noise_factor(density, w, a, sympy) * a
    return (noise + density**2 * b) / coherent_second_moment(layer, noise, density**2 * b, q0, xp=sympy)


def prove_optimal(rule=optimal_density):
    """dU/drho changes sign from + to - at the root of (a + w) q_0 + 2 (b - w) q_0 rho - (a + w) b l (l - 1) rho^2."""
    numerator = sympy.fraction(sympy.together(sympy.diff(_masked_share(rho), rho)))[0]
    quadratic = (a + w) * q0 + 2 * (b - w) * q0 * rho - (a + w) * b * layer * (layer - 1) * rho**2
    equal(sympy.rem(sympy.Poly(sympy.expand(numerator), rho), sympy.Poly(quadratic, rho)).as_expr(), 0)
    best = rule(layer, a, b, q0, w, sympy)
    equal(sympy.expand(quadratic.subs(rho, best)), 0)
    values = {a: 3, b: 1, q0: 2, w: sympy.Rational(1, 2), layer: 5}
    if not (best.subs(values) > 0 and quadratic.subs({**values, rho: best.subs(values) / 2}) > 0):
        raise ProofError("the optimum is not the positive root")


def prove_no_common(rule=coherent_share):
    """b = 0: dU/dlog f = U (1 - l U) = f a q_0 / q_l^2 >= 0: no reduction of uncorrelated outputs raises it."""
    share = rule(layer, a, 0, q0, f, 1, sympy)
    equal(f * sympy.diff(share, f), f * a * q0 / coherent_second_moment(layer, a, 0, q0, f, 1, sympy) ** 2)


def prove_onset(rule=mitigation_onset):
    """rho* = 1 at this layer."""
    least = rule(a, b, q0, sympy)
    equal(sympy.expand(least * (least - 1) * a * b), sympy.expand(q0 * (a + 2 * b)))
    quadratic = a * q0 + 2 * b * q0 - a * b * least * (least - 1)
    equal(sympy.expand(quadratic), 0)


def prove_break_even(rule=break_even_density):
    """U(rho) - U(1) has the factors (1 - rho) and (rho - rho_0)."""
    even = rule(layer, a, b, q0, sympy)
    share, dense = _masked_share(rho).subs(w, 0), _masked_share(1).subs(w, 0)
    difference = sympy.fraction(sympy.together(share - dense))[0]
    equal(sympy.expand(difference.subs(rho, 1)), 0)
    equal(sympy.simplify(difference.subs(rho, even)), 0)
    expected = (1 - rho) * (rho - even) * b * (a * layer * (layer - 1) - q0)
    product = coherent_second_moment(layer, rho * a, rho**2 * b, q0, xp=sympy)
    product *= coherent_second_moment(layer, a, b, q0, xp=sympy)
    equal((share - dense) * product, expected)


def prove_break_even_common(rule=break_even_common_factor):
    even = rule(layer, a, b, q0, f, sympy)
    equal(coherent_share(layer, a, b, q0, f, even, sympy), coherent_share(layer, a, b, q0, xp=sympy))
    equal(even.subs(f, 1), 1)


def prove_critical(rule=critical_correlation):
    """rho* = 1 at b = r^2 v, a = (1 - r^2) v."""
    v, n = sympy.symbols("v K", positive=True)
    r = rule(layer, v, n**-1 * v * layer * (layer - 1), sympy)  # start chosen so that K = n
    start = v * layer * (layer - 1) / n
    noise, common = (1 - r**2) * v, r**2 * v
    equal(sympy.expand(noise * start + 2 * common * start - noise * common * layer * (layer - 1)), 0)
    low = rule(layer, v, v * layer * (layer - 1) / 1000, sympy)
    if not 0 < low < sympy.Rational(1, 25):
        raise ProofError(f"{low} is not the smaller root")


def prove_log_share(rule=log_share):
    """Telescoping: shares add up to 1; and the last one falls with the scale k of all increments.

    ln(q_l / q_{l-1}) = int k F' / (q_0 + k F) over the block; the logarithmic k-derivative of the integrand,
    q_0 / (k (q_0 + k F)), falls with F: later blocks lose share to earlier ones as k rises.
    """
    q1, q2 = sympy.symbols("q_1 q_2", positive=True)
    total = rule(q0, q1, q0, q2, sympy) + rule(q1, q2, q0, q2, sympy)
    equal(sympy.expand_log(total, force=True), 1)
    total_f = sympy.symbols("F", positive=True)
    integrand = k / (q0 + k * total_f)
    slope = sympy.simplify(sympy.diff(sympy.log(integrand), k))
    equal(slope, q0 / (k * (q0 + k * total_f)))
    if not sympy.simplify(sympy.diff(slope, total_f)).is_negative:
        raise ProofError("the slope does not fall")


GRID = tuple(itertools.product((1, 2, 16, 96), ("1/64", "3/4", 5), ("1/32", "3/4", 2), ("1/16", 1)))
"""l, a, b, q_0"""


def prove_share_branches(rule=coherent_share):
    factors = ((1, 1), ("1/4", "1/16"), ("3/2", 0))
    branches_agree(rule, coherent_share, [(*point, *pair) for point in GRID for pair in factors])


def prove_optimal_branches(rule=optimal_density):
    """With w below and above b; the numpy branch takes another form of the root for w > b."""
    points = [(*point, spread) for point in GRID for spread in (0, "1/64", 3)]
    branches_agree(rule, optimal_density, points, lambda n, a, b, q0, w: math.inf if n == 1 else None)


def prove_onset_branches(rule=mitigation_onset):
    branches_agree(rule, mitigation_onset, sorted({point[1:] for point in GRID}, key=str))


def prove_break_even_branches(rule=break_even_density):
    def limit(n, a, b, q0):
        return None if a * n * (n - 1) > q0 else math.inf

    branches_agree(rule, break_even_density, GRID, limit)


def prove_break_even_common_branches(rule=break_even_common_factor):
    def limit(n, a, b, q0, f):
        return None if a * n * (n - 1) > q0 else -math.inf

    points = [(*point, factor) for point in GRID for factor in ("1/2", 1, "5/4")]
    branches_agree(rule, break_even_common_factor, points, limit)


def prove_critical_branches(rule=critical_correlation):
    """At l >= 2 and K != 1/2: there the numpy branch returns infinity too, but with a RuntimeWarning on the way."""

    def limit(n, v, q0):
        k = v * n * (n - 1) / q0
        return None if k > 1 and (k - 1) ** 2 >= 4 * k else math.inf

    points = list(itertools.product((2, 3, 16, 96), ("3/64", "3/4", 5), ("1/16", 1)))
    branches_agree(rule, critical_correlation, points, limit)


PROOFS = [
    Proof(
        "coherent stream q_0 + f a l + g b l^2", "one common component, independent noise", prove_second_moment, CASES
    ),
    Proof("share: dU/df > 0, dU/dk > 0, sign of dU/dg", "coherent stream, l >= 1", prove_share),
    Proof("masking never raises the share at r = 0", "no common component", prove_no_common),
    Proof("branch correlation b l / sqrt((a + b) q)", "coherent stream", prove_correlation, CASES),
    Proof("mask factors rho and rho^2 (+ spread)", "mask independent of the weights", prove_masked, CASES),
    Proof("optimal density rho*", "coherent stream, output mask", prove_optimal, CASES),
    Proof("first layer where a mask helps", "coherent stream, output mask", prove_onset),
    Proof("density below which a mask hurts again", "coherent stream, output mask", prove_break_even),
    Proof("common factor below which the share rises", "coherent stream", prove_break_even_common),
    Proof("smallest branch correlation for which a mask helps", "coherent stream, output mask", prove_critical, CASES),
    Proof("log share of the last block falls with the scale", "q_0 + k F_l, F increasing", prove_log_share),
    Proof("share: numpy and symbolic branches agree (1e-12)", "grid of parameters", prove_share_branches, NUMERICAL),
    Proof(
        "optimal density: numpy and symbolic branches agree (1e-12)",
        "grid of parameters",
        prove_optimal_branches,
        NUMERICAL,
    ),
    Proof("onset: numpy and symbolic branches agree (1e-12)", "grid of parameters", prove_onset_branches, NUMERICAL),
    Proof(
        "break-even density: numpy and symbolic branches agree (1e-12)",
        "grid of parameters",
        prove_break_even_branches,
        NUMERICAL,
    ),
    Proof(
        "break-even common factor: numpy and symbolic branches agree (1e-12)",
        "grid of parameters",
        prove_break_even_common_branches,
        NUMERICAL,
    ),
    Proof(
        "critical correlation: numpy and symbolic branches agree (1e-12)",
        "grid of parameters",
        prove_critical_branches,
        NUMERICAL,
    ),
]
