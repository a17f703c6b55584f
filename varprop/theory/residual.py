"""The residual sum skip * x + branch * f; the last map of f is zero-mean, independent of x and the rest of f."""

from __future__ import annotations

from typing import Any


def residual_second_moment(stream: Any, branch: Any, skip_scale: Any = 1, branch_scale: Any = 1) -> Any:
    """Second moment (or token covariance) after a residual sum: skip_scale^2 * stream + branch_scale^2 * branch.

    stream, branch: E x_t.x_s / d and E f_t.f_s / d, of any one shape. The cross terms E x.f vanish because the output
    weights are zero-mean and independent of x: exact at any width. Source: derived in proofs/prove_residual.py.

    >>> residual_second_moment(1.0, 2.0, branch_scale=0.5)
    1.5
    """
    return skip_scale**2 * stream + branch_scale**2 * branch
