"""`required_networks`: how many networks one `check` call needs to see an error of a given size in every cell."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from varprop import stats
from varprop.errors import AccuracyWarning, ArgumentError, AssumptionError, SchemaError, require
from varprop.log_mean import expected_log_mean
from varprop.results import SITES
from varprop.simulate.inputs import positive_integer
from varprop.simulate.sampling import sample
from varprop.spec import ModelSpec
from varprop.spec.parts import MATRICES
from varprop.theory.fluctuation import SPREAD_ERROR, fluctuation

PILOT = 64
"""Networks drawn where the theory does not give the spread."""
PILOT_CONFIDENCE = 0.95
"""One-sided confidence of the upper end to which a pilot's spread is raised."""
NARROWEST = 64
"""Smallest d_model for which `fluctuation` claims its error."""
WIDEST = 0.8
"""Largest spread for which the power is claimed: beyond it, real ensembles are more skewed than log-normal ones."""
MOST_NETWORKS = 10**9


def required_networks(
    spec: ModelSpec,
    relative_error: float,
    power: float = stats.POWER,
    *,
    n_tokens: int,
    token_correlation: float = 0.0,
    false_fail_rate: float = 0.01,
    layers: Sequence[int] | None = None,
    sites: Sequence[str] | None = None,
    pilot: int | xr.Dataset | None = None,
    seed: int = 0,
) -> int:
    """Networks with which one call of `check` sees an error of the second moment of `relative_error` in every cell.

    That is the least n at which a prediction that is wrong by the factor 1 + relative_error beyond its claimed error,
    either way, in one cell, gets the verdict `disagrees` with probability `power`, Holm's correction over all cells of
    the call included; and at which the verdict of a right one is `underpowered` with probability 1 - power at most when
    `check` is asked for resolution log(1 + relative_error). With sigma the spread of a cell, m the number of cells:

        stats.log_detectable_error(sigma' of n networks, level false_fail_rate / m) <= log(1 + relative_error),

    sigma' = sigma sqrt(q / (n - 1)), q the quantile of chi^2_{n-1} that is exceeded with probability (1 - power) / m.

    spec, n_tokens, token_correlation: as in `simulate.sample`. relative_error > 0. layers, sites: the cells in which it
    has to be seen, None = all; m counts all. pilot: None takes the spread from `theory.fluctuation`, raised by its
    claimed error (10 % to n_tokens = d_model / 4, else 20 %, also for masks), and where it claims none (other norm
    placements than "pre", block masks, d_model below 64, n_tokens > d_model) from `PILOT` networks, of method "gram"
    where that is exact and faster; an integer draws that many; a result of `sample` is used as it is. A pilot's spread
    is raised to the upper end of its 95 % interval (chi^2, cell by cell).

    Exactness: for replicates between normal and log-normal ones and spreads up to 0.8 of the mean; power and rate are
    measured in experiments/calibration.py, up to 0.5. Wider ones are more skewed: an `AccuracyWarning` (at a spread of
    1.2, ungated relu2 of 16 units, the power was 0.73 on one side and every call `underpowered`). Raises
    `ArgumentError`; `SchemaError` for a pilot of another model, or without its masks' spread (masked, method "gram").
    Source: derived here. Checked by: tests/simulate/test_required.py.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(d_model=128, n_layers=2)
    >>> few, many = (required_networks(spec, error, n_tokens=16) for error in (0.1, 0.02))
    >>> 10 < many / few < 25  # about the inverse square; each of few networks counts less
    True
    """
    positive = isinstance(relative_error, (int, float, np.number)) and 0 < float(relative_error) < math.inf
    require(positive, ArgumentError, "relative_error", relative_error, "outside the domain", "a number > 0")
    for name, value in (("power", power), ("false_fail_rate", false_fail_rate)):
        require(0 < value < 1, ArgumentError, name, value, "outside the domain", "a number in (0, 1)")
    spread = cell_spread(spec, n_tokens=n_tokens, token_correlation=token_correlation, pilot=pilot, seed=seed)
    chosen = spread[np.ix_(_layers(spec, layers), _sites(sites))]
    require(bool((chosen > 0).any()), ArgumentError, "sites", sites, "without a cell that varies", f"some of {SITES}")
    largest, n_cells = float(np.nanmax(chosen)), int((spread > 0).sum())
    if largest > WIDEST:
        text = f"spread={largest:.2g} of the mean over networks, above {WIDEST}: the power may be low"
        warnings.warn(AccuracyWarning(text), stacklevel=2)
    return networks_for(math.log1p(relative_error), largest, n_cells, power, false_fail_rate)


def networks_for(
    log_error: float, spread: float, n_cells: int, power: float = stats.POWER, false_fail_rate: float = 0.01
) -> int:
    """The number of `required_networks` for one cell of relative standard deviation `spread` in a check of `n_cells`.

    >>> networks_for(0.02, 0.1, 1) < networks_for(0.02, 0.1, 100) < networks_for(0.01, 0.1, 100)
    True
    """
    level, exactly = false_fail_rate / n_cells, stats.known_log_mean(1.0)

    def sees(n: int) -> bool:
        raised = math.sqrt(distributions.chi2.isf((1 - power) / n_cells, n - 1) / (n - 1))
        estimate = expected_log_mean(spread * raised, n)
        seen = stats.log_detectable_error(estimate, exactly, 0.0, n - 1, level, max(power, stats.POWER))
        return float(seen) <= log_error

    few, many = 2, 4
    while not sees(many):
        few, many = many, 2 * many
        require(many <= MOST_NETWORKS, ArgumentError, "relative_error", log_error, "too small", "a larger number")
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if sees(middle) else (middle, many)
    return many


def cell_spread(
    spec: ModelSpec,
    *,
    n_tokens: int,
    token_correlation: float = 0.0,
    pilot: int | xr.Dataset | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Upper end of the relative spread of the second moment over networks, (n_layers + 1, site), NaN where absent.

    From the theory or from a pilot: see `required_networks`.
    """
    if pilot is None and spec.d_model >= NARROWEST and n_tokens <= spec.d_model and not _has_block_masks(spec):
        inside = 4 * n_tokens <= spec.d_model and not spec.masks.any
        raised = 1 + (1 if inside else 2) * SPREAD_ERROR
        with contextlib.suppress(AssumptionError):  # what the theory does not cover is drawn below
            found = fluctuation(spec, n_tokens=n_tokens, token_correlation=token_correlation, seed=seed)
            return raised * found.second_moment
    if not isinstance(pilot, xr.Dataset):
        count = PILOT if pilot is None else positive_integer("pilot", pilot, minimum=8)
        options: dict[str, Any] = {"n_tokens": n_tokens, "token_correlation": token_correlation, "seed": seed}
        narrow = spec.masks.any or 4 * n_tokens > spec.d_model  # where gram is not exact, or not faster
        method = "explicit" if narrow else "gram"
        pilot = sample(spec, n_networks=count, method=method, **options, progress=False)
    for name, wanted in (("spec_id", spec.spec_id), ("n_tokens", n_tokens), ("token_correlation", token_correlation)):
        found = pilot.attrs.get(name)
        if found != wanted:
            raise SchemaError(f"pilot: {name}={found!r} is another; expected {wanted!r}")
    neglected = float(pilot.attrs.get("method_spread_error", 0.0))
    good = 'a sample with method="explicit"'
    require(neglected == 0, SchemaError, "pilot: method_spread_error", neglected, "not 0", good)
    return pilot_spread(pilot.second_moment.transpose("network", "layer", "site").values)


def pilot_spread(values: ArrayLike) -> NDArray[np.float64]:
    """Upper end of the relative spread over the first axis: the larger of s / m and of the log-normal law, raised by
    sqrt((n - 1) / q), q the 0.05 quantile of chi^2 with n - 1 degrees. NaN where a value is.

    >>> round(float(pilot_spread([0.9, 1.0, 1.1])), 2)
    0.44
    """
    array = np.asarray(values, dtype=np.float64)
    n, absent = len(array), np.isnan(array).any(axis=0)
    spread = stats.log_mean(np.where(absent, 1.0, array)).stderr * math.sqrt(n)
    raised = math.sqrt((n - 1) / distributions.chi2.ppf(1 - PILOT_CONFIDENCE, n - 1))
    return np.where(absent, np.nan, spread * raised)


def _has_block_masks(spec: ModelSpec) -> bool:
    masks = (spec.masks.of(name) for name in MATRICES)
    return any(mask is not None and mask.kind == "block" for mask in masks)


def _layers(spec: ModelSpec, layers: Sequence[int] | None) -> list[int]:
    known = range(spec.n_layers + 1)
    chosen = list(known if layers is None else layers)
    good = bool(chosen) and all(layer in known for layer in chosen)
    require(good, ArgumentError, "layers", layers, "outside the model", f"layers in 0..{spec.n_layers}")
    return chosen


def _sites(sites: Sequence[str] | None) -> list[int]:
    chosen = list(SITES if sites is None else sites)
    good = bool(chosen) and all(site in SITES for site in chosen)
    require(good, ArgumentError, "sites", sites, "unknown", f"some of {SITES}")
    return [SITES.index(site) for site in chosen]
