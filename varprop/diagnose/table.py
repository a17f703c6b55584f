"""A result of `measure` as text: a table by layer, and the numbers of the whole model."""

from __future__ import annotations

import numpy as np
import xarray as xr

BY_LAYER = {
    "variance": "variance",
    "block_influence": "influence",
    "relative_update": "update / stream",
    "causal_layer_score": "causal",
    "permutation_layer_score": "permutation",
    "usefulness_loss_ratio": "linear loss ratio",
    "ablation_loss_ratio": "skipped loss ratio",
    "jacobian_norm": "|J - I| / d",
    "attention_effective_keys": "keys",
}
"""Variables of the table and the heads of their columns; those that are there are shown."""
ONE_LABEL = {"site": "resid_post", "intervention": "skip"}
"""What is shown of a variable that has more than layers: the stream after a layer, the layer without its output."""
OTHER_ERRORS = {
    "permutation_layer_score": "of the permutation score also over the pairs that were drawn",
    "jacobian_n_probes": "of |J - I| / d over the random directions, where it was estimated with some",
}
"""Variables -> what their errors are over, where it is not sequences alone."""


def table(dataset: xr.Dataset) -> str:
    """The scores by layer, and every scalar, each as value ± standard error where it has one.

    Where there are none of both, one line says so and which variables there are.

    >>> from varprop import results
    >>> about = {"source": "checkpoint", "spec_json": "", "spec_id": "", "n_tokens": 8}
    >>> scores = {"causal_layer_score": (("layer",), [np.nan, 0.5, 0.25]), "causal_score": ((), 0.375)}
    >>> scores["causal_score_stderr"] = ((), 0.0021)
    >>> print(table(results.new(scores, **about)))
    layer  causal
        1     0.5
        2    0.25
    causal_score 0.375 ± 0.0021
    (± one standard error, over sequences)
    """
    columns = {head: profile(dataset, name) for name, head in BY_LAYER.items() if name in dataset}
    rows = [["layer", *columns]]
    if columns:
        labels = dataset["layer"].values.tolist()
        cells = [[str(label), *(column[i] for column in columns.values())] for i, label in enumerate(labels)]
        rows += [row for row in cells if any(row[1:])]
    lines = aligned(rows) if columns else []
    variables = [str(name) for name in dataset.data_vars if not str(name).endswith("_stderr")]
    lines += [f"{name} {cell(dataset, name)}" for name in variables if dataset[name].ndim == 0]
    if not lines:
        return "no table of these scores; variables: " + ", ".join(variables)
    return "\n".join([*lines, *errors_meant(dataset)] if any("±" in line for line in lines) else lines)


def errors_meant(dataset: xr.Dataset) -> list[str]:
    """The line that says what the standard errors are over."""
    others = [text for name, text in OTHER_ERRORS.items() if name in dataset]
    return [f"(± one standard error, over sequences{''.join('; ' + text for text in others)})"]


def profile(dataset: xr.Dataset, name: str) -> list[str]:
    """A variable at every layer, with `ONE_LABEL` of its other dimension; empty where it has no number."""
    values, error = (dataset.get(each) for each in (name, f"{name}_stderr"))
    assert values is not None
    place = {dim: label for dim, label in ONE_LABEL.items() if dim in values.dims}
    values, error = values.sel(place), None if error is None else error.sel(place)
    if values.dims != ("layer",):
        return [""] * dataset.sizes["layer"]
    errors = np.full(values.shape, np.nan) if error is None else error.to_numpy()
    return [number(a, b) for a, b in zip(values.to_numpy(), errors, strict=True)]


def cell(dataset: xr.Dataset, name: str) -> str:
    """A scalar and its standard error."""
    error = dataset[f"{name}_stderr"].item() if f"{name}_stderr" in dataset else np.nan
    return number(dataset[name].item(), error)


def number(value: float, error: float = np.nan) -> str:
    """Four digits, the error with two.

    >>> number(1.23456, 0.01234), number(2.0), number(np.nan)
    ('1.235 ± 0.012', '2', '')
    """
    if not np.isfinite(value):
        return ""
    return f"{value:.4g}" + (f" ± {error:.2g}" if np.isfinite(error) else "")


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, each column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
