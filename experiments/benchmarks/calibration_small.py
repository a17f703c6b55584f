"""Calibration of `compare.check` in the small: its false-fail rate and its power, against what it states.

Claim tested: over ensembles whose mean is known exactly, at most a fraction `false_fail_rate` of the calls say
`disagrees`, also where the truth lies on the edge of the claimed error; and an error of the size called `detectable`
is found with probability 0.9. The ensembles imitate a Pre-LN stream: every network has its own factor, shared by its
layers, times one factor per branch, all of mean exactly 1 (scaled chi-square or log-normal), and the stream is their
running sum. Cost: CPU, 2 minutes on one core. Expected: no false-fail rate above 0.01; power of 0.9 within the exact
95 % interval from 16 networks on, and not below 0.87 at 4, where the claim itself rests on 3 degrees of freedom.

    python -m experiments.benchmarks.calibration_small           # writes calibration_small.json beside this file
    python -m experiments.benchmarks.calibration_small --smoke   # seconds; prints, writes nothing
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from varprop import results
from varprop.compare import judge, side_of
from varprop.stats import POWER, clopper_pearson

FALSE_FAIL_RATE = 0.01
FAMILIES = ("chi_square", "log_normal")
SPREADS = (0.05, 0.3, 0.6)
NETWORKS = (4, 16, 64)
EDGES = (0.0, 0.02)
N_LAYERS = 6
CALLS = 4000
SEED = 20240
FARTHEST = 500.0
"""Largest log ratio tried: at 4 networks and wide spread, what is detectable can pass the range of a float."""
BRANCH_MEANS = {"attn_out": 0.25, "mlp_out": 0.5}


def factors(rng: np.random.Generator, family: str, spread: float, shape: tuple[int, ...]) -> np.ndarray:
    """Positive factors of mean exactly 1 and standard deviation `spread`."""
    if family == "chi_square":
        dof = 2 / spread**2
        return rng.chisquare(dof, shape) / dof
    log_variance = np.log1p(spread**2)
    return np.exp(np.sqrt(log_variance) * rng.standard_normal(shape) - log_variance / 2)


def stream(attention: np.ndarray, mlp: np.ndarray, embedding: np.ndarray | float) -> np.ndarray:
    """Second moments (..., layer, site) of a stream that adds up its branches (..., n_layers)."""
    n_layers = attention.shape[-1]
    cells = np.full((*attention.shape[:-1], n_layers + 1, len(results.SITES)), np.nan)
    cells[..., 0, 4] = embedding
    for layer in range(1, n_layers + 1):
        before, added, more = cells[..., layer - 1, 4], attention[..., layer - 1], mlp[..., layer - 1]
        sites = (before, added, before + added, more, before + added + more)
        cells[..., layer, :] = np.stack(sites, axis=-1)
    return cells


def exact_mean(n_layers: int = N_LAYERS) -> np.ndarray:
    """The mean of every ensemble here, (layer, site)."""
    ones = np.ones(n_layers)
    return stream(BRANCH_MEANS["attn_out"] * ones, BRANCH_MEANS["mlp_out"] * ones, 1.0)


def ensemble(rng: np.random.Generator, family: str, spread: float, n_networks: int) -> np.ndarray:
    """One ensemble (network, layer, site); each branch has spread about `spread`, correlated over the layers."""
    share = spread / np.sqrt(2)
    own = factors(rng, family, share, (n_networks, 1))
    attention, mlp = (own * factors(rng, family, share, (n_networks, N_LAYERS)) * m for m in BRANCH_MEANS.values())
    return stream(attention, mlp, factors(rng, family, spread, (n_networks,)))


def as_result(values: np.ndarray, source: str, theory_error: float = 0.0) -> xr.Dataset:
    """A result Dataset of the given second moments."""
    dims = ("network", "layer", "site")[-values.ndim :]
    variables: dict[str, Any] = {"second_moment": (dims, values)}
    if source == "theory":
        variables["theory_error"] = (dims, np.where(np.isnan(values), np.nan, theory_error))
    return results.new(variables, source=source, spec_json="{}", spec_id="0" * 12, n_tokens=1)


def outcome(prediction: np.ndarray, values: np.ndarray, edge: float, resolution: float = 0.05) -> dict[str, np.ndarray]:
    """What `check` computes, on arrays: reading and writing Datasets would take twenty times as long."""
    return judge(
        side_of(prediction, log_scale=True, replicated=False),
        side_of(values, log_scale=True),
        np.full(prediction.shape, edge),
        rounding=0.0,
        false_fail_rate=FALSE_FAIL_RATE,
        resolution=resolution,
    )


def measure(family: str, spread: float, n_networks: int, edge: float, calls: int, seed: int = SEED) -> dict[str, Any]:
    """False-fail rate of the whole verdict and the power in one cell on either side, with exact 95 % intervals."""
    key = (seed, FAMILIES.index(family), round(1000 * spread), n_networks, round(1000 * edge))
    rng = np.random.default_rng(key)
    failed, seen, tried = 0, {-1: 0, 1: 0}, {-1: 0, 1: 0}
    for index in range(calls):
        side = 1 if index % 2 else -1
        found = outcome(exact_mean() * np.exp(side * edge), ensemble(rng, family, spread, n_networks), edge)
        failed += bool((found["verdict"] == "disagrees").any())
        # A fresh ensemble has to see, in the last cell, an error of the size that this one calls detectable.
        wrong = exact_mean()
        wrong[-1, -1] *= np.exp(side * min(found["detectable"][-1, -1], FARTHEST))
        again = outcome(wrong, ensemble(rng, family, spread, n_networks), edge)
        tried[side] += 1
        seen[side] += again["verdict"][-1, -1] == "disagrees"
    row: dict[str, Any] = {"family": family, "spread": spread, "n_networks": n_networks, "theory_error": edge}
    row |= {"calls": calls, "failed": failed, "false_fail_rate": failed / calls}
    row["interval"] = clopper_pearson(failed, calls)
    for side, name in ((-1, "measured_high"), (1, "measured_low")):
        row[f"power_{name}"] = seen[side] / tried[side]
        row[f"power_{name}_interval"] = clopper_pearson(int(seen[side]), tried[side])
    return row


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every setting, print one line each and write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few calls of each setting, nothing written")
    parser.add_argument("--calls", type=int, default=CALLS, help="calls of each setting")
    options = parser.parse_args(arguments)
    calls = 4 if options.smoke else options.calls
    rows = []
    for setting in itertools.product(FAMILIES, SPREADS, NETWORKS, EDGES):
        rows.append(measure(*setting, calls=calls))
        print(json.dumps(rows[-1]), flush=True)
    if not options.smoke:
        lines = ",\n".join(json.dumps(row) for row in rows)
        head = f'"nominal_false_fail_rate": {FALSE_FAIL_RATE}, "nominal_power": {POWER}, "seed": {SEED}'
        Path(__file__).with_suffix(".json").write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')
    return rows


if __name__ == "__main__":
    main()
