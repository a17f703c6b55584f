"""The arithmetic of `check` on arrays over cells: two sides, and a verdict with its p-value for each cell.

Errors are |log(measured / predicted)|, which is the relative error where it is small, or plain differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from varprop import stats


@dataclass(frozen=True)
class Side:
    """One side of a comparison over its cells, which are NaN where they do not exist; build it with `side_of`."""

    mean: NDArray[np.float64]
    stderr: NDArray[np.float64]  # of the mean
    log: stats.LogMean | None  # on the log scale alone
    replicates: int  # 0 = a closed form


def side_of(values: NDArray[np.float64], *, log_scale: bool, stderr: ArrayLike = 0.0, replicated: bool = True) -> Side:
    """Means and standard errors of `values` (replicate, ...cells), or of known means (cells) with their `stderr`."""
    present = ~(np.isnan(values).any(axis=0) if replicated else np.isnan(values))
    filled = np.where(present, values, 0.0)
    if replicated and len(values) > 1:
        mean, mean_stderr = stats.mean_and_stderr(filled)
        log = stats.log_mean(filled) if log_scale else None
    else:
        mean, mean_stderr = filled[0] if replicated else filled, np.where(present, stderr, 0.0)
        log = stats.known_log_mean(mean, mean_stderr) if log_scale else None
    return Side(np.where(present, mean, np.nan), mean_stderr, log, len(values) if replicated else 0)


def judge(
    prediction: Side,
    estimate: Side,
    claimed: NDArray[np.float64],
    *,
    rounding: float,
    false_fail_rate: float,
    resolution: float,
) -> dict[str, NDArray[Any]]:
    """The arithmetic of `check` on arrays over cells: every variable of its Dataset by name."""
    absent = np.isnan(estimate.mean) | np.isnan(prediction.mean)
    dof, band = degrees_of_freedom(prediction, estimate), claimed + rounding
    if estimate.log is None or prediction.log is None:
        deviation = np.where(absent, 0.0, estimate.mean - prediction.mean)
        stderr = np.hypot(estimate.stderr, prediction.stderr)
        p_value = stats.band_p_value(deviation, stderr, band, dof)
    else:
        deviation = np.where(absent, 0.0, stats.log_deviation(estimate.log, prediction.log))
        stderr = np.hypot(estimate.log.stderr, prediction.log.stderr)
        both_zero = (estimate.mean == 0) & (prediction.mean == 0)
        known = both_zero | stats.exactly_zero(estimate.log) | stats.exactly_zero(prediction.log)
        stderr = np.where(known, 0.0, np.minimum(stderr, stats.LARGEST_LOG))
        p_value = stats.log_band_p_value(estimate.log, prediction.log, band, dof)
    tested = ~absent & (stderr > 0)
    rejected, adjusted = p_value == 0, p_value.copy()  # known without error: p is 0 or 1
    rejected[tested], adjusted[tested] = stats.holm(p_value[tested], false_fail_rate)
    level = false_fail_rate / max(1, int(tested.sum()))
    if estimate.log is None or prediction.log is None:
        detectable = stats.detectable_error(stderr, band, dof, level)
    else:
        detectable = stats.log_detectable_error(estimate.log, prediction.log, band, dof, level)
        detectable = np.where(tested, detectable, band)
    powerless = detectable > claimed + resolution
    verdict = np.select([absent, rejected, powerless], ["absent", "disagrees", "underpowered"], "agrees")
    cells: dict[str, NDArray[Any]] = {
        "prediction": prediction.mean,
        "theory_error": claimed,
        "estimate": estimate.mean,
        "stderr": estimate.stderr,
        "deviation": deviation,
        "deviation_stderr": stderr,
        "p_value": p_value,
        "p_adjusted": adjusted,
        "detectable": detectable,
    }
    if estimate.log is not None:
        both_zero = (estimate.mean == 0) & (prediction.mean == 0)
        cells["ratio"] = np.where((estimate.mean == 0) & ~both_zero, 0.0, np.exp(deviation))
    return {**{name: np.where(absent, np.nan, values) for name, values in cells.items()}, "verdict": verdict}


def degrees_of_freedom(prediction: Side, estimate: Side) -> int:
    """Of the smaller ensemble, which is the careful choice."""
    return min(side.replicates for side in (prediction, estimate) if side.replicates) - 1
