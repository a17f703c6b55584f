"""check: verdicts, the careful cases (zeros, exact cells, references), refusals and the saved form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop import presets, results
from varprop.compare import Check, check
from varprop.errors import ArgumentError, SchemaError
from varprop.simulate import grid, sample
from varprop.spec import MaskSpec
from varprop.theory import predict

N_LAYERS = 3
ABOUT = {"spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
ABSENT = np.zeros((N_LAYERS + 1, 5), dtype=bool)
ABSENT[0, :4] = True


def cells(value: float = 1.0) -> np.ndarray:
    return np.where(ABSENT, np.nan, value * (1 + np.arange(N_LAYERS + 1))[:, None] * np.ones(5))


def theory(
    values: np.ndarray | None = None, error: float | np.ndarray | None = None, variable: str = "second_moment", **about
):
    values = cells() if values is None else values
    variables = {variable: (("layer", "site"), values)}
    if error is not None:
        name = "theory_error" if variable in ("second_moment", "variance") else f"{variable}_error"
        variables[name] = (("layer", "site"), np.where(ABSENT, np.nan, error))
    return results.new(variables, source="theory", **{**ABOUT, **about})


def networks(n: int = 64, spread: float = 0.05, ratio: float = 1.0, seed: int = 0, dim: str = "network", **about):
    rng = np.random.default_rng(seed)
    values = ratio * cells() * np.exp(spread * rng.standard_normal((n, N_LAYERS + 1, 5)) - spread**2 / 2)
    return measured(values, dim, **about)


def measured(values: np.ndarray, dim: str = "network", variable: str = "second_moment", **about) -> xr.Dataset:
    return results.new({variable: ((dim, "layer", "site"), values)}, source="simulation", **{**ABOUT, **about})


def cell(outcome: Check, layer: int, site: str) -> dict:
    return next(row for row in outcome.rows() if (row["layer"], row["site"]) == (layer, site))


def test_right_prediction_agrees():
    outcome = check(theory(), networks())
    assert outcome.verdict == "agrees"
    assert outcome.detectable < outcome.resolution == 0.05
    assert (outcome.n_networks, outcome.false_fail_rate) == (64, 0.01)
    assert len(outcome.rows()) == 5 * N_LAYERS + 1


def test_error_beyond_detectable_disagrees_everywhere():
    outcome = check(theory(), networks(ratio=1.1))
    assert {row["verdict"] for row in outcome.rows()} == {"disagrees"}


def test_claimed_error_covers_a_difference():
    assert check(theory(error=0.1), networks(ratio=1.05)).verdict == "agrees"
    assert check(theory(error=0.02), networks(ratio=1.1)).verdict == "disagrees"


def test_one_wrong_cell_is_found_and_named():
    values = cells()
    values[2, 3] *= 1.2
    outcome = check(theory(values), networks())
    wrong = [(row["layer"], row["site"]) for row in outcome.rows() if row["verdict"] == "disagrees"]
    assert wrong == [(2, "mlp_out")]
    assert outcome.verdict == "disagrees"


def test_few_networks_are_underpowered_and_say_what_they_would_see():
    outcome = check(theory(), networks(n=4, spread=0.2))
    assert outcome.verdict == "underpowered"
    assert outcome.detectable == max(row["detectable"] for row in outcome.rows()) > 0.05


def test_resolution_decides_between_agrees_and_underpowered():
    seen = check(theory(), networks()).detectable
    assert check(theory(), networks(), resolution=seen * 1.01).verdict == "agrees"
    assert check(theory(), networks(), resolution=seen * 0.99).verdict == "underpowered"


def test_headline_says_the_error_seen_beyond_the_claim():
    """Claims differ between cells: the largest excess is compared with the resolution, not the largest error."""
    error = np.where(np.arange(N_LAYERS + 1)[:, None] == 1, 0.3, 0.1)
    outcome = check(theory(error=error), networks(), resolution=0.1)
    excess = max(row["detectable"] - row["theory_error"] for row in outcome.rows())
    assert outcome.verdict == "agrees"
    assert excess < 0.1 < 0.3 < outcome.detectable
    assert f"would see an error of {100 * excess:.2g} % beyond the claimed one in every cell" in outcome.headline()
    assert "asked for 10 %" in outcome.headline()


def test_seeds_count_as_replicates():
    assert check(theory(), networks(dim="seed")).n_networks == 64


def test_reference_ensemble_adds_its_error_in_quadrature():
    reference, drawn = networks(n=640, seed=1), networks(seed=2)
    outcome = check(reference, drawn)
    assert outcome.verdict == "agrees"
    alone = check(theory(), drawn)
    more = cell(outcome, 2, "mlp_out")["deviation_stderr"] / cell(alone, 2, "mlp_out")["deviation_stderr"]
    assert 1.02 < more < 1.08  # sqrt(1 + 1/10) = 1.049, spreads known to 9 %
    assert outcome.dataset.attrs["degrees_of_freedom"] == 63


def test_stderr_of_the_prediction_adds_in_quadrature():
    sampled = theory()
    sampled["second_moment_stderr"] = (("layer", "site"), 0.01 * cells())
    row, alone = (cell(check(p, networks()), 1, "attn_out") for p in (sampled, theory()))
    assert row["deviation_stderr"] == pytest.approx(np.hypot(0.01, alone["deviation_stderr"]), rel=1e-12)


def test_absent_parts_are_zero_on_both_sides_and_agree_exactly():
    mean, drawn = cells(), networks().second_moment.values
    mean[1:, 1], drawn[:, 1:, 1] = 0, 0
    row = cell(check(theory(mean), measured(drawn)), 2, "attn_out")
    assert (row["verdict"], row["ratio"], row["p_value"], row["stderr"]) == ("agrees", 1.0, 1.0, 0.0)
    assert row["detectable"] < 1e-12


def test_a_prediction_of_zero_disagrees_with_networks_above_it_and_can_be_saved(tmp_path):
    mean, drawn = cells(), networks().second_moment.values
    mean[2, 1] = 0
    outcome = check(theory(mean, error=0.5), measured(drawn))
    assert cell(outcome, 2, "attn_out")["verdict"] == outcome.verdict == "disagrees"
    results.save(outcome.dataset, tmp_path / "check.nc")


@pytest.mark.parametrize("above", [0, 1])
def test_networks_of_zeros_are_underpowered_and_can_be_saved(above, tmp_path):
    """A prediction above 0 of which no network, or one, shows anything: nothing is known of the mean."""
    drawn = networks().second_moment.values
    drawn[above:, 2, 1] = 0
    outcome = check(theory(), measured(drawn))
    row = cell(outcome, 2, "attn_out")
    assert (row["verdict"], row["p_adjusted"]) == ("underpowered", 1.0)
    assert outcome.verdict == "underpowered"
    results.save(outcome.dataset, tmp_path / "check.nc")


def test_whole_matrices_masked_at_random_make_no_disagreement():
    """One block a matrix, kept with probability 0.1: of 16 networks mostly none has a branch. 40 calls; a right program
    fails with probability 0.06 at most, once (fixed seed); with exact zeros every call fails."""
    mask = MaskSpec(kind="block", density=0.1, block_size=64)
    linear = {"activation": "identity", "gated": False, "d_model": 64, "d_ff": 64, "n_layers": 2}
    spec = presets.tiny().with_fields({"attention": None}).with_fields(linear | {"masks": {"up": mask, "down": mask}})
    drawn, right = sample(spec, n_networks=640, n_tokens=4, progress=False), predict(spec, n_tokens=4)
    outcomes = [check(right, drawn.isel(network=slice(i, i + 16))).verdict for i in range(0, 640, 16)]
    assert outcomes.count("disagrees") <= 2


@pytest.mark.parametrize("side", ["prediction", "measurement"])
def test_the_error_of_sampling_without_matrices_belongs_to_the_band(side):
    mean, drawn = theory(cells(1.1)), networks()
    assert check(mean, drawn).verdict == "disagrees"
    (mean if side == "prediction" else drawn).attrs["method_error"] = 0.1
    outcome = check(mean, drawn)
    assert outcome.verdict != "disagrees"
    assert outcome.dataset.attrs["method_error"] == 0.1
    assert cell(outcome, 2, "attn_out")["theory_error"] == 0.1
    assert "of which 10 % of the sampling method" in outcome.headline()


def test_cells_without_spread_are_decided_exactly():
    drawn = np.stack([cells(), cells()])
    assert check(theory(), measured(drawn)).verdict == "agrees"
    assert check(theory(cells(1 + 1e-9)), measured(drawn)).verdict == "disagrees"
    assert check(theory(cells(1 + 1e-9), error=1e-8), measured(drawn)).verdict == "agrees"


def test_rounding_of_the_measured_format_is_no_disagreement():
    """One part in 2^20 is 8 units of float32: inside the 16 that a pairwise sum of 65,536 squares may lose."""
    drawn = np.stack([cells(), cells()]) * (1 + 2.0**-20)
    assert check(theory(), measured(drawn, dtype="float32")).verdict == "agrees"
    assert check(theory(), measured(drawn)).verdict == "disagrees"


def test_token_correlation_is_compared_by_difference():
    rng = np.random.default_rng(1)
    mean = np.where(ABSENT, np.nan, 0.0)
    drawn = measured(mean + 0.02 * rng.standard_normal((64, *mean.shape)), variable="token_correlation")
    prediction = theory(mean, variable="token_correlation")
    outcome = check(prediction, drawn, variable="token_correlation")
    assert outcome.verdict == "agrees"
    assert "ratio" not in outcome.dataset
    shifted = theory(mean + 0.1, variable="token_correlation")
    assert check(shifted, drawn, variable="token_correlation").verdict == "disagrees"
    tolerant = theory(mean + 0.1, error=0.12, variable="token_correlation")
    assert check(tolerant, drawn, variable="token_correlation").verdict == "agrees"


def test_layers_are_joined_by_label():
    drawn = networks()
    values = drawn.second_moment.values
    turned = drawn.isel(layer=[2, 0, 3, 1])
    assert turned.second_moment.values[0, 0, 0] == values[0, 2, 0]
    assert check(theory(), turned).dataset.equals(check(theory(), drawn).dataset)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(0, 100))
def test_verdicts_do_not_depend_on_the_unit(unit, seed):
    drawn = networks(n=8, seed=seed, ratio=1.1)
    scaled = drawn.assign(second_moment=drawn.second_moment * unit)
    plain, other = check(theory(), drawn), check(theory(cells(unit)), scaled)
    assert plain.dataset.verdict.equals(other.dataset.verdict)
    np.testing.assert_allclose(plain.dataset.p_value, other.dataset.p_value, rtol=1e-8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_tokens": 16}, "measured n_tokens=16 is another; expected 8"),
        ({"spec_id": "f" * 12}, "measured spec_id=ffffffffffff is another; expected 000000000000"),
    ],
)
def test_other_models_are_refused_unless_allowed(change, message):
    with pytest.raises(ArgumentError, match=message):
        check(theory(), networks(**change))
    assert check(theory(), networks(**change), allow_other_spec=True).verdict == "agrees"


def test_other_layers_are_refused():
    with pytest.raises(ArgumentError, match=r"measured layers=\[0, 1, 2\] is different; expected \[0, 1, 2, 3\]"):
        check(theory(), networks().isel(layer=[0, 1, 2]))


@pytest.mark.parametrize("wrong", [networks(n=1), networks().isel(network=0)])
def test_one_network_is_too_few(wrong):
    with pytest.raises(ArgumentError, match=r"n_networks=1 is too few; expected at least 2"):
        check(theory(), wrong)


def test_a_reference_of_one_network_is_refused():
    with pytest.raises(ArgumentError, match=r"n_networks=1 is too few"):
        check(networks(n=1), networks())


def test_steps_have_to_be_selected():
    values = np.stack([networks(n=3).second_moment.values] * 2, axis=1)
    variables = {"second_moment": (("seed", "step", "layer", "site"), values)}
    trained = results.new(variables, source="training", **ABOUT)
    with pytest.raises(ArgumentError, match=r"one too many by 'step'; expected one step; select it first"):
        check(theory(), trained)
    assert check(theory(), trained.isel(step=0)).n_networks == 3


def test_nan_is_refused_with_its_place():
    drawn = networks()
    drawn.second_moment[5, 2, 3] = np.nan
    with pytest.raises(SchemaError, match="measured: second_moment is nan at network=5, layer=2, site=mlp_out"):
        check(theory(), drawn)


def test_negative_second_moment_is_refused():
    with pytest.raises(SchemaError, match=r"predicted: second_moment=-4.0 is negative"):
        check(theory(cells(-1.0)), networks())


def test_negative_claim_is_refused():
    with pytest.raises(SchemaError, match=r"theory_error=-0.1 is negative"):
        check(theory(error=-0.1), networks())


def test_missing_variable_is_refused():
    with pytest.raises(SchemaError, match="predicted: variable 'variance' is missing; expected one of"):
        check(theory(), networks(), variable="variance")


@pytest.mark.parametrize("arguments", [{"false_fail_rate": 0.0}, {"false_fail_rate": 1.0}, {"resolution": 0.0}])
def test_argument_domains(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        check(theory(), networks(), **arguments)


def test_saved_check_comes_back_whole(tmp_path):
    outcome = check(theory(error=0.01), networks(ratio=1.05))
    again = Check(results.load(results.save(outcome.dataset, tmp_path / "check.nc")))
    assert results.identical(again.dataset, outcome.dataset)
    assert again.table() == outcome.table()
    assert str(again) == str(outcome)
    assert again.dataset.attrs["source"] == "comparison"


def test_text_fits_a_screen_and_shows_the_worst():
    values = cells()
    values[3, 4] *= 1.3
    outcome = check(theory(values), networks())
    lines = str(outcome).splitlines()
    assert lines[0].startswith("second_moment: disagrees (1 disagrees, 15 agrees; 64 networks")
    assert len(lines) == 15
    assert any("3 resid_post" in line and "disagrees" in line for line in lines)
    assert len(outcome.table().splitlines()) == 17


def test_absent_cells_are_marked():
    assert check(theory(), networks()).dataset.verdict.sel(layer=0).values.tolist() == ["absent"] * 4 + ["agrees"]


def test_a_point_of_a_padded_grid_is_compared_as_the_sample_that_it_is() -> None:
    rng = np.random.default_rng(4)
    values = np.exp(0.1 * rng.standard_normal((2, 32, 3, 5)))
    values[:, :, 0, :4] = np.nan
    values[0, 20:] = np.nan
    values[0, :, 2] = np.nan
    own = {"spec": ABOUT["spec_json"], "spec_id": ABOUT["spec_id"], "n_tokens": ABOUT["n_tokens"]}
    variables = {
        "second_moment": (("density", "network", "layer", "site"), values),
        "point": (("density",), results.point_variable([own, own])),
        "n_networks": (("density",), [20, 32]),
        "last_layer": (("density",), [1, 2]),
    }
    coords = {"density": [1.0, 0.5]}
    padded = results.new(variables, source="simulation", coords=coords, attributes={"axes": "{}"}, **ABOUT)
    dims = ("network", "layer", "site")
    alone = results.new({"second_moment": (dims, values[0, :20, :2])}, source="simulation", **ABOUT)
    ones = np.ones((2, 5))
    ones[0, :4] = np.nan
    predicted = results.new({"second_moment": (("layer", "site"), ones)}, source="theory", **ABOUT)
    checked = check(predicted, padded.sel(density=1.0))
    assert checked.n_networks == 20
    assert checked.dataset.equals(check(predicted, alone).dataset)
    reference = check(padded.sel(density=1.0), alone)
    assert reference.verdict != "disagrees"
    with pytest.raises(ArgumentError, match="one too many by 'density'; expected one density; select it first"):
        check(predicted, padded)
    with pytest.raises(ArgumentError, match="measured is of a grid without the specs of its points"):
        check(predicted, padded.drop_vars("point").sel(density=1.0))


SPEC = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)


def test_a_point_of_a_grid_is_compared_with_the_prediction_of_its_own_spec_and_tokens(tmp_path: Path) -> None:
    axes: dict[str, Any] = {"density": [1.0, 0.25], "token_correlation": [0.0, 0.5], "n_tokens": [4, 6]}
    options: dict[str, Any] = {"n_networks": 4, "n_tokens": 4}
    drawn = results.load(results.save(grid(SPEC, axes, directory=tmp_path, **options), tmp_path / "grid.nc"))
    theories = predict(SPEC, n_tokens=4, over=axes)
    label = {"density": 0.25, "input_token_correlation": 0.5, "n_tokens": 6}
    base, masked = predict(SPEC, n_tokens=6), predict(SPEC.with_fields(density=0.25), n_tokens=6, token_correlation=0.5)
    for prediction in (masked, theories.sel(label), results.present(theories.sel(label))):
        assert check(prediction, drawn.sel(label)).n_networks == 4
        assert results.present(prediction).equals(masked)
    with pytest.raises(ArgumentError, match=f"spec_id={masked.attrs['spec_id']} is another; expected {SPEC.spec_id}"):
        check(base, results.present(drawn.sel(label)))
    for other, message in (
        ({"density": 1.0}, "spec_id=.* is another"),
        ({"n_tokens": 4}, "n_tokens=4 is another; expected 6"),
        ({"input_token_correlation": 0.0}, "token_correlation=0.0 is another; expected 0.5"),
    ):
        with pytest.raises(ArgumentError, match=message):
            check(masked, drawn.sel(label | other))
    with pytest.raises(ArgumentError, match="one too many by"):
        check(masked, drawn.sel(density=0.25, n_tokens=6))


def test_tokens_of_a_matrix_of_a_number_and_of_a_text_are_told_apart(tmp_path: Path) -> None:
    matrix, other = np.eye(4), np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    ids = np.array([[0, 1, 0, 2], [3, 3, 1, 0]])
    theory_of = {
        name: predict(SPEC, n_tokens=4, token_correlation=c)
        for name, c in (("number", 0.0), ("matrix", np.asfortranarray(matrix)), ("other", other))
    }
    gaussian = sample(SPEC, n_networks=3, n_tokens=4)
    drawn = sample(SPEC, n_networks=3, n_tokens=4, token_correlation=matrix)
    drawn = results.load(results.save(drawn, tmp_path / "drawn.nc"))
    text, text_again = (sample(SPEC, n_networks=3, inputs=ids, seed=seed) for seed in (0, 1))
    another = sample(SPEC, n_networks=3, inputs=ids[::-1])
    good = [("number", gaussian), ("matrix", drawn), ("matrix", text), ("other", text)]
    for name, measured in good:
        check(theory_of[name], measured)
    check(text, text_again)
    bad = [(theory_of["number"], drawn), (theory_of["matrix"], gaussian), (theory_of["other"], drawn)]
    bad += [(theory_of["number"], text), (text, another), (text, gaussian), (gaussian, text), (drawn, text)]
    for predicted, measured in bad:
        with pytest.raises(ArgumentError, match=r"^measured (token_correlation|inputs)=.* is .*; expected "):
            check(predicted, measured)
        check(predicted, measured, allow_other_spec=True)


def test_a_side_without_sites_is_that_of_the_stream() -> None:
    """The theory's gradients have no site; probes add a standard error for each network, which its spread holds."""
    values = cells()[:, -1]
    variables = {name: (("layer",), values * scale) for name, scale in (("g", 1.0), ("g_error", 0.0))}
    predicted = results.new(variables, source="theory", **ABOUT, coords={"site": list(results.SITES)})
    drawn = networks().rename(second_moment="g")
    drawn["g_stderr"] = 0.1 * drawn.g
    outcome = check(predicted, drawn, variable="g")
    assert outcome.verdict == "agrees"
    assert {row["site"] for row in outcome.rows()} == {"resid_post"}
    assert len(outcome.rows()) == N_LAYERS + 1
    assert check(predicted.assign(g=1.2 * predicted.g), drawn, variable="g").verdict == "disagrees"
    alone = drawn.sel(site="resid_post", drop=True)
    xr.testing.assert_allclose(check(predicted, alone, variable="g").dataset, outcome.dataset)
