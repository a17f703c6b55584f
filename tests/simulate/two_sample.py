"""Two-sample tests of samples of networks: one row of statistics per network, compared in each column and jointly."""

from __future__ import annotations

import numpy as np
import scipy.spatial
import scipy.stats
import xarray as xr

from varprop import stats

ON_LOG_SCALE = ("second_moment", "variance", "fourth_moment")


def network_vectors(dataset: xr.Dataset) -> np.ndarray:
    """(networks, columns): every recorded number that exists and is not the same for all networks."""
    columns = []
    for name, variable in dataset.data_vars.items():
        values = variable.transpose("network", ...).values.reshape(dataset.sizes["network"], -1)
        positive = name in ON_LOG_SCALE and bool((values[~np.isnan(values)] >= 0).all())
        columns.append(np.log(np.where(values > 0, values, 1.0)) if positive else values)
    return np.concatenate(columns, axis=1)


def _varying(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns that are numbers and vary by more than rounding; resid_pre repeats the resid_post before it."""
    both = np.concatenate([a, b])
    kept = ~np.isnan(both).any(axis=0)
    kept[kept] = both[:, kept].std(axis=0) > 1e-6
    _, first = np.unique(np.round(both[:, kept], 12), axis=1, return_index=True)
    return tuple(x[:, kept][:, np.sort(first)] for x in (a, b))  # type: ignore[return-value]


def marginal_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Smallest Kolmogorov-Smirnov p value of the columns after Holm's correction."""
    a, b = _varying(a, b)
    values = [scipy.stats.ks_2samp(x, y, method="asymp")[1] for x, y in zip(a.T, b.T, strict=True)]
    return float(stats.holm(np.array(values), 0.05)[1].min())


def joint_p_value(a: np.ndarray, b: np.ndarray, n_permutations: int = 1999) -> float:
    """Permutation p value of the energy distance of the joint vectors, ranked and whitened by their pooled covariance.

    Exact: a true null gives p <= x with probability x at most. Source: Szekely and Rizzo, J. Stat. Plan. Inference 143.
    """
    a, b = _varying(a, b)
    both = np.concatenate([a, b])
    normal = scipy.stats.norm.ppf(scipy.stats.rankdata(both, axis=0) / (len(both) + 1))  # heavy tails count as ranks
    _, power, axes = np.linalg.svd(normal - normal.mean(axis=0), full_matrices=False)
    share = power**2 / (power**2).sum()
    white = normal @ axes.T / power
    white = white[:, share > 1e-3]
    distance = scipy.spatial.distance.cdist(white, white)
    sign = np.repeat([1.0 / len(a), -1.0 / len(b)], [len(a), len(b)])
    rng = np.random.default_rng(0)
    signs = np.stack([sign, *(rng.permutation(sign) for _ in range(n_permutations))])
    energy = -np.einsum("pi,pi->p", signs @ distance, signs)
    return float((energy >= energy[0] * (1 - 1e-12)).mean())
