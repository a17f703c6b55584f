"""varprop.theory.softmax_table against the integrals at integers and between, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from varprop.theory.softmax import _softmax_moments
from varprop.theory.softmax_table import MAX_KEYS, MAX_STD, softmax_table


@pytest.mark.parametrize("sphere_dim", [None, 64])
def test_table_is_the_quadrature(sphere_dim):
    """Participation to 2e-5 (relative), the other two to 3e-4 s^2 (1 - 1/n), at 60 random n (real) and s."""
    rng = np.random.default_rng(0)
    table = softmax_table(sphere_dim)
    for n, s in zip(np.exp(rng.uniform(0.1, 18, 60)), rng.uniform(0.05, MAX_STD, 60), strict=True):
        exact = _softmax_moments(n, s, sphere_dim)
        assert table.participation(n, s**2) == pytest.approx(exact.participation, rel=2e-5)
        absolute = 3e-4 * s**2 * (1 - 1 / n)
        assert table.pair(n, s**2) == pytest.approx(exact.pair, abs=absolute)
        assert table.diagonal(n, s**2) == pytest.approx(exact.diagonal, abs=absolute)


def test_edges():
    table = softmax_table()
    n = np.array([1.0, 2.0, 1e9, 1e12])
    np.testing.assert_allclose(table.participation(n, np.zeros(4)), 1 / n)
    assert (table.participation(np.ones(3), np.array([0.0, 1.0, 1e9])) == 1).all()
    assert table.log_excess(np.array(MAX_KEYS), np.array(0.01)) == pytest.approx(0.01, rel=1e-4)
    assert np.isfinite(table.pair(n, np.full(4, 1e9))).all()


def test_more_variance_means_fewer_keys():
    table = softmax_table()
    grid = table.participation(np.array([[2.0], [50.0], [1e4]]), np.linspace(0, 16, 200))
    assert (np.diff(grid, axis=1) > 0).all()
    assert ((grid <= 1) & (grid * np.array([[2.0], [50.0], [1e4]]) >= 1 - 1e-12)).all()
