"""Proofs of varprop/theory/growth.py: coefficients of the laws as limits of the sums that define them.

r = 0: q_L = q_0 + sum of increments. r > 0: sqrt(q) lies between y_0 + S and y_0 + S + sum (1 - r^2) v_l / (2 (y + r
sqrt(v_l))), S = sum r sqrt(v_l) (prove_stream.py), and the second sum is o(S) wherever S diverges.
"""

from __future__ import annotations

import mpmath
import sympy

from proofs.check import Proof, close
from varprop.theory.growth import Increment, classify
from varprop.theory.stream import stream_step

depth = sympy.symbols("L", positive=True, integer=True)
layer = sympy.symbols("l", positive=True, integer=True)
VALUE = sympy.Rational(3, 5)


def coefficient(branches, **options):
    """The coefficient of a law, and nothing else, for the comparison with limits."""
    return classify(branches, **options).coefficient


def _sum_limit(power, depth_power, scale):
    total = sympy.summation(layer**-power, (layer, 1, depth)) * depth**-depth_power
    return sympy.limit(total / scale, depth, sympy.oo)


def _branch(power, depth_power):
    return [Increment(float(VALUE), float(power), float(depth_power))]


def prove_independent(rule=coefficient):
    for power, depth_power, scale in (
        (0, 0, depth),
        (1, 0, sympy.log(depth)),
        (0, sympy.Rational(1, 2), sympy.sqrt(depth)),
    ):
        expected = VALUE * _sum_limit(power, depth_power, scale)
        close(rule(_branch(power, depth_power)), mpmath.mpf(sympy.N(expected, 20)))
    for power, depth_power, start in ((0, 1, 0.5), (2, 0, 0.5), (3, 0, 1.0), (0, 2, 1.0)):
        expected = VALUE * _sum_limit(power, depth_power, 1)
        close(rule(_branch(power, depth_power), start=start), start + mpmath.mpf(sympy.N(expected, 20)))


def prove_aligned(rule=coefficient):
    r = sympy.Rational(2, 5)
    for power, depth_power, scale in ((0, 0, depth), (2, 0, sympy.log(depth)), (0, 1, sympy.sqrt(depth))):
        expected = VALUE * r**2 * _sum_limit(sympy.Rational(power, 2), sympy.Rational(depth_power, 2), scale) ** 2
        close(rule(_branch(power, depth_power), correlation=float(r)), mpmath.mpf(sympy.N(expected, 20)))
    expected = (1 + r * sympy.sqrt(VALUE)) ** 2  # branch scale 1 / L: S tends to r sqrt(v)
    close(rule(_branch(0, 2), correlation=float(r)), mpmath.mpf(sympy.N(expected, 20)))
    close(rule(_branch(1, 0), correlation=float(r)), 4 * mpmath.mpf(float(r)) ** 2 * mpmath.mpf(float(VALUE)))


def prove_exponential(rule=coefficient):
    """a > 1: q_l = a^{2 l} (q_0 + v / (a^2 - 1)) - v / (a^2 - 1); branches in proportion to the stream: q_0 k^l."""
    a, v, q0, n = sympy.symbols("a v q_0 n", positive=True)
    solution = a ** (2 * n) * (q0 + v / (a**2 - 1)) - v / (a**2 - 1)
    step = stream_step(solution, v, 0, a, sympy) - solution.subs(n, n + 1)
    if sympy.simplify(sympy.expand_power_exp(step)) != 0:
        raise AssertionError("not the solution")
    limit = (q0 + v / (a**2 - 1)).subs({a: sympy.Rational(5, 4), v: VALUE, q0: 2})
    close(rule(_branch(0, 0), start=2.0, skip_scale=1.25), mpmath.mpf(sympy.N(limit, 20)))
    close(rule(_branch(0, 0), start=2.0, proportional=True), mpmath.mpf(2))


def prove_bounded(rule=coefficient):
    close(rule(_branch(0, 0), correlation=-0.3), mpmath.mpf("0.6") / (4 * mpmath.mpf("0.09")))
    close(rule(_branch(0, 0), skip_scale=0.5), mpmath.mpf("0.6") / mpmath.mpf("0.75"))


PROOFS = [
    Proof("laws at r = 0: linear, logarithmic, polynomial, bounded", "increments v l^-p L^-s", prove_independent),
    Proof("laws at r > 0: quadratic, linear, squared log, bounded", "increments v l^-p L^-s", prove_aligned),
    Proof("exponential for skip scale > 1, and for v = k q", "constant v; or skip scale 1", prove_exponential),
    Proof("bounded for r < 0 and for skip scale < 1", "constant v", prove_bounded),
]
