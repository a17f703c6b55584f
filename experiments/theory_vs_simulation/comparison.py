"""Predictions, kept by content, and the verdicts of `compare.check` at every point, as rows of one table."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from joblib import Parallel, delayed

import varprop.theory
from experiments.theory_vs_simulation.points import FACTORS, Point, layers_read, make_spec, point_id, run_arguments
from experiments.theory_vs_simulation.simulation import FALSE_FAIL_RATE, RESOLUTION, VARIABLES, load_networks
from varprop import results
from varprop.compare import check
from varprop.errors import AccuracyWarning, AssumptionError, SchemaError
from varprop.theory import predict

Row = dict[str, Any]
SITES = ("attn_out", "mlp_out", "resid_mid", "resid_post")
"""Shown; `check` also judges resid_pre, the resid_post of the layer before."""
NUMBERS = ("ratio", "deviation", "deviation_stderr", "theory_error", "p_value", "detectable")


@functools.cache
def theory_id() -> str:
    """First 8 hexadecimal digits of the SHA-256 of the theory's sources: another theory predicts again."""
    folder = Path(varprop.theory.__file__).parent
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))).hexdigest()[:8]


def prediction(point: Point, folder: Path) -> xr.Dataset:
    """The prediction at the layers read, from its file or computed and saved. Raises `AssumptionError`."""
    path = folder / f"{point_id(point)}-theory-{theory_id()}.nc"
    try:
        return results.load(path)
    except SchemaError:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)  # the claimed error is in every row
        predicted = predict(make_spec(point), **run_arguments(point)).sel(layer=layers_read(point))
    return results.load(results.save(predicted.drop_vars("exactness"), path))


def compare(point: Point, folder: Path, n_points: int) -> list[Row] | str | None:
    """Rows of a point: one per variable, layer and site. None: not simulated; text: why it is not predicted."""
    measured = load_networks(point, folder)
    if measured is None:
        return None
    try:
        predicted = prediction(point, folder)
    except AssumptionError as error:
        return str(error)
    rows = []
    for variable in VARIABLES:
        judged = check(
            predicted,
            measured,
            variable=variable,
            false_fail_rate=FALSE_FAIL_RATE / (2 * n_points),
            resolution=RESOLUTION,
        )
        rows += [
            {
                **{
                    name: point.get(name, "")
                    for name in ("group", "component", *FACTORS, "pattern", "n_tokens", "n_layers")
                },
                "depth": row["layer"],
                "site": row["site"],
                "variable": variable,
                "n_networks": judged.n_networks,
                **{name: row.get(name, np.nan) for name in NUMBERS},
                "verdict": str(row["verdict"]),
            }
            for row in judged.rows()
            if row["site"] in SITES and row["prediction"] != 0
        ]
    return rows


def compare_all(points: Sequence[Point], folder: Path, n_workers: int, n_points: int) -> dict[str, Any]:
    """`rows` of every point compared, `refused` by `predict` and `missing`, the points without networks."""
    found = Parallel(n_jobs=n_workers)(delayed(compare)(point, folder, n_points) for point in points)
    table: dict[str, Any] = {"rows": [], "refused": [], "missing": []}
    for point, answer in zip(points, found, strict=True):
        if answer is None:
            table["missing"].append(point)
        elif isinstance(answer, str):
            table["refused"].append({**point, "reason": answer})
        else:
            table["rows"] += answer
    return table
