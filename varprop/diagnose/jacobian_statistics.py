"""Statistics of a layer's mean Jacobian from its products with probes, and their standard errors.

A = J - I for the layer, and A = the branch's Jacobian for a branch; g_b = A_b^T v for a probe v and a sequence b. With
random signs E|A^T v|^2 = |A|^2 and E[v * A^T v] = diag A. Distinct probes are independent, so that a mean of products
over pairs of distinct ones has no noise of its own: squares are estimated so, of what is a mean itself.

Shape suffixes: `S` sequences, `P` parts (layer, attention, feed-forward), `k` probes, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from varprop.diagnose.bootstrap import stderr
from varprop.measure.jacobian import DEFINITIONS

Array = NDArray[np.float64]
TOKEN_MEAN = DEFINITIONS.index("token_mean")
BY_DEFINITION = ("jacobian_deviation", "jacobian_deviation_stderr", "jacobian_deviation_sequence_stderr")
BY_PART = (*BY_DEFINITION, *(f"jacobian_deviation_split_half{end}" for end in ("", "_stderr", "_sequence_stderr")))
"""Names whose values have an axis of definitions, and of parts."""


def summary(rows: Array, probes: Array | None, tokens: dict[str, Array], seed: int) -> dict[str, Any]:
    """Name -> values of one layer; (P, 3) by definition or (P) for each part, or a scalar of the layer alone.

    rows: A_b^T v, (S, P, k, D). probes: v (k, D) random signs; None = the unit vectors, so that the mean of rows is A.
    tokens: own_token and all_sources, (S, P, k') of other probes, or (S, P, 1) exact.
    Checked by: tests/diagnose/test_jacobian.py, whole Jacobians and means over all signs.
    """
    rows = rows.astype(np.float64)
    found: dict[str, Any] = _deviations(rows, probes is None, tokens, seed) | _split_half(rows, probes is None)
    value = found["jacobian_deviation"][0, TOKEN_MEAN]
    errors = (found[f"jacobian_deviation_{end}"][0, TOKEN_MEAN] for end in ("stderr", "sequence_stderr"))
    error = np.hypot(*errors)
    norm = np.sqrt(value / rows.shape[-1])
    over_sequences = found["jacobian_deviation_sequence_stderr"][0, TOKEN_MEAN]
    found["jacobian_norm"] = norm
    for name, of_square in (("jacobian_norm_stderr", error), ("jacobian_norm_sequence_stderr", over_sequences)):
        found[name] = of_square * norm / (2 * value) if value > 0 else 0.0
    mean = rows[:, 0].mean(axis=0)
    if probes is None:
        return found | _exact(mean) | {"jacobian_n_probes": 0, "matrix": mean}
    return found | _estimated(mean, probes) | {"jacobian_n_probes": len(probes)}


def relative_stderr(found: dict[str, Any]) -> float:
    """Of the layer's token_mean over probes; 0 for a layer that is the identity."""
    value, error = (found[name][0, TOKEN_MEAN] for name in ("jacobian_deviation", "jacobian_deviation_stderr"))
    return float(error / value) if value > 0 else 0.0


def _deviations(rows: Array, exact: bool, tokens: dict[str, Array], seed: int) -> dict[str, Array]:
    n_parts = rows.shape[1]
    scale = _scale(rows, exact)
    values, over_probes, over_sequences = (np.zeros((n_parts, len(DEFINITIONS))) for _ in range(3))
    for place, name in enumerate(DEFINITIONS):
        if name == "token_mean":
            of_probes = scale * np.square(rows.mean(axis=0)).sum(axis=-1)  # (P, k)
            gram = scale * np.einsum("apkd,bpkd->pab", rows, rows, optimize=True) / rows.shape[2]
            linearised = _stderr_of_mean(2 * gram.mean(axis=2))  # of psi_b, but for a constant
            over_sequences[:, place] = linearised if len(rows) > 1 else np.nan
            over_probes[:, place] = 0.0 if exact else _stderr_of_mean(of_probes)
        else:
            of_probes = tokens[name].mean(axis=0)
            over_sequences[:, place] = stderr(lambda mean: mean, tokens[name].mean(axis=2), seed=seed)
            over_probes[:, place] = _stderr_of_mean(of_probes)
        values[:, place] = of_probes.mean(axis=-1)
    return {
        "jacobian_deviation": values,
        "jacobian_deviation_stderr": over_probes,
        "jacobian_deviation_sequence_stderr": over_sequences,
    }


def _split_half(rows: Array, exact: bool) -> dict[str, Array]:
    """Mean over pairs of distinct sequences of <A_b, A_b'> / D: the mean over all splits into halves."""
    n = len(rows)
    if n < 2:
        return {}
    total = rows.sum(axis=0)
    scale = _scale(rows, exact)
    square, squares = np.square(total).sum(axis=-1), np.square(rows).sum(axis=-1)  # (P, k), (S, P, k)
    of_probes = scale * (square - squares.sum(axis=0)) / (n * (n - 1))
    name = "jacobian_deviation_split_half"
    found = {name: of_probes.mean(axis=-1)}
    found[f"{name}_stderr"] = np.zeros_like(found[name]) if exact else _stderr_of_mean(of_probes)
    if n > 2:
        shared = (rows * total).sum(axis=-1)  # <A_b, sum of all>
        without = (square - squares.sum(axis=0)) - 2 * (shared - squares)  # (S, P, k)
        left = scale * without.mean(axis=-1) / ((n - 1) * (n - 2))
        found[f"{name}_sequence_stderr"] = _jackknife(left)
    return found


def _scale(rows: Array, exact: bool) -> float:
    """From the mean of |A^T v|^2 over probes to |A|^2 / D; unit vectors add up to it."""
    return 1.0 if exact else 1 / rows.shape[-1]


ROOTS = ("jacobian_diagonal_std", "jacobian_off_diagonal_norm", "jacobian_frobenius_norm")
"""Statistics whose squares are estimated."""


def _exact(matrix: Array) -> dict[str, Any]:
    d_model = len(matrix)
    diagonal = np.diag(matrix)
    off = matrix - np.diag(diagonal)
    values = {
        "jacobian_diagonal_mean": 1 + diagonal.mean(),
        "jacobian_diagonal_std": diagonal.std(),
        "jacobian_off_diagonal_norm": np.linalg.norm(off) / (d_model**2 - d_model) ** 0.5,
        "jacobian_frobenius_norm": np.linalg.norm(matrix + np.eye(d_model)),
    }
    return values | {f"{name}_stderr": 0.0 for name in values}


def _estimated(products: Array, probes: Array) -> dict[str, Any]:
    """The same from A^T v (k, D), standard errors by the jackknife over probes; the root of a square below 0 is 0."""
    found, without = diagonal_squares(products, probes)
    values: dict[str, Any] = {}
    for name, square in found.items():
        error = _jackknife(without[name])
        root = np.sqrt(np.maximum(square, 0.0))
        if (
            name in ROOTS
        ):  # the error of a root is its square's over 2 roots, and at most the root of that of the square
            values |= {name: root, f"{name}_stderr": error / np.maximum(2 * root, error**0.5) if error > 0 else 0.0}
        else:
            values |= {name: square, f"{name}_stderr": error}
    return values


def diagonal_squares(products: Array, probes: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Unbiased estimates of the diagonal mean of J and of the squares of `ROOTS`; the same without each probe, (k).

    products: A^T v (k, D) of the probes v (k, D), k >= 3. Checked by: tests/diagnose/test_jacobian.py, all signs.
    """
    k, d_model = probes.shape
    diagonal = probes * products  # each an estimate of diag A
    sums = [diagonal, np.square(diagonal), np.square(diagonal.mean(axis=1)), np.square(products).sum(axis=1)]
    totals = [values.sum(axis=0) for values in sums]
    without = [total - values for total, values in zip(totals, sums, strict=True)]
    return _of_sums(totals, k, d_model), _of_sums(without, k - 1, d_model)


def _of_sums(sums: Sequence[Array], k: int, d: int) -> dict[str, Array]:
    """From sums over k probes of estimates of the diagonal (..., D), their squares, their means' squares, |A^T v|^2."""
    diagonal, squares, squared_means, norms = sums
    pairs = k * (k - 1)
    mean = diagonal.mean(axis=-1) / k
    mean_square = (np.square(diagonal) - squares).mean(axis=-1) / pairs
    squared_mean = (np.square(k * mean) - squared_means) / pairs
    norm = norms / k
    return {
        "jacobian_diagonal_mean": 1 + mean,
        "jacobian_diagonal_std": mean_square - squared_mean,
        "jacobian_off_diagonal_norm": (norm - d * mean_square) / (d**2 - d),
        "jacobian_frobenius_norm": norm + 2 * d * mean + d,
    }


def _stderr_of_mean(values: Array) -> Array:
    """Over the last axis; 0 of one value, which is exact."""
    n = values.shape[-1]
    return values.std(axis=-1, ddof=1) / n**0.5 if n > 1 else np.zeros(values.shape[:-1])


def _jackknife(without: Array) -> Array:
    """Standard error from the values without each entry of the leading axis."""
    return np.sqrt((len(without) - 1) * without.var(axis=0))
