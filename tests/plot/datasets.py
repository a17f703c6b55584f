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
EVALUATED = [0, 1000]
PROBED = [0, 500, 1000]


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
        variables["train_loss"] = (("seed", "step"), 3 + rng.random((n_seeds, len(STEPS))))
        dims = ("seed", "evaluation_step", "evaluation")
        variables["validation_loss"] = (dims, 3 + rng.random((n_seeds, len(EVALUATED), 2)))
    coords = {"step": STEPS, "evaluation_step": EVALUATED, "evaluation": ["fixed_length", "training_length"]}
    used = {dim for dims, _ in variables.values() for dim in dims}
    coords = {dim: labels for dim, labels in coords.items() if dim in used}
    return results.new(variables, source="training", coords=coords, **{**ABOUT, **about})


def probed(n_seeds: int = 3, n_experts: int = 4) -> xr.Dataset:
    """A training with what the probe adds: overlaps of cosine 1/2, or -1/4 for mlp; the last layer a mixture."""
    dataset = training(n_seeds)
    quantiles = np.array([0.1, 0.5, 1.0, 2.0, 10.0])
    overlap = 0.5 + 0.5 * np.eye(N_LAYERS + 1)
    size = np.arange(1.0, N_LAYERS + 2)
    by_branch = np.stack([overlap, 1.25 * np.eye(N_LAYERS + 1) - 0.25]) * size[:, None] * size
    by_branch[:, 0], by_branch[:, :, 0] = np.nan, np.nan
    attention = np.linspace(0.1, 0.5, N_LAYERS + 1)
    attention[0] = np.nan
    load = np.full((N_LAYERS + 1, n_experts), np.nan)
    load[-1] = np.array([0.5, *[0.5 / (n_experts - 1)] * (n_experts - 1)])
    variables = {
        "variance_quantile": (("layer", "site", "quantile"), cells(1.5)[..., None] * quantiles),
        "block_overlap": (("source_layer", "target_layer"), overlap * size[:, None] * size),
        "branch_overlap": (("branch", "source_layer", "target_layer"), by_branch),
        "attention_concentration": (("layer",), attention),
        "expert_load": (("layer", "expert"), load),
    }
    for name, (dims, values) in variables.items():
        tiled = np.tile(values, (n_seeds, len(PROBED), *(1 for _ in dims)))
        dataset[name] = (("seed", "probe_step", *dims), tiled)
    labels = {"probe_step": PROBED, "quantile": [0.05, 0.25, 0.5, 0.75, 0.95]}
    dataset = dataset.assign_coords({**labels, "expert": range(n_experts)})
    layers = range(N_LAYERS + 1)
    dataset = dataset.assign_coords(source_layer=layers, target_layer=layers)
    results.validate(dataset)
    return dataset


def drawn(figure: Figure) -> bytes:
    """The figure as PNG: laying it out is part of what is tested."""
    assert plt.get_fignums() == []  # no state of pyplot is touched
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=40)
    return buffer.getvalue()
