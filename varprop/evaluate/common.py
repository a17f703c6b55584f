"""Shares with their standard errors, and the Dataset that every evaluation returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from varprop import results
from varprop.errors import ArgumentError, SchemaError, require
from varprop.nn import Transformer


def share(correct: np.ndarray, name: str) -> tuple[float, float]:
    """Share of True and its standard error sqrt(p (1 - p) / (n - 1)), the items being independent.

    Raises `ArgumentError` with fewer than two items, of which `name` says what they are.

    >>> share(np.array([True, True, False, True, False]), "pairs")
    (0.6, 0.2449489742783178)
    """
    n = len(correct)
    require(n >= 2, ArgumentError, name, n, "too few for a standard error", "two or more")
    p = float(correct.mean())
    return p, (p * (1 - p) / (n - 1)) ** 0.5


def shares(correct: np.ndarray, labels: Sequence[str], name: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Labels, sorted, with `share` of each."""
    of = np.asarray(labels)
    known = sorted(set(labels))
    pairs = np.array([share(correct[of == label], f"{name} of {label}") for label in known])
    return known, pairs[:, 0], pairs[:, 1]


def dataset(
    model: Transformer,
    variables: Mapping[str, tuple[Sequence[str], Any]],
    *,
    n_tokens: int,
    seed: int | None = None,
    coords: Mapping[str, Any] | None = None,
    **attributes: str | int | float,
) -> xr.Dataset:
    """A result with source "checkpoint"."""
    embed = model.get_parameter("embed")
    return results.new(
        variables,
        source="checkpoint",
        spec_json=model.spec.to_json(),
        spec_id=model.spec.spec_id,
        n_tokens=n_tokens,
        coords=coords,
        seed_entropy="" if seed is None else str(seed),
        dtype=str(model.compute_dtype or embed.dtype).removeprefix("torch."),
        device=embed.device.type,
        attributes=attributes,
    )


def join(datasets: Sequence[xr.Dataset]) -> xr.Dataset:
    """Evaluations of one network as one result; attributes that differ become empty strings.

    Raises `SchemaError` where two of them differ in a number, or only some of the texts were read at some length.
    """
    try:
        merged = xr.merge(datasets, join="outer", compat="no_conflicts", combine_attrs="drop")
    except xr.MergeError as error:
        reason = str(error).splitlines()[0]
        raise SchemaError(f"datasets differ ({reason}); expected evaluations of one network") from None
    first = datasets[0].attrs
    merged.attrs = {k: v if all(d.attrs.get(k) == v for d in datasets) else "" for k, v in first.items()}
    results.validate(merged, "evaluation")
    return merged


def table(dataset: xr.Dataset) -> str:
    """The numbers of an evaluation as a few lines of text; paradigms left out."""
    lines = []
    for name in ("loss", "bits_per_byte", "blimp_accuracy", "blimp_term_accuracy", "cloze_accuracy"):
        if name not in dataset:
            continue
        values, errors = dataset[name], dataset.get(f"{name}_stderr")
        for index in np.ndindex(values.shape):
            label = " ".join(str(values[dim].values[i]) for dim, i in zip(values.dims, index, strict=True))
            error = "" if errors is None else f" +- {errors.values[index]:.4f}"
            lines.append(f"{name:<20} {label:<28} {values.values[index]:.4f}{error}")
    return "\n".join(lines)
