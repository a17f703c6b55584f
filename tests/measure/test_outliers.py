"""Outlier statistics against numpy, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varprop.measure import largest_energy_share, max_to_median, outlier_share


@pytest.fixture(params=[(7,), (3, 50), (2, 3, 8)], ids=str)
def x(request: pytest.FixtureRequest) -> torch.Tensor:
    """Heavy tails, so that some entries are far out."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(request.param, generator=generator, dtype=torch.float64) ** 5


def rows(x: torch.Tensor) -> list[np.ndarray]:
    return list(x.numpy().reshape(-1, x.shape[-1]))


def test_against_numpy(x: torch.Tensor) -> None:
    shares = [np.mean(np.abs(row - row.mean()) > 1.5 * row.std()) for row in rows(x)]
    energies = [np.sort(row**2)[-5:].sum() / (row**2).sum() for row in rows(x)]
    middles = [np.sort(np.abs(row))[(len(row) - 1) // 2] for row in rows(x)]
    ratios = [np.abs(row).max() / middle for row, middle in zip(rows(x), middles, strict=True)]
    assert max(shares) > 0
    for found, expected in (
        (outlier_share(x, 1.5), shares),
        (largest_energy_share(x, 5), energies),
        (max_to_median(x), ratios),
    ):
        assert found.shape == x.shape[:-1]
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.flatten(), expected, rtol=1e-12)


def test_nothing_stands_out_where_all_are_equal() -> None:
    equal, zero = torch.full((20,), 3.0), torch.zeros(20)
    assert outlier_share(equal, 3.0) == outlier_share(zero, 3.0) == 0
    assert largest_energy_share(equal, 10) == 0.5
    assert largest_energy_share(zero, 10) == max_to_median(zero) == 0
    assert max_to_median(equal) == largest_energy_share(equal, 30) == 1
