"""varprop.theory.linear: limits, properties, and a comparison with drawn masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.spec import MaskSpec
from varprop.theory.linear import (
    attention_mask_factors,
    bernoulli_fourth_moment,
    bernoulli_retained_variance,
    block_concentration,
    block_excess_kurtosis,
    linear_second_moment,
    magnitude_fourth_moment,
    magnitude_retained_variance,
    mask_excess_kurtosis,
    ranked_moment,
    rescale_factor,
    retained_variance,
    structured_second_moment,
)


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


def test_odd_moments_without_a_mask():
    assert ranked_moment(3, 3, 1) == pytest.approx((2 / np.pi) ** 0.5)
    assert ranked_moment(3, 3, 3) == pytest.approx(2 * (2 / np.pi) ** 0.5)
    assert ranked_moment(3, 3, 4) == 3


def test_fourth_moment_of_drawn_masks():
    """E y^4 = 3 rho^2 (1 - 1/n) + 9 rho / n for Gaussian inputs, n = 8, rho = 0.3, at gain 1.

    1,000,000 draws, standard error about 0.6 %, checked at 4 of them: false-fail rate 1e-4; the wide limit 3 rho^2 is
    off by a factor 2.
    """
    fan_in, rho, draws = 8, 0.3, 1_000_000
    rng = np.random.default_rng(4)
    kept = rng.random((draws, fan_in)) < rho
    y = np.sum(rng.standard_normal((draws, fan_in)) * kept * rng.standard_normal((draws, fan_in)), axis=1) / fan_in**0.5
    expected = bernoulli_fourth_moment(rho, 1 + 2 / fan_in, 3.0, fan_in)
    assert expected == pytest.approx(3 * rho**2 * (1 - 1 / fan_in) + 9 * rho / fan_in)
    assert abs(np.mean(y**4) - expected) < 4 * np.std(y**4) / draws**0.5


def test_block_mask_of_drawn_networks():
    """Blocks of 4 of 16 inputs: variance, kurtosis, and the covariance of squares of two outputs of one block row.

    Given inputs and exact formulas; 400,000 masks, checked at 4 standard errors: false-fail rate 2e-4.
    """
    fan_in, block, rho, draws = 16, 4, 0.5, 400_000
    rng = np.random.default_rng(5)
    u = rng.standard_normal(fan_in)
    powers = np.sum(u.reshape(-1, block) ** 2, axis=1)
    concentration = np.sum(powers**2) / powers.sum() ** 2
    kept = np.repeat(rng.random((draws, fan_in // block)) < rho, block, axis=1)
    first, second = (np.sum(rng.standard_normal((draws, fan_in)) * kept * u, axis=1) for _ in range(2))
    square = rho * powers.sum()
    kurtosis = block_excess_kurtosis(rho, concentration)
    for drawn, expected in (
        (first**2, square),
        (first**4, (3 + kurtosis) * square**2),
        (first**2 * second**2, (1 + kurtosis / 3) * square**2),
    ):
        assert abs(np.mean(drawn) - expected) < 4 * np.std(drawn) / draws**0.5
    assert block_concentration(fan_in, fan_in) == 1


def test_coherent_power_goes_with_the_square_of_the_density():
    """A rank-one matrix along u plus noise, 4,000 masks of 64 x 64; standard errors below 1 %, checked at 4."""
    d, rho = 64, 0.2
    rng = np.random.default_rng(6)
    u = rng.standard_normal(d)
    coherent = np.outer(rng.standard_normal(d), u) / d
    drawn = []
    for _ in range(4_000):
        noise = 0.3 * rng.standard_normal((d, d)) / d**0.5
        drawn.append(np.mean(((rng.random((d, d)) < rho) * (coherent + noise) @ u) ** 2))
    power = np.mean((coherent @ u) ** 2), np.mean(coherent**2 @ u**2), 0.09 * np.mean(u**2)
    expected = structured_second_moment(rho, *power)
    assert abs(np.mean(drawn) - expected) < 4 * np.std(drawn) / len(drawn) ** 0.5
    assert structured_second_moment(1.0, *power) == pytest.approx(power[0] + power[2])
    assert structured_second_moment(rho, *power, rescale_factor(rho, "inverse")) > power[0] + power[2]


@given(density=st.floats(1e-6, 1.0), coherent=st.floats(0, 10), entries=st.floats(0, 10), noise=st.floats(0, 10))
def test_structured_power_increases_where_claimed(density, coherent, entries, noise):
    entries = min(entries, 2 * coherent + noise)
    low, high = (structured_second_moment(r, coherent, entries, noise) for r in (0.9 * density, density))
    assert low <= high * (1 + 1e-12)


def test_masking_can_raise_the_output_of_rows_that_cancel():
    assert structured_second_moment(0.5, 0.0, 1.0) > structured_second_moment(1.0, 0.0, 1.0)


@pytest.mark.parametrize("density", [1e-300, 1e-12, 0.5, 1.0])
def test_magnitude_masks_at_the_ends(density):
    kept, fourth = magnitude_retained_variance(density), magnitude_fourth_moment(density)
    assert density <= kept <= 1
    assert kept**2 <= fourth <= 3
    assert np.isfinite([kept, fourth]).all()


def test_attention_factors_and_rescaling():
    half = attention_mask_factors(*(bernoulli_retained_variance(0.5),) * 4)
    assert half == (0.25, 0.25)
    rescaled = bernoulli_retained_variance(0.5, rescale_factor(0.5, "inverse_sqrt"))
    assert attention_mask_factors(*(rescaled,) * 4) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: bernoulli_retained_variance(0.0),
        lambda: bernoulli_retained_variance(1.5),
        lambda: bernoulli_retained_variance("0.5"),
        lambda: magnitude_retained_variance(float("nan")),
        lambda: magnitude_retained_variance(np.array([0.5, 0.0])),
        lambda: linear_second_moment(-1.0, 1.0),
        lambda: linear_second_moment(1.0, None),
        lambda: bernoulli_fourth_moment(0.5, 1.0, 3.0, 0),
        lambda: block_excess_kurtosis(0.5, 1.1),
        lambda: structured_second_moment(0.5, float("inf"), 0.0),
        lambda: attention_mask_factors(q=True),
        lambda: rescale_factor(0.5, "sqrt"),
        lambda: ranked_moment(1, 2.5, 2),  # type: ignore[arg-type]
        lambda: ranked_moment(True, 2, 2),
    ],
)
def test_bad_input(call):
    with pytest.raises(AssumptionError, match=r"^[a-z_]+=.* is .*; expected "):
        call()
