"""Gauss rules for normal and chi-square averages, and roots of Gram matrices.

The rules come from the eigenvalues of the Jacobi matrix (Golub and Welsch 1969), whose eigenvectors also hold the
orthonormal Hermite polynomials at the nodes, so that a function of a normal variable is expanded with one matrix
product. Weights are probabilities: they add up to 1 and never overflow.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Array = NDArray[np.float64]
ROOT_JITTER = 1e-9
"""Added to the diagonal (relative) before a Cholesky factorisation: equal tokens make the Gram matrix singular."""


@functools.cache
def hermite_basis(n_nodes: int) -> tuple[Array, Array]:
    """Nodes z (n,) and orthonormal matrix B (n, n) with B[k, i] = sqrt(weight_i) He_k(z_i) / sqrt(k!).

    >>> z, basis = hermite_basis(20)
    >>> round(float(basis[0] ** 2 @ z**4), 12)
    3.0
    """
    off_diagonal = np.sqrt(np.arange(1.0, n_nodes))
    nodes, vectors = scipy.linalg.eigh_tridiagonal(np.zeros(n_nodes), off_diagonal)
    vectors = vectors * np.where(vectors[0] < 0, -1.0, 1.0)
    for array in (nodes, vectors):
        array.setflags(write=False)
    return nodes, vectors


def normal_nodes(n_nodes: int) -> tuple[Array, Array]:
    """Nodes and probabilities: E f(z) = sum_i p_i f(z_i), exact for polynomials of degree below 2 n."""
    nodes, basis = hermite_basis(n_nodes)
    return nodes, basis[0] ** 2


@functools.cache
def chi_square_nodes(n_nodes: int, degrees: int) -> tuple[Array, Array]:
    """Nodes and probabilities of chi^2_degrees / degrees; the single value 0 for 0 degrees.

    >>> x, p = chi_square_nodes(6, 64)
    >>> round(float(p @ x), 12), round(float(p @ x**2) - 1, 12)
    (1.0, 0.03125)
    """
    if degrees == 0:
        return np.zeros(1), np.ones(1)
    k, shape = np.arange(float(n_nodes)), degrees / 2 - 1
    diagonal = 2 * k + 1 + shape
    off_diagonal = np.sqrt(k[1:] * (k[1:] + shape))
    nodes, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal)
    return np.maximum(nodes, 0.0) * 2 / degrees, vectors[0] ** 2


def gram_root(gram: np.ndarray) -> np.ndarray:
    """A lower-triangular (or symmetric, for a matrix that rounding made indefinite) root of each (..., T, T) matrix."""
    size = gram.shape[-1]
    scale = np.trace(gram, axis1=-2, axis2=-1)[..., None, None] / size
    try:
        return np.linalg.cholesky(gram + ROOT_JITTER * scale * np.eye(size))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        return vectors * np.sqrt(np.maximum(values, 0.0))[..., None, :]
