"""Proofs of varprop/theory/scaling.py, against the residual scales and initial gains that a ModelSpec resolves to."""

from __future__ import annotations

import mpmath
import sympy

from proofs.check import CASES, Proof, close, equal, normal_average
from varprop.spec import AttentionSpec, ModelSpec, NormSpec, ResidualSpec
from varprop.theory.scaling import lns_gated_increment, predecessor_step, variant_second_moment, variant_share

N_LAYERS = 7
v, q0 = sympy.symbols("v q_0", positive=True)


def _branch_power(variant):
    """branch_scale^2 of a spec with this residual rule, as a rational number."""
    spec = ModelSpec(
        d_model=8, n_layers=N_LAYERS, attention=AttentionSpec(n_heads=2), residual=ResidualSpec(rule=variant)
    )
    return sympy.nsimplify(spec.branch_scale**2, rational=True, tolerance=1e-12)


def _increments(variant, layer):
    if variant == "lns":
        return [v / k for k in range(1, layer + 1)]
    factor = _branch_power(variant) if variant.startswith("inverse") else 1
    return [v * factor] * layer


def prove_second_moment(rule=variant_second_moment):
    for variant in ("pre", "lns", "inverse_sqrt_2L", "inverse_sqrt_L", "inverse_L", "peri", "reordered"):
        for layer in (1, 5):
            actual = rule(variant, layer, N_LAYERS, v, q0, xp=sympy)
            equal(actual, q0 + sum(_increments(variant, layer)))
    equal(rule("mix", 5, N_LAYERS, v, q0, 2, sympy), 1 + 3 * v)
    equal(rule("deepnorm", 5, N_LAYERS, v, q0, xp=sympy), 1)


def prove_share(rule=variant_share):
    for variant in ("pre", "lns", "inverse_sqrt_2L", "inverse_sqrt_L", "inverse_L", "peri", "reordered"):
        steps = _increments(variant, 5)
        equal(rule(variant, 5, N_LAYERS, v, q0, xp=sympy), steps[-1] / (q0 + sum(steps)))
    equal(rule("mix", 5, N_LAYERS, v, q0, 2, sympy), v / (1 + 3 * v))


def prove_deepnorm(rule=variant_share):
    """Stream alpha^2 against branch beta^4 v, alpha = skip scale and beta = ratio of initial standard deviations."""
    parts = {
        "d_model": 8,
        "n_layers": N_LAYERS,
        "attention": AttentionSpec(n_heads=2),
        "norm": NormSpec(placement="post"),
    }
    plain, deep = ModelSpec(**parts), ModelSpec(**parts, residual=ResidualSpec(rule="deepnorm"))
    stds = [{row.matrix: row.init_std for row in spec.tensor_table()} for spec in (plain, deep)]
    branch = 0.6 * (stds[1]["v"] / stds[0]["v"] * stds[1]["o"] / stds[0]["o"]) ** 2
    expected = branch / (deep.skip_scale**2 + branch)
    close(rule("deepnorm", 3, N_LAYERS, 0.6) / expected, mpmath.mpf(1))


def prove_gated(rule=lns_gated_increment):
    for layer in (1, 3, 50):
        std = mpmath.sqrt(mpmath.mpf("0.8") / layer)
        moment = normal_average(lambda z, s=std: (s * z / (1 + mpmath.exp(-s * z))) ** 2)
        close(rule(layer, 0.8, 1.5, 0.7) * layer, mpmath.mpf("0.7") * mpmath.mpf("1.5") * moment)


def prove_predecessor(rule=predecessor_step):
    """Pre-LN: y'^2 = (y + 1/2)^2 - 1/4, the aligned recursion with r sqrt(v) = 1/2; LNS: q_l = l is the solution."""
    y, layer = sympy.symbols("y l", positive=True)
    equal(rule(y**2, 1, sympy), (y + sympy.Rational(1, 2)) ** 2 - sympy.Rational(1, 4))
    equal(rule(layer, layer, sympy), layer + 1)


PROOFS = [
    Proof("second moment of placements and depth scalings", "uncorrelated branches", prove_second_moment, CASES),
    Proof("block share of the same", "uncorrelated branches", prove_share, CASES),
    Proof("DeepNorm share v / (v + 8 M sqrt(2 M)) (1e-10)", "two-matrix branch of degree 1", prove_deepnorm),
    Proof("increment of a gated network under LNS (1e-10)", "Gaussian weights", prove_gated),
    Proof("2502.05795: l^2 / 4 for Pre-LN, l for LNS", "its own recursion", prove_predecessor),
]
