"""Weight statistics against numpy, and the Lanczos norm against the SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.measure import (
    effective_density_participation,
    effective_density_threshold_tenth_rms,
    magnitude_mask_retained_variance,
    rms,
    share_above,
    spectral_norm,
    stable_rank,
)
from varprop.nn.init import make_generator


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=make_generator(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.sampled_from([(), (3,)]))
def test_definitions(seed: int, n_out: int, n_in: int, lead: tuple[int, ...]) -> None:
    w = gaussian(*lead, n_out, n_in, seed=seed)
    w = w * (gaussian(*w.shape, seed=seed + 1) > -1)
    x = w.double().numpy()
    second, fourth = (np.mean(x**power, axis=(-2, -1)) for power in (2, 4))
    np.testing.assert_allclose(rms(w), np.sqrt(second), rtol=1e-12)
    expected = np.divide(3 * second**2, fourth, out=np.zeros_like(second), where=fourth > 0)
    np.testing.assert_allclose(effective_density_participation(w), expected, rtol=1e-12)
    expected = np.mean(np.abs(x) > 0.1 * np.sqrt(second)[..., None, None], axis=(-2, -1))
    np.testing.assert_allclose(effective_density_threshold_tenth_rms(w), expected, rtol=1e-12)
    for threshold in (0.0, 0.5):
        np.testing.assert_allclose(share_above(w, threshold), np.mean(np.abs(x) > threshold, axis=(-2, -1)), rtol=1e-12)
    ordered = -np.sort(-(x**2).reshape(*lead, -1))
    for number, density in enumerate((0.5, 0.2)):
        kept = ordered[..., : max(1, round(density * n_out * n_in))].sum(axis=-1)
        expected = np.divide(kept, ordered.sum(axis=-1), out=np.zeros_like(kept), where=kept > 0)
        found = magnitude_mask_retained_variance(w, (0.5, 0.2))[..., number]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    norm = np.linalg.norm(x, ord=2, axis=(-2, -1))
    np.testing.assert_allclose(spectral_norm(w), norm, rtol=1e-5)  # steps to the smaller side: float32 rounding
    square = np.sum(x**2, axis=(-2, -1))
    expected = np.divide(square, norm**2, out=np.zeros_like(square), where=square > 0)
    np.testing.assert_allclose(stable_rank(w), expected, rtol=2e-5)


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_density_of_masked_gaussian_matrices(density: float) -> None:
    """A million entries, five standard deviations.

    Participation: below sqrt(24 / (rho n)) / 3 = 0.0033 of rho. Threshold: rho P(|z| > 0.1 sqrt(rho)), sqrt(1 / n).
    """
    w = gaussian(1000, 1000) * (torch.rand(1000, 1000, generator=make_generator(1)) < density)
    assert effective_density_participation(w).item() == pytest.approx(density, rel=5 * 0.0033)
    from_table = {1.0: 0.92034, 0.25: 0.25 * 0.96012}[density]  # P(|z| > 0.1), P(|z| > 0.05)
    assert effective_density_threshold_tenth_rms(w).item() == pytest.approx(from_table, abs=5 * 0.001)


def test_magnitude_mask_of_a_gaussian_matrix() -> None:
    """A million entries: the standard deviations are below 0.0005."""
    found = magnitude_mask_retained_variance(gaussian(1000, 1000), (0.5, 0.3, 0.1))
    np.testing.assert_allclose(found, (0.9287, 0.7833, 0.4393), atol=0.0025)


def test_thresholds_of_bfloat16_entries_are_not_rounded() -> None:
    w = torch.tensor([[0.001, 0.002]], dtype=torch.bfloat16)  # 0.001 is 0.00099945 there
    assert share_above(w, 0.000999).item() == 1.0
    assert share_above(w, 0.001).item() == 0.5


@pytest.mark.parametrize("shape", [(256, 256), (192, 512), (512, 192), (2, 128, 96)])
def test_spectral_norm_of_gaussian_matrices_is_within_one_per_cent(shape: tuple[int, ...]) -> None:
    w = gaussian(*shape)
    ratio = spectral_norm(w).numpy() / np.linalg.norm(w.double().numpy(), ord=2, axis=(-2, -1))
    assert (ratio > 0.99).all()
    assert (ratio < 1 + 1e-5).all()


def test_spectral_norm_with_a_gap_is_near_exact() -> None:
    u, v = (torch.linalg.qr(gaussian(256, 256, seed=seed)).Q for seed in (1, 2))
    values = torch.rand(256, generator=make_generator(3))
    values[0] = 1.5
    assert spectral_norm((u * values) @ v.T).item() == pytest.approx(1.5, rel=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_ranks_and_scale(factor: float) -> None:
    """Rank one, where every step beyond the first has only rounding to work on; the identity; nothing."""
    one = factor * gaussian(60, 1) @ gaussian(1, 40, seed=1)
    assert stable_rank(one).item() == pytest.approx(1.0, rel=1e-5)
    assert stable_rank(factor * torch.eye(50)).item() == pytest.approx(50.0, rel=1e-5)
    assert stable_rank(torch.zeros(4, 4)).item() == 0.0
