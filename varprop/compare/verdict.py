"""Join a prediction and a measurement by label; a verdict with an error bar per layer and site, and for the whole.

Errors are |log(measured / predicted)|, which is the relative error where it is small; for quantities on a fixed scale
(`ABSOLUTE`) they are plain differences.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from varprop import results
from varprop.compare.cells import Side, degrees_of_freedom, judge, side_of
from varprop.compare.outcome import VERDICTS, Check
from varprop.errors import ArgumentError, SchemaError, require

ABSOLUTE = ("token_correlation",)
"""Variables compared by their difference: they lie in [-1, 1] and may be 0."""
REPLICATES = ("network", "seed")


def check(
    predicted: xr.Dataset,
    measured: xr.Dataset,
    *,
    false_fail_rate: float = 0.01,
    resolution: float = 0.05,
    variable: str = "second_moment",
    allow_other_spec: bool = False,
) -> Check:
    """Whether `measured` lies within the error that `predicted` claims, per layer and site and for the whole.

    Per cell, with L = log(mean over networks / prediction) (`token_correlation`: the difference) and e the claimed
    error: the hypothesis |true L| <= e is tested by `stats.log_band_p_value` (`stats.band_p_value`) with n - 1 degrees
    of freedom, over all m cells together by Holm's procedure. `disagrees`: rejected. Otherwise `underpowered`: the
    smallest error that would have been rejected with probability 0.9 at level false_fail_rate / m exceeds
    e + resolution (`simulate.required_networks` says how many networks are enough). Otherwise `agrees`.
    Cells known without error on both sides are decided exactly (to rounding) and stay outside Holm's count: a
    prediction of exactly 0 disagrees with any network above 0. Networks that are all 0 are no exact 0: against a
    prediction above 0 they are `underpowered`, as are networks of which one alone is above 0.

    predicted: `variable(layer, site)`; `theory_error` (for other variables than moments `<variable>_error`) and
    `<variable>_stderr`, the prediction's own sampling error, are 0 where absent. For moments the `method_error` of a
    sample without matrices (`simulate.gram_claims`), on either side, is added to the claimed error. With a `network` or
    `seed` dimension it is a reference ensemble, whose mean and standard error are used (and the smaller n gives the
    degrees of freedom).
    measured: `variable(network or seed, layer, site)`, at least 2 replicates, finite. Where a side has no `site`
    (the theory's `grad_second_moment`, one definition of `jacobian_deviation`) they meet at `resid_post` alone.
    false_fail_rate: chance that a correct prediction fails, over all cells of this call. resolution: error beyond the
    claimed one that the check has to resolve, as a log ratio (absolute for `token_correlation`).
    allow_other_spec: compare results of different spec or number of tokens.

    Exactness: where the cells of a network share a factor, for chi-square, log-normal and inverse Gaussian replicates
    with spreads up to twice the mean (of the logarithm: up to 3), 4 to 64 networks and false_fail_rate >= 1e-3, the
    false-fail rate measured is 0.0035 on the average and at most 0.0103 for 0.01; independent cells of inverse Gaussian
    spread 2 reach 0.012 to 0.029. Branches that are 0 in 70 % of the networks: at most 0.0065 from 16 networks on. One
    huge network makes no verdict. The power is 0.9 (0.89 to 0.99) for spreads up to 0.3 of the mean, and at least 0.88
    at wider ones up to the mean where less than a factor e is called detectable. What most samples miss is beyond any
    test of a mean (Bahadur and Savage 1956): one network in fifty that is five times as large as the others makes 9 to
    89 % of the calls on 16 networks fail; branches that are 0 in 5 % of the networks and else nearly equal (spread
    0.05), 71 %; 4 networks, 14 % where 70 % of the branches are 0.
    Raises `ArgumentError` for results that cannot be compared, `SchemaError` for damaged ones (NaN included).
    Checked by: tests/statistical/test_check_calibration.py, experiments/benchmarks/calibration_small.py, on real
    networks experiments/calibration.py.

    >>> cells = np.array([[np.nan] * 4 + [1.0], [1.0, 0.5, 1.5, 0.5, 2.0]])
    >>> about = {"spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
    >>> theory = results.new({"second_moment": (("layer", "site"), cells)}, source="theory", **about)
    >>> networks = cells * np.exp(0.01 * np.random.default_rng(0).standard_normal((64, 2, 5)))
    >>> drawn = results.new({"second_moment": (("network", "layer", "site"), networks)}, source="simulation", **about)
    >>> check(theory, drawn).verdict, check(theory.assign(second_moment=1.2 * theory.second_moment), drawn).verdict
    ('agrees', 'disagrees')
    """
    rate = "a number in (0, 1)"
    require(0 < false_fail_rate < 1, ArgumentError, "false_fail_rate", false_fail_rate, "outside the domain", rate)
    require(resolution > 0, ArgumentError, "resolution", resolution, "outside the domain", "a number > 0")
    log_scale = variable not in ABSOLUTE
    predicted, measured = results.present(predicted), results.present(measured)
    measured = _matched(predicted, measured, variable, allow_other_spec)
    prediction = _side(predicted, variable, log_scale, "predicted")
    estimate = _side(measured, variable, log_scale, "measured")
    for side, fewest in ((estimate, 2), (prediction, 0)):
        enough = side.replicates >= fewest and side.replicates != 1
        require(enough, ArgumentError, "n_networks", max(1, side.replicates), "too few", "at least 2 networks or seeds")
    method_error = _method_error(predicted, variable) + _method_error(measured, variable)
    cells = judge(
        prediction,
        estimate,
        _claimed_error(predicted, variable) + method_error,
        rounding=_rounding(measured),
        false_fail_rate=false_fail_rate,
        resolution=resolution,
    )
    verdict = cells["verdict"]
    attributes = {
        "variable": variable,
        "verdict": next((name for name in VERDICTS if (verdict == name).any()), "absent"),
        "detectable": float(np.nanmax(cells["detectable"])),
        "false_fail_rate": float(false_fail_rate),
        "resolution": float(resolution),
        "method_error": method_error,
        "n_networks": estimate.replicates,
        "degrees_of_freedom": degrees_of_freedom(prediction, estimate),
        "predicted_source": predicted.attrs["source"],
        "measured_source": measured.attrs["source"],
        "measured_spec_id": measured.attrs["spec_id"],
    }
    dataset = results.new(
        {name: (("layer", "site"), values) for name, values in cells.items()},
        source="comparison",
        spec_json=predicted.attrs["spec"],
        spec_id=predicted.attrs["spec_id"],
        n_tokens=measured.attrs["n_tokens"],
        coords={"layer": predicted.layer.values},
        seed_entropy=measured.attrs["seed_entropy"],
        dtype=measured.attrs["dtype"],
        device=measured.attrs["device"],
        attributes=attributes,
    )
    return Check(dataset)


def _matched(predicted: xr.Dataset, measured: xr.Dataset, variable: str, allow_other_spec: bool) -> xr.Dataset:
    """`measured` in the layer order of `predicted`; raises where the two cannot be compared."""
    for where, dataset in (("predicted", predicted), ("measured", measured)):
        results.validate(dataset, where=where)
        if variable not in dataset:
            raise SchemaError(f"{where}: variable {variable!r} is missing; expected one of {list(dataset.data_vars)}")
        dims = dataset[variable].dims
        for dim in dims:
            require(
                dim in (*REPLICATES, "layer", "site"),
                ArgumentError,
                f"{where} {variable} dimensions",
                dims,
                f"one too many by {dim!r}",
                f"one {dim}; select it first, as with .isel({dim}=-1)",
            )
        if "layer" not in dims or set(REPLICATES) <= set(dims):
            expected = "layer, site and one of network, seed"
            raise ArgumentError(f"{where} {variable} dimensions={dims} is wrong; expected {expected}")
        if "axes" in dataset.attrs and not allow_other_spec:
            raise ArgumentError(f"{where} is of a grid without the specs of its points; expected one with them")
    for name in () if allow_other_spec else ("spec_id", "n_tokens"):
        ours, theirs = str(predicted.attrs[name]), str(measured.attrs[name])
        if ours != theirs:
            raise ArgumentError(f"measured {name}={theirs} is another; expected {ours}, that of the prediction")
    if not allow_other_spec:
        _check_tokens(predicted, measured)
    layers, wanted = measured.layer.values.tolist(), predicted.layer.values.tolist()
    require(sorted(layers) == sorted(wanted), ArgumentError, "measured layers", layers, "different", str(wanted))
    return measured.sel(layer=predicted.layer.values)


def _check_tokens(predicted: xr.Dataset, measured: xr.Dataset) -> None:
    """Both read the same tokens, where both say which: Gaussian ones of a number or a matrix, or given inputs.

    A prediction cannot read given inputs: one with a correlation matrix is taken to be that of the inputs.
    """
    (ours, _), (theirs, given) = (_tokens(dataset) for dataset in (predicted, measured))
    if "" in (ours, theirs) or ours == theirs:
        return
    if isinstance(ours, float) and isinstance(theirs, float):
        good = abs(ours - theirs) < 1e-12
        require(good, ArgumentError, "measured token_correlation", theirs, "another", f"{ours}, that of the prediction")
    elif given:
        of_matrix = predicted.attrs["source"] == "theory" and isinstance(ours, str)
        one = "a prediction with the correlation matrix of the inputs"
        require(of_matrix, ArgumentError, "measured inputs", theirs, "not what was predicted for", one)
    else:
        expected = f"{ours}, that of the prediction"
        raise ArgumentError(f"measured token_correlation={theirs} is another; expected {expected}")


def _tokens(dataset: xr.Dataset) -> tuple[float | str, bool]:
    """What a result says that its networks read, "" for nothing: a number, or the hash of a matrix or of inputs.

    With it whether the latter.
    """
    inputs, correlation = dataset.attrs.get("inputs", "gaussian"), dataset.attrs.get("token_correlation", "")
    if inputs not in ("", "gaussian"):
        return str(inputs), True
    return correlation if isinstance(correlation, str) else float(correlation), False


def _side(dataset: xr.Dataset, variable: str, log_scale: bool, where: str) -> Side:
    values = _cells(dataset[variable])
    replicated = values.ndim == 3
    if variable == "token_correlation" and replicated and "second_moment" in dataset:
        values = _ratio_of_means(values, _cells(dataset.second_moment))
    if log_scale and bool((values < 0).any()):
        raise SchemaError(f"{where}: {variable}={np.nanmin(values)} is negative; expected numbers >= 0")
    name = f"{variable}_stderr"
    known = name in dataset and not replicated  # else the spread over networks holds it
    stderr = _cells(dataset[name]) if known else 0.0
    return side_of(values, log_scale=log_scale, stderr=stderr, replicated=replicated)


def _cells(values: xr.DataArray) -> NDArray[np.float64]:
    """(..., layer, site); values of one site alone are absent at the others, and without a name are `resid_post`."""
    if "site" not in values.dims:
        site = str(values.site.values) if "site" in values.coords else "resid_post"
        whole = values.drop_vars("site", errors="ignore").expand_dims(site=list(results.SITES))
        values = whole.where(whole.site == site)
    return values.transpose(..., "layer", "site").values.astype(np.float64)


def _ratio_of_means(ratios: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values whose mean over networks is sum(w r) / sum(w) and whose spread gives its standard error (linearised).

    A token correlation is a ratio of two moments of a network. The theory gives the ratio of their means over
    networks, from which the mean of the networks' ratios differs by O(1/width).
    """
    mean = weights.mean(axis=0)
    share = np.divide(weights, mean, out=np.ones_like(weights), where=mean > 0)
    centre = (share * ratios).mean(axis=0)
    return centre + share * (ratios - centre)


def _claimed_error(predicted: xr.Dataset, variable: str) -> NDArray[np.float64]:
    """The error that the prediction claims: `theory_error` is relative and belongs to the moments only."""
    moments = ("second_moment", "variance")
    name = "theory_error" if variable in moments else f"{variable}_error"
    if name not in predicted:
        return np.zeros((predicted.sizes["layer"], len(results.SITES)))
    claimed = np.nan_to_num(_cells(predicted[name]))
    lowest = float(claimed.min())
    require(lowest >= 0, SchemaError, f"predicted: {name}", lowest, "negative", "numbers >= 0")
    return claimed


def _method_error(dataset: xr.Dataset, variable: str) -> float:
    """What sampling without matrices neglects in a moment (`gram_claims`); 0 for other sources and variables."""
    moments = ("second_moment", "variance", "fourth_moment")
    return float(dataset.attrs.get("method_error", 0.0)) if variable in moments else 0.0


def _rounding(measured: xr.Dataset) -> float:
    """Relative rounding of a sum of squares: 16 units, as pairwise summation errs by log2(d_model) units at most.

    Formats shorter than float32 are summed in float32; their own rounding averages out over the entries.
    """
    precise = measured.attrs["dtype"] in ("float64", "torch.float64")
    return 16 * float(np.finfo(np.float64 if precise else np.float32).eps)
