"""varprop.theory.linear: limits, properties, and a comparison with drawn masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.spec import MaskSpec
from varprop.theory.linear import mask_excess_kurtosis, ranked_moment, retained_variance


@pytest.mark.parametrize("kind", ["bernoulli", "magnitude", "n_of_m", "block"])
def test_density_one_is_dense(kind):
    mask = MaskSpec(kind=kind, density=1.0)
    assert retained_variance(mask, 4096) == pytest.approx(1.0, abs=1e-12)
    assert mask_excess_kurtosis(mask, 64) == 0
    assert retained_variance(None, 4096) == 1


@given(density=st.floats(0.01, 1.0), kind=st.sampled_from(["bernoulli", "magnitude", "block"]))
def test_rescaling_and_order(density, kind):
    plain, root, inverse = (
        retained_variance(MaskSpec(kind=kind, density=density, rescale=r), 10**9)
        for r in ("none", "inverse_sqrt", "inverse")
    )
    assert root == pytest.approx(plain / density)
    assert inverse == pytest.approx(plain / density**2)
    assert density - 1e-8 <= plain <= 1 + 1e-12  # ranking keeps at least as much as chance


@pytest.mark.parametrize("kind", ["magnitude", "n_of_m"])
def test_ranked_masks_against_drawn_weights(kind):
    """400,000 groups of 4: standard error of a retained share below 0.001, checked at 5 of them."""
    mask = MaskSpec(kind=kind, density=0.5)
    w = np.random.default_rng(0).standard_normal((400_000, 4))
    size = np.abs(w)
    kept = size >= (np.sort(size, axis=1)[:, 2:3] if kind == "n_of_m" else np.median(size))
    assert np.mean(w**2 * kept) == pytest.approx(retained_variance(mask, w.size), abs=0.005)


@pytest.mark.parametrize("kind", ["bernoulli", "magnitude", "n_of_m", "block"])
def test_excess_kurtosis_against_drawn_masks(kind):
    """Excess kurtosis of y, 400,000 draws: standard error about sqrt(96 / n) = 0.016, checked at 5 of them."""
    fan_in, draws = 32, 400_000
    rng = np.random.default_rng(1)
    w, u = rng.standard_normal((draws, fan_in)), rng.standard_normal((draws, fan_in))
    u /= np.sqrt(np.mean(u**2, axis=1, keepdims=True))
    mask = MaskSpec(kind=kind, density=0.5, block_size=4)
    if kind == "bernoulli":
        kept = rng.random(w.shape) < 0.5
    elif kind == "block":
        kept = np.repeat(rng.random((draws, fan_in // 4)) < 0.5, 4, axis=1)
    elif kind == "magnitude":
        kept = np.abs(w) > 0.6744897501960817
    else:
        groups = np.abs(w).reshape(draws, -1, 4)
        kept = (groups >= np.sort(groups, axis=2)[..., 2:3]).reshape(w.shape)
    y = np.sum(w * kept * u, axis=1)
    measured = abs(np.mean(y**4) / np.mean(y**2) ** 2 - 3)
    leading_order = 0.5 * mask_excess_kurtosis(mask, fan_in)  # what O(1/fan_in^2) terms and dependence may take
    assert measured == pytest.approx(mask_excess_kurtosis(mask, fan_in), abs=0.08 + leading_order)


def test_kept_outside_the_group():
    with pytest.raises(AssumptionError, match=r"kept=5 is outside the group; expected an integer in 1\.\.4"):
        ranked_moment(5, 4, 2)


def test_a_magnitude_mask_of_few_entries():
    """2 kept of 8,192 (density 0.0003 rounds down to that): within the claimed 1 / kept of 4,000 drawn matrices."""
    mask = MaskSpec(kind="magnitude", density=0.0003)
    w = np.abs(np.random.default_rng(1).standard_normal((4_000, 8192)))
    drawn = np.mean(np.sum(np.sort(w, axis=1)[:, -2:] ** 2, axis=1)) / 8192
    assert abs(retained_variance(mask, 8192) / drawn - 1) < 0.5
    assert retained_variance(MaskSpec(kind="magnitude", density=1e-9), 8192) > 0
