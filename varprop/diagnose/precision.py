"""How far bfloat16 moves the numbers: the cheap scores of one model, measured in both types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from varprop.diagnose.measure import SCORES, measure
from varprop.diagnose.open import open_model
from varprop.diagnose.replay import Batch

CHEAP = ("moments", "influence", "causal")
"""Scores of one walk or less."""
N_SEQUENCES = 2
DIMS = {"layer", "site", "branch"}


def spot_check(
    path: str | Path,
    batch: Batch,
    *,
    device: str = "auto",
    scores: Sequence[str] | None = None,
    memory_gib: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """`precision_gap` of the model in a folder on the first two sequences of `batch`; it is opened once in each type.

    scores: None = the cheap ones (`CHEAP`) that there are. The others as of `open_model` and `measure`.
    Checked by: tests/diagnose/test_precision.py.
    """
    names = [name for name in CHEAP if name in SCORES] if scores is None else scores
    found = []
    for dtype in ("float32", "bfloat16"):
        model, _ = open_model(path, device=device, dtype=dtype)
        about: dict[str, Any] = {"seed": seed, "memory_gib": memory_gib, "options": options}
        found.append(measure(model, batch.rows(slice(0, N_SEQUENCES)), scores=names, **about))
    return precision_gap(*found)


def precision_gap(exact: xr.Dataset, rough: xr.Dataset) -> xr.Dataset:
    """`<name>_precision_gap` = (rough - exact) / |exact| of every number of the model and of its layers and sites.

    exact, rough: the same scores in float32 and bfloat16. Standard errors, nulls (which are rounding and nothing else)
    and counts are left out; 0 where both are 0, and 1 where only `exact` is.

    >>> from varprop import results
    >>> about = {"source": "checkpoint", "spec_json": "", "spec_id": "", "n_tokens": 8}
    >>> first, second = (results.new({"causal_score": ((), value)}, **about) for value in (0.5, 0.505))
    >>> round(precision_gap(first, second).causal_score_precision_gap.item(), 6)
    0.01
    """
    gaps: dict[str, xr.DataArray] = {}
    for name, values in exact.data_vars.items():
        text = str(name)
        if values.dtype.kind != "f" or set(values.dims) - DIMS or text.endswith(("_stderr", "_null")):
            continue
        a, b = values.to_numpy(), rough[name].to_numpy()
        size = np.where(a == 0, np.maximum(np.abs(b), np.finfo(np.float64).tiny), np.abs(a))
        gaps[f"{text}_precision_gap"] = values.copy(data=(b - a) / size)
    return xr.Dataset(gaps)
