"""Proofs of varprop/theory/stream.py."""

from __future__ import annotations

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, Proof, ProofError, close, equal, expect, normal_moments
from varprop.theory.stream import (
    aligned_asymptote,
    aligned_bounds,
    power_sum,
    stationary_second_moment,
    stream_profile,
    stream_step,
    triangle_bound,
    zeta,
)

q, v, a, y = sympy.symbols("q v a y", positive=True)
r = sympy.symbols("r", real=True)


def prove_step(rule=stream_step):
    """x and f as combinations of two independent unit variables with correlation r; and the form in y = sqrt(q)."""
    first, second = sympy.symbols("z_1 z_2")
    stream = sympy.sqrt(q) * first
    branch = sympy.sqrt(v) * (r * first + sympy.sqrt(1 - r**2) * second)
    moments = {first: normal_moments(1), second: normal_moments(1)}
    equal(rule(q, v, r, a, sympy), expect((a * stream + branch) ** 2, moments))
    equal(rule(y**2, v, r, a, sympy), (a * y + r * sympy.sqrt(v)) ** 2 + (1 - r**2) * v)


def prove_triangle(rule=triangle_bound):
    """One step from the bound with r = 1 gives the bound of one more term; what is left is 2 (1 - r) y sqrt(v)."""
    total, root = sympy.symbols("S w", positive=True)
    before, after = rule(q, total), rule(q, total + root)
    equal(stream_step(before, root**2, 1, 1, sympy), after)
    equal(stream_step(y**2, root**2, 1, 1, sympy) - stream_step(y**2, root**2, r, 1, sympy), 2 * (1 - r) * y * root)


def prove_stationary(rule=stationary_second_moment):
    """A fixed point, at r < 0 for a = 1 and at a < 1; the slope there is 1 - 2 r^2 for a = 1."""
    r0 = sympy.symbols("r_0", positive=True)
    level = rule(v, -r0, 1, sympy)
    equal(stream_step(level, v, -r0, 1, sympy), level)
    equal(sympy.diff(stream_step(q, v, -r0, 1, sympy), q).subs(q, level), 1 - 2 * r0**2)
    for r_value, a_value in ((0, sympy.Rational(1, 2)), (sympy.Rational(1, 3), sympy.Rational(3, 4))):
        level = rule(v, r_value, a_value, sympy)
        equal(stream_step(level, v, r_value, a_value, sympy), level)


def prove_aligned(rule=aligned_asymptote):
    """The two leading terms: sqrt(rule) = r A l + (1 - r^2) V / (2 r A) ln l + O(1), and y' - y expands to them.

    y' - y = r sqrt(v) + (1 - r^2) v / (2 y) + O(1 / y^2): with y ~ r sqrt(v) l the second term sums to the logarithm.
    """
    n, amplitude, power, r0 = sympy.symbols("l A V r_0", positive=True)
    small = sympy.symbols("h", positive=True)
    root = sympy.sqrt(rule(1 / small, power, amplitude, r0, q, sympy))
    equal(sympy.limit(root * small, small, 0), r0 * amplitude)
    rest = sympy.diff(sympy.sqrt(rule(n, power, amplitude, r0, q, sympy)), n) - r0 * amplitude
    equal(sympy.limit(sympy.simplify(rest * n), n, sympy.oo), (1 - r0**2) * power / (2 * r0 * amplitude))
    change = sympy.sqrt(stream_step(1 / small**2, v, r0, 1, sympy)) - 1 / small
    expansion = sympy.series(change, small, 0, 2).removeO()
    equal(sympy.expand(expansion), r0 * sympy.sqrt(v) + (1 - r0**2) * v * small / 2)
    equal(rule(0, power, amplitude, r0, q, sympy), q)


def prove_bounds(rule=aligned_bounds):
    """0 <= y' - y - r sqrt(v) <= (1 - r^2) v / (2 (y + r sqrt(v))), from sqrt(m^2 + e) <= m + e / (2 m); and the sum.

    (m + e / (2 m))^2 - (m^2 + e) = e^2 / (4 m^2) >= 0. The lower bound y >= y_0 + r sqrt(v) k sums to the
    harmonic sum, checked against the direct sum.
    """
    m, e = sympy.symbols("m e", positive=True)
    equal((m + e / (2 * m)) ** 2 - (m**2 + e), e**2 / (4 * m**2))
    for r_value, start in ((0.3, 1.0), (0.9, 0.0)):
        v_value, layers = mpmath.mpf("0.7"), 50
        drift = r_value * mpmath.sqrt(v_value)
        offset = mpmath.sqrt(start) / drift
        harmonic = mpmath.fsum(1 / (k + offset) for k in range(1, layers + 1))
        low = mpmath.sqrt(start) + drift * layers
        bounds = rule(layers, 0.7, r_value, start)
        close(bounds[0], low**2)
        close(bounds[1], (low + (1 - mpmath.mpf(r_value) ** 2) * v_value / (2 * drift) * harmonic) ** 2)
        last = stream_profile(start, np.full(layers, 0.7), r_value)[-1]
        if not bounds[0] <= last <= bounds[1]:
            raise ProofError(f"{last} is outside {bounds}")


def prove_power_sum(rule=power_sum):
    for power in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0):
        close(rule(1000, power), mpmath.fsum(mpmath.mpf(k) ** -power for k in range(1, 1001)))


def prove_zeta(rule=zeta):
    for power in (0.25, 0.5, 1.5, 2.0, 5.0):
        close(rule(power), mpmath.zeta(power), 1e-12)


PROOFS = [
    Proof("residual sum with a correlated branch", "skip scale, branch correlation r", prove_step),
    Proof("sqrt q_L <= sqrt q_0 + sum sqrt v_l", "skip scale 1, r <= 1", prove_triangle),
    Proof("fixed point v / (4 r^2), and with skip scale < 1", "constant v; r < 0 or a < 1", prove_stationary, CASES),
    Proof("q ~ r^2 v l^2 + (1 - r^2) v l ln l", "skip scale 1, constant v and r > 0", prove_aligned),
    Proof("two-sided bound on the aligned stream", "skip scale 1, constant v and r > 0", prove_bounds),
    Proof("sums of powers of the layer (1e-10)", "none", prove_power_sum),
    Proof("zeta function (1e-12)", "argument > 0", prove_zeta),
]
