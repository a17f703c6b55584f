"""Proofs of varprop/simulate/gram.py and gram_error.py: images of Gaussian matrices drawn without them, and masks.

Given the tokens all images are linear in Gaussian numbers, so that equal covariances of all entries are equal laws.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from proofs.check import CASES, Proof, close, equal, expect, normal_moments
from varprop.simulate.gram import gram_root
from varprop.simulate.gram_error import entry_excess, neglected_spread, neglected_variance
from varprop.spec import MaskSpec
from varprop.theory.linear import (
    bernoulli_retained_variance,
    magnitude_fourth_moment,
    magnitude_retained_variance,
    ranked_moment,
)

rho, factor, std, kappa = sympy.symbols("rho f sigma kappa", positive=True)
INPUTS = [1, 0, 1, 0, kappa]
"""Moments of independent inputs."""


def _normal(names: Sequence[sympy.Symbol], variance: Any) -> dict[sympy.Symbol, list[Any]]:
    return {name: normal_moments(variance) for name in names}


def _mask_average(function: Callable[[Sequence[int]], Any], size: int) -> Any:
    """Sum over all 0/1 masks of P(mask) * function(mask)."""
    masks = itertools.product((0, 1), repeat=size)
    return sum(rho ** sum(mask) * (1 - rho) ** (size - sum(mask)) * function(mask) for mask in masks)


def _root(rule: Callable[[torch.Tensor], torch.Tensor], tokens: list[list[int]]) -> sympy.Matrix:
    """F of some tokens, the positive root."""
    root = rule(torch.tensor(tokens, dtype=torch.float64))
    close(min(0.0, root.trace().item()), 0)
    return sympy.Matrix(root.tolist())


def prove_image(rule=gram_root):
    """F Z for two outputs i, j against H W^T, W and Z of independent N(0, 1) entries: full rank, equal tokens, a zero
    token, more tokens than inputs."""
    for tokens in ([[1, 2, 0], [0, 1, -1]], [[3, 4], [3, 4], [1, 0]], [[1, 2, 2], [0, 0, 0]], [[2], [-1], [3]]):
        images = []
        for matrix in (sympy.Matrix(tokens), _root(rule, tokens)):
            numbers = sympy.Matrix(matrix.cols, 2, sympy.symbols(f"z:{2 * matrix.cols}"))
            images.append(((matrix * numbers).flat(), _normal(numbers.flat(), 1)))
        (exact, weights), (drawn, normals) = images
        for a, b in itertools.product(range(len(exact)), repeat=2):
            close(expect(drawn[a] * drawn[b], normals), expect(exact[a] * exact[b], weights), 1e-7)


def prove_experts(rule=gram_root):
    """Sum of gated experts, each with its own matrix and slots for its tokens, unused slots being zero tokens."""
    tokens, gates = [[1, 2], [2, -1], [1, 1]], [[3, 1], [0, 2], [4, 0]]
    slots = ([0, 2], [0, 1])  # tokens of each expert
    weights = [sympy.symbols(f"w{e}_:2") for e in range(2)]
    moments = _normal([w for row in weights for w in row], 1)
    exact = [
        sum(g * sum(w * h for w, h in zip(weights[e], token, strict=True)) for e, g in enumerate(row))
        for token, row in zip(tokens, gates, strict=True)
    ]
    drawn: list[Any] = [0, 0, 0]
    normals: dict[sympy.Symbol, list[Any]] = {}
    for e, own in enumerate(slots):
        z = sympy.symbols(f"z{e}_:3")
        normals |= _normal(z, 1)
        image = _root(rule, [*(tokens[t] for t in own), [0, 0]]) * sympy.Matrix(z)
        for slot, t in enumerate(own):
            drawn[t] += gates[t][e] * image[slot]
    for t, s in itertools.product(range(3), repeat=2):
        close(expect(drawn[t] * drawn[s], normals), expect(exact[t] * exact[s], moments), 1e-7)


def prove_masked_covariance(rule=bernoulli_retained_variance):
    """Mean over masks of the covariance of two tokens: that of the Gaussian matrix drawn in its place."""
    size = 3
    first, second, w = (sympy.symbols(f"{name}:{size}") for name in "hgw")

    def covariance(mask: Sequence[int]) -> Any:
        outputs = [sum(m * factor * a * b for m, a, b in zip(mask, w, u, strict=True)) for u in (first, second)]
        return expect(outputs[0] * outputs[1], _normal(w, std**2))

    product = sum(h * g for h, g in zip(first, second, strict=True))
    equal(rule(rho, factor) * std**2 * product, _mask_average(covariance, size))


def prove_neglected_variance(rule=neglected_variance):
    """V = sum_b m_b |u_b|^2 / (rho |u|^2): mean over the inputs of |u|^4 Var V over that of |u|^4."""
    for size, side in ((2, 1), (4, 1), (4, 2), (3, 3)):
        u = sympy.symbols(f"u:{size}")
        powers = [sum(x**2 for x in u[b : b + side]) for b in range(0, size, side)]
        square = _mask_average(
            lambda mask, p=powers: sum(m * x for m, x in zip(mask, p, strict=True)) ** 2 / rho**2, len(powers)
        )
        moments, total = dict.fromkeys(u, INPUTS), sum(powers) ** 2
        share = expect(square - total, moments) / expect(total, moments)
        equal(rule(1 / rho - 1, kappa, sympy.Integer(side), sympy.Integer(size)), share)


def prove_fourth_moment(rule=neglected_variance):
    """E y^4 over masks, weights and inputs: 3 E |u|^4 (1 + Var V); also the second moment of relu2, y^4 / 2."""
    for size in (1, 2, 3):
        u, w = sympy.symbols(f"u:{size}"), sympy.symbols(f"w:{size}")

        def fourth(mask: Sequence[int], u: Any = u, w: Any = w) -> Any:
            y = sum(m * a * b for m, a, b in zip(mask, w, u, strict=True))
            return expect(y**4, {**_normal(w, 1 / rho), **dict.fromkeys(u, INPUTS)})

        plain = expect(sum(x**2 for x in u) ** 2, dict.fromkeys(u, INPUTS))
        excess = rule(1 / rho - 1, kappa, sympy.Integer(1), sympy.Integer(size))
        equal(3 * plain * (1 + excess), _mask_average(fourth, size))


def prove_neglected_spread(rule=neglected_spread):
    """Var P over masks and weights, P = sum over tokens and the b outputs of a block row of y^2, against the same
    for Gaussian entries of variance 1; both averaged over the inputs."""
    for size, side, n_tokens in ((1, 1, 2), (2, 1, 1), (2, 1, 2), (3, 1, 2), (2, 2, 1), (2, 2, 2)):
        u = [sympy.symbols(f"u{t}_:{size}") for t in range(n_tokens)]
        w = [sympy.symbols(f"w{i}_:{size}") for i in range(side)]
        weights = [x for row in w for x in row]
        inputs = {x: INPUTS for row in u for x in row}

        def moment(power: int, variance: Any, mask: Sequence[int], parts: Any = (u, w, weights, side)) -> Any:
            u, w, weights, side = parts
            kept = [mask[j // side] for j in range(len(u[0]))]
            outputs = [sum(m * a * b for m, a, b in zip(kept, row, token, strict=True)) for row in w for token in u]
            return expect(sum(y**2 for y in outputs) ** power, _normal(weights, variance))

        blocks = size // side
        mean = moment(1, 1, (1,) * blocks)
        plain = expect(moment(2, 1, (1,) * blocks) - mean**2, inputs)
        masked = expect(_mask_average(lambda mask, f=moment: f(2, 1 / rho, mask), blocks) - mean**2, inputs)
        integers = (sympy.Integer(x) for x in (side, size, n_tokens))
        equal(rule(1 / rho - 1, kappa, *integers), masked / plain - 1)


def prove_entry_excess(rule=entry_excess):
    """nu = E w^4 / (3 (E w^2)^2) - 1; independent entries add 3 nu (E w^2)^2 sum u^4 to the fourth cumulant of w.u."""
    second, fourth = sympy.symbols("m2 m4", positive=True)
    u, w = sympy.symbols("u:3"), sympy.symbols("w:3")
    moments = {x: [1, 0, second, 0, fourth] for x in w}
    y = sum(a * b for a, b in zip(u, w, strict=True))
    cumulant = expect(y**4, moments) - 3 * expect(y**2, moments) ** 2
    equal(cumulant, 3 * (fourth / (3 * second**2) - 1) * second**2 * sum(x**4 for x in u))
    for density in (0.25, 0.5):
        ranked = ranked_moment(round(4 * density), 4, 4) / ranked_moment(round(4 * density), 4, 2) ** 2
        largest = magnitude_fourth_moment(density) / magnitude_retained_variance(density) ** 2
        for kind, ratio in (("bernoulli", 3 / density), ("n_of_m", ranked), ("magnitude", largest)):
            close(rule(MaskSpec(kind=kind, density=density)), float(ratio) / 3 - 1)  # type: ignore[arg-type]
        close(rule(MaskSpec(kind="block", density=density)), 1 / density - 1)


PROOFS = [
    Proof("Cov(F Z) = H H^T for independent outputs (1e-7)", "tokens given, any rank", prove_image),
    Proof("gated sum of experts drawn slot by slot (1e-7)", "tokens and gates given", prove_experts),
    Proof("mean covariance of two tokens under a mask", "Bernoulli mask, 3 inputs", prove_masked_covariance, CASES),
    Proof("Var V = nu (kurtosis + b - 1) / (n + kurtosis - 1)", "independent inputs", prove_neglected_variance, CASES),
    Proof("fourth moment larger by Var V", "Bernoulli mask, independent inputs", prove_fourth_moment, CASES),
    Proof(
        "variance over networks of a layer's power",
        "masks in blocks, independent tokens",
        prove_neglected_spread,
        CASES,
    ),
    Proof("nu of ranked masks from the kurtosis of entries", "entries independent", prove_entry_excess),
]
