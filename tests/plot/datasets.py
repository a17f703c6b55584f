"""Small results of every kind, with known numbers."""

from __future__ import annotations

import io
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from varprop import results

N_LAYERS = 4
ABOUT = {"spec_json": "{}", "spec_id": "0" * 12, "n_tokens": 8}
STEPS = [0, 100, 1000]


def cells(growth: float = 1.0) -> np.ndarray:
    array = (growth ** np.arange(N_LAYERS + 1.0))[:, None] * np.ones(5)
    array[0, :4] = np.nan
    return array


def theory(growth: float = 1.2, **about) -> xr.Dataset:
    names = ("second_moment", "variance", "token_correlation")
    variables: dict[str, Any] = {name: (("layer", "site"), cells(growth)) for name in names}
    variables["theory_error"] = (("layer", "site"), 0.1 * cells())
    return results.new(variables, source="theory", **{**ABOUT, **about})


def simulation(growth: float = 1.2, n: int = 8, **about) -> xr.Dataset:
    values = cells(growth) * np.exp(0.05 * np.random.default_rng(0).standard_normal((n, N_LAYERS + 1, 5)))
    variables = {name: (("network", "layer", "site"), values) for name in ("second_moment", "token_correlation")}
    return results.new(variables, source="simulation", **{**ABOUT, **about})


def training(n_seeds: int = 3, growth: float = 1.5, loss: bool = True, **about) -> xr.Dataset:
    rng = np.random.default_rng(1)
    values = np.stack([cells(growth ** (1 + i / 2)) for i in range(len(STEPS))])
    values = values * np.exp(0.05 * rng.standard_normal((n_seeds, 1, 1, 1)))
    variables: dict[str, Any] = {n: (("seed", "step", "layer", "site"), values) for n in ("second_moment", "variance")}
    correlation = np.full((n_seeds, len(STEPS), N_LAYERS + 1, 2), 0.1)
    correlation[:, :, 0] = np.nan
    variables["branch_correlation"] = (("seed", "step", "layer", "branch"), correlation)
    if loss:
        for name in ("train_loss", "validation_loss"):
            variables[name] = (("seed", "step"), 3 + rng.random((n_seeds, len(STEPS))))
    return results.new(variables, source="training", coords={"step": STEPS}, **{**ABOUT, **about})


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: laying it out is part of what is tested."""
    assert plt.get_fignums() == []  # no state of pyplot is touched
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()
