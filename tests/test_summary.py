"""summarise: known laws, coverage of its intervals, padded networks, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats as distributions

from varprop import presets, results, stats
from varprop.errors import ArgumentError, SchemaError
from varprop.simulate import sample
from varprop.summary import QUANTILES, quantile_interval, summarise

ABOUT = {"source": "simulation", "spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}


def result(values: np.ndarray, variable: str = "second_moment", dims=("network", "layer", "site")) -> xr.Dataset:
    """A result with these values, NaN where sites do not exist."""
    values = values.copy()
    values[..., 0, :4] = np.nan
    return results.new({variable: (dims, values)}, **ABOUT)  # type: ignore[arg-type]


def test_quantile_interval_is_the_table_of_the_sign_test():
    """n = 20, median, 95 %: x_(6) and x_(15), coverage 0.9586 (any table of the sign test)."""
    middle, low, high, coverage = quantile_interval(np.arange(1.0, 21.0), 0.5)
    assert (middle, low, high) == (10.5, 6, 15)
    assert coverage == pytest.approx(0.9586, abs=5e-5)


def test_few_replicates_say_that_they_cover_less():
    """The largest of 20 lies above the 0.95 quantile with probability 1 - 0.95^20."""
    values = np.arange(20.0)
    _, low, high, coverage = quantile_interval(values, 0.95)
    assert high == 19
    missing = distributions.binom(20, 0.95).cdf(low) + 0.95**20  # values 0..19: x_(l) = l - 1
    assert coverage == pytest.approx(1 - missing, rel=1e-12)
    assert coverage < 0.95


@settings(max_examples=50)
@given(st.integers(1, 300), st.floats(0.01, 0.99), st.floats(0.5, 0.999))
def test_quantile_intervals_cover_at_least_the_level_or_reach_an_extreme(n, probability, level):
    middle, low, high, coverage = quantile_interval(np.arange(n, dtype=float), probability, level=level)
    assert low <= middle <= high
    assert coverage >= level - 1e-12 or low == 0 or high == n - 1


@given(hnp.arrays(float, st.integers(1, 30), elements=st.floats(-5, 5)), st.floats(0.05, 0.95))
def test_quantiles_mirror(values, probability):
    """Of -x at 1 - p: the mirror image."""
    middle, low, high, coverage = quantile_interval(values, probability)
    mirrored = quantile_interval(-values, 1 - probability)
    assert float(mirrored[0]) == pytest.approx(-float(middle), abs=1e-9)
    assert mirrored[3] == pytest.approx(coverage, abs=0.05) or (low, high) != (-mirrored[2], -mirrored[1])


@pytest.mark.parametrize("law", [distributions.norm, distributions.expon, distributions.cauchy])
def test_quantile_coverage_is_exact_for_every_law(law):
    """20,000 samples of 30, 4 standard errors: 3 laws of 3 quantiles fail wrongly with probability 6e-4 at most."""
    values = law.rvs(size=(30, 20_000), random_state=5)
    for probability in (0.25, 0.5, 0.9):
        _, low, high, coverage = quantile_interval(values, probability)
        truth = law.ppf(probability)
        share = float(np.mean((low <= truth) & (truth <= high)))
        assert share == pytest.approx(coverage, abs=4 * np.sqrt(coverage * (1 - coverage) / 20_000))


def test_summary_is_that_of_numpy_and_stats():
    values = np.random.default_rng(0).lognormal(0, 0.5, (40, 3, 5))
    found = summarise(result(values), level=0.9)
    cell = found.sel(layer=2, site="resid_post")
    own = values[:, 2, 4]
    assert float(cell.second_moment_mean) == pytest.approx(own.mean())
    assert float(cell.second_moment_spread) == pytest.approx(own.std(ddof=1))
    assert float(cell.second_moment_stderr) == pytest.approx(own.std(ddof=1) / np.sqrt(40))
    ends = np.exp(stats.log_ratio_interval(own, level=0.9))
    assert (float(cell.second_moment_low), float(cell.second_moment_high)) == pytest.approx(tuple(ends))
    assert cell.second_moment_quantile.sel(quantile=0.5) == pytest.approx(np.median(own))
    assert found.attrs["interval_scale"] == "log"
    assert found["quantile"].values.tolist() == list(QUANTILES)


def test_absent_sites_stay_absent_and_zeros_are_a_sample():
    values = np.random.default_rng(0).lognormal(0, 0.5, (10, 2, 5))
    values[:, 1, 1] = 0
    found = summarise(result(values))
    assert np.isnan(found.second_moment_mean.sel(layer=0, site="attn_out"))
    assert int(found.n_networks.sel(layer=0, site="attn_out")) == 0
    zero = found.sel(layer=1, site="attn_out")
    assert float(zero.second_moment_mean) == float(zero.second_moment_low) == 0
    assert float(zero.second_moment_high) > 1e307
    results.validate(found)  # finite wherever a site exists: it can be saved


def test_the_interval_of_a_mean_of_many_zeros_covers_it():
    """20,000 samples of 16, of which a fraction is above 0: missed in 5 % at most, by 4 standard errors (0.0062)."""
    rng = np.random.default_rng(2)
    for fraction in (0.05, 0.3, 0.6):
        values = rng.lognormal(-0.005, 0.1, (16, 20_000)) * (rng.random((16, 20_000)) < fraction) / fraction
        low, high = stats.log_ratio_interval(values)
        assert np.mean((low > 0) | (high < 0)) <= 0.05 + 0.0062


@pytest.mark.parametrize("dims", [("density", "network", "layer", "site"), ("network", "density", "layer", "site")])
def test_padded_networks_are_left_out(dims):
    values = np.random.default_rng(1).lognormal(0, 0.5, (2, 12, 2, 5))
    padded = values.copy()
    padded[1, 7:] = np.nan
    arrays = xr.DataArray(padded, dims=("density", "network", "layer", "site")).transpose(*dims)
    dataset = xr.Dataset({"second_moment": arrays}, coords={"density": [0.5, 1.0]}, attrs={"source": "simulation"})
    found = summarise(dataset)
    for index, own in enumerate((values[0], values[1, :7])):
        alone = summarise(xr.Dataset({"second_moment": (("network", "layer", "site"), own)}))
        for name in alone.data_vars:
            at = found[name].isel(density=index)
            np.testing.assert_allclose(at.transpose(*alone[name].dims), alone[name], rtol=1e-12)
    assert found.n_networks.sel(density=1.0).values.tolist() == np.full((2, 5), 7).tolist()


def test_correlations_and_signed_variables_have_students_interval():
    values = np.random.default_rng(0).uniform(0.1, 0.3, (10, 2, 5))
    found = summarise(result(values, "token_correlation"), "token_correlation")
    assert found.attrs["interval_scale"] == "linear"
    low, high = stats.t_interval(values[:, 1, 0])
    cell = found.isel(layer=1, site=0)
    assert (float(cell.token_correlation_low), float(cell.token_correlation_high)) == (low, high)
    signed = summarise(result(values - 0.2, "mean_entry"), "mean_entry")
    assert signed.attrs["interval_scale"] == "linear"


def test_a_sample_has_a_summary():
    drawn = sample(presets.tiny().with_fields(n_layers=1, d_model=32, d_ff=48), n_networks=8, n_tokens=4)
    for variable in drawn.data_vars:
        found = summarise(drawn, str(variable))
        assert bool((found[f"{variable}_low"] <= found[f"{variable}_high"]).where(found.n_networks > 0, True).all())


@pytest.mark.parametrize("options", [{"level": 1.0}, {"quantiles": [0.0]}, {"quantiles": [1.5]}])
def test_domain(options):
    with pytest.raises(ArgumentError, match="outside the domain"):
        summarise(result(np.ones((3, 2, 5))), **options)


def test_refusals():
    values = np.ones((3, 2, 5))
    with pytest.raises(SchemaError, match="variable='variance' is missing"):
        summarise(result(values), "variance")
    with pytest.raises(ArgumentError, match="expected one of"):
        summarise(result(values).isel(network=0))
    with pytest.raises(ArgumentError, match="n=1 is too few replicates"):
        summarise(result(values).isel(network=[0]))
