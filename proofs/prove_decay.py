"""Proofs of varprop/theory/decay.py: stationary moments of the linear recursion of weight and momentum."""

from __future__ import annotations

import itertools
import math

import mpmath
import sympy

from proofs.check import NUMERICAL, Proof, branches_agree, close, equal
from varprop.theory.decay import equilibrium_steps, normalizer_factor, weight_equilibrium, weight_second_moment

eta, lam = sympy.symbols("eta lambda", positive=True)
b = sympy.symbols("b_1", positive=True)


def prove_equilibrium(rule=weight_equilibrium):
    """m' = b m + (1 - b) g, w' = (1 - eta lambda) w - eta m', g white of unit variance: stationary moments."""
    momentum, cross, weight = sympy.symbols("M C W")
    keep = 1 - eta * lam
    after_cross = keep * b * cross - eta * momentum
    solution = sympy.solve(
        [
            b**2 * momentum + (1 - b) ** 2 - momentum,
            after_cross - cross,
            keep**2 * weight - 2 * keep * eta * b * cross + eta**2 * momentum - weight,
        ],
        [momentum, cross, weight],
        dict=True,
    )[0]
    equal(rule(eta, lam, b, sympy), solution[weight])
    equal(sympy.limit(rule(eta, lam / eta, b, sympy) / eta**2 * lam, lam, 0), sympy.Rational(1, 2))


def prove_steps(rule=equilibrium_steps):
    equal(sympy.log(1 - eta * lam) * 2 * rule(eta, lam, sympy), -1)


def prove_steps_branches(rule=equilibrium_steps):
    points = list(itertools.product(("1/65536", "1/1024", "3/8"), (0, "1/64", "1/8", 2)))
    branches_agree(rule, equilibrium_steps, points, lambda rate, decay: None if decay else math.inf)


def prove_trajectory(rule=weight_second_moment):
    step, start = sympy.symbols("t w_0", positive=True)
    now, later = rule(step, start, eta, lam, sympy), rule(step + 1, start, eta, lam, sympy)
    equal(sympy.simplify(sympy.expand_power_exp(later) - (1 - eta * lam) ** 2 * now), eta**2)
    equal(rule(0, start, eta, lam, sympy), start)


def prove_normalizer(rule=normalizer_factor):
    """E[g^2 (sum_j w_j n_j^{-1/2})^2] to first order in 1 - b_2, w_j = (1 - b_1) b_1^j, n_j the estimate j steps later.

    n_j = 1 + (1 - b_2) b_2^j (g^2 - 1) + background of covariance S b_2^|i - j|; n^{-1/2} = 1 - e/2 + 3 e^2/8. Other
    gradients' cross terms vanish: the update is odd in the sign of each gradient.
    """
    for beta1, beta2 in ((mpmath.mpf("0.9"), mpmath.mpf("0.95")), (mpmath.mpf(0), mpmath.mpf("0.99"))):
        terms = [(1 - beta1) * beta1**j for j in range(400)]
        own = mpmath.fsum(w * (1 - beta2) * beta2**j * 2 for j, w in enumerate(terms))  # E g^2 (g^2 - 1) = 2
        variance = 2 * (1 - beta2) ** 2 / (1 - beta2**2)
        square = mpmath.fsum(w * w for w in terms)
        pairs = mpmath.fsum(
            2 * terms[i] * terms[i + lag] * beta2**lag for lag in range(1, 400) for i in range(min(60, 400 - lag))
        )
        if beta1 > 0:  # pairs beyond i = 60 by their geometric tail
            pairs /= 1 - beta1**120
        expected = 1 - own + variance * (mpmath.mpf(6) / 8 + (square + pairs) / 4)
        close(rule(float(beta1), float(beta2)), expected)


PROOFS = [
    Proof("AdamW: E w^2 with momentum, eta / (2 lambda) for small steps", "white-noise gradients", prove_equilibrium),
    Proof("its time constant -1 / (2 ln(1 - eta lambda))", "none", prove_steps),
    Proof("time constant: numpy and symbolic branches agree (1e-12)", "grid", prove_steps_branches, NUMERICAL),
    Proof("E w^2 after t steps", "white updates of unit variance", prove_trajectory),
    Proof("factor of Adam's normaliser, first order in 1 - beta_2", "Gaussian gradients", prove_normalizer),
]
