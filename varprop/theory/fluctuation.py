"""Fluctuation across networks of the token-averaged second moment q = sum_t |x_t|^2 / (T d), one number per network.

Given the inner activations of a branch, the d columns of its output are independent Gaussian vectors over the T tokens,
so that the Gram matrix X X' / d of the stream is a Wishart matrix of d degrees around its mean G. The relative variance
of q from the output weights alone is therefore (2/d) mean_ts C_ts^2, C the token correlations, at every depth. On top
come, layer by layer,

- the inner weights: d_ff units of a feed-forward, n_kv_heads * head_dim values, attention patterns, routers
  (`branch_noise.py`), injected once per layer and kept by the residual sum;
- the realised token correlation: it fluctuates like the rest of the Gram matrix and shifts the mean of later branches.

State of the recursion: the 2 x 2 covariance of (q, s), s = sum_ts x_t.x_s / (T^2 d) the second moment of the mean
token; exchangeable tokens, first order in 1/width. Legend: T tokens, c correlation of two tokens, d d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.branch_noise import BranchLaw, attention_law, mlp_law
from varprop.theory.causal import has_closure
from varprop.theory.depth import MAX_GRAM_TOKENS, check_integer, checked_correlation, predict
from varprop.theory.exchangeable import embedding_second_moment, is_tabulated
from varprop.theory.gram import GramRecursion
from varprop.theory.moments import Moments

SPREAD_ERROR = 0.1
"""Relative error of `fluctuation` claimed for d_model >= 64 and n_tokens <= d_model / 4; twice that up to n_tokens =
d_model (measured at d_model 64, 16 layers, 16 and 48 tokens)."""


def gaussian_relative_variance(token_correlation: Any, n_tokens: Any, degrees: Any) -> Any:
    """Relative variance of sum_t |x_t|^2 for exchangeable Gaussian tokens: (2 / degrees)(1 + (T - 1) c^2) / T.

    token_correlation: c; n_tokens: T; degrees: independent coordinates, d_model for the stream. Exact.
    Source: derived in proofs/prove_fluctuation.py.

    >>> gaussian_relative_variance(0.5, 2, 5), gaussian_relative_variance(1, 100, 50)
    (0.25, 0.04)
    """
    return 2 * (1 + (n_tokens - 1) * token_correlation**2) / (n_tokens * degrees)


def gaussian_covariance(second_moment: Any, token_correlation: Any, n_tokens: Any, degrees: Any) -> np.ndarray:
    """Covariance (2, 2) of (q, s) for exchangeable Gaussian tokens of n = `degrees` coordinates:

    Var q = (2/n) q^2 (1 + (T - 1) c^2) / T,   Cov(q, s) = Var s = (2/n) (q (1 + (T - 1) c) / T)^2.

    q: token-averaged second moment; s: second moment of the mean token. Exact.
    Source: derived in proofs/prove_fluctuation.py.

    >>> gaussian_covariance(1.0, 0.5, 2, 4).tolist()
    [[0.3125, 0.28125], [0.28125, 0.28125]]
    """
    power = second_moment**2 * gaussian_relative_variance(token_correlation, n_tokens, degrees)
    mean_token = second_moment * (1 + (n_tokens - 1) * token_correlation) / n_tokens
    across = 2 * mean_token**2 / degrees
    return np.array([[power, across], [across, across]])


def gram_covariance(gram: np.ndarray, degrees: int) -> np.ndarray:
    """Covariance (2, 2) of q = tr W / T and s = 1'W1 / T^2 for a Wishart matrix W of mean `gram` (T, T).

    (2 / degrees) (tr G^2 / T^2, 1'G^2 1 / T^3; 1'G^2 1 / T^3, (1'G1)^2 / T^4): tokens need not be exchangeable. Exact.
    Source: derived in proofs/prove_fluctuation.py.

    >>> gram_covariance(np.eye(2), 2).tolist()
    [[0.5, 0.25], [0.25, 0.25]]
    """
    n_tokens, mean = len(gram), gram.mean(axis=0)
    across = mean @ mean / n_tokens
    return 2 / degrees * np.array([[np.sum(gram**2) / n_tokens**2, across], [across, mean.mean() ** 2]])


def feed_forward_relative_variance(
    output_correlation: Any, fourth: Any, pair: Any, n_tokens: Any, d_model: Any, d_ff: Any
) -> Any:
    """Relative variance of the output power sum_t |f_t|^2 of a plain or gated feed-forward, for given inputs:

    (2/d)(A (1 - 1/d_ff) + B / d_ff) + (B - 1) / d_ff,  A = (1 + (T - 1) c^2) / T,  B = (fourth + (T - 1) pair) / T.

    output_correlation: c = E f_t.f_s / E |f|^2; fourth: E a^4 / (E a^2)^2 of an inner unit a = phi(h), gated phi(h) y;
    pair: E a_t^2 a_s^2 / (E a^2)^2 of two tokens. Exact at any width for exchangeable tokens; T = 1 gives the one-token
    law 2/d + (fourth - 1)(1 + 2/d) / d_ff. Source: derived in proofs/prove_fluctuation.py.
    Checked by: tests/theory/test_fluctuation.py.

    >>> round(feed_forward_relative_variance(1.0, 6.0, 6.0, 1, 200, 100), 6)
    0.0605
    """
    square = (1 + (n_tokens - 1) * output_correlation**2) / n_tokens
    inner = (fourth + (n_tokens - 1) * pair) / n_tokens
    return 2 * (square * (d_ff - 1) + inner) / (d_model * d_ff) + (inner - 1) / d_ff


def averaged_attention_variance(
    output_correlation: Any,
    group_correlation: Any,
    n_tokens: Any,
    d_model: Any,
    n_heads: Any,
    head_dim: Any,
    kv_group_size: Any = 1,
) -> Any:
    """Relative variance of the output power of attention over the values and output weights, at fixed patterns:

    2 r + (2/d)(A + r + (1 + (g - 1) z^2) / n),  r = (A + (g - 1) z^2) / n,  A = (1 + (T - 1) c^2) / T,

    n = n_heads * head_dim, g = kv_group_size. output_correlation: c = p_t' C p_s / p_t' C p_t of two tokens in a head;
    group_correlation: z, the same for two heads that share keys, at any two tokens. Exact for patterns with these
    forms. Source: derived in proofs/prove_fluctuation.py. Checked by: tests/theory/test_fluctuation.py.

    >>> averaged_attention_variance(1, 1, 10, 64, 4, 16), averaged_attention_variance(1, 1, 10, 64, 4, 16, 4)
    (0.0634765625, 0.16015625)
    """
    square = (1 + (n_tokens - 1) * output_correlation**2) / n_tokens
    shared, units = (kv_group_size - 1) * group_correlation**2, n_heads * head_dim
    values = (square + shared) / units
    return 2 * values + 2 * (square + values + (1 + shared) / units) / d_model


def required_networks_for(relative_stderr: float, spread: float) -> int:
    """Networks whose mean has this relative standard error: the ceiling of (spread / relative_stderr)^2, at least 2.

    relative_stderr > 0; spread >= 0: relative standard deviation across networks, as `fluctuation` gives it.
    Raises `AssumptionError` outside the domain.

    >>> required_networks_for(0.0025, 0.1)
    1600
    """
    for name, value, low in (("relative_stderr", relative_stderr, 0.0), ("spread", spread, -1e-300)):
        good = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        good = good and math.isfinite(value) and value > low
        domain = "a finite number > 0" if low == 0 else "a finite number >= 0"
        require(bool(good), AssumptionError, name, value, "outside the domain", domain)
    ratio = spread / relative_stderr
    return max(2, math.ceil(ratio * ratio * (1 - 1e-12)))  # rounding must not ask for one more


@dataclass(frozen=True)
class Fluctuation:
    """Standard deviations across networks, arrays (n_layers + 1, 5) over the sites of `predict`, NaN where absent.

    second_moment: relative to the mean; token_correlation: absolute.
    """

    second_moment: np.ndarray
    token_correlation: np.ndarray


def fluctuation(
    spec: ModelSpec, *, n_tokens: int, token_correlation: float | np.ndarray = 0.0, seed: int = 0
) -> Fluctuation:
    """Spread across networks of the token-averaged second moment and of the token correlation at every layer and site.

    Networks differ in their weights and in their tokens: Gaussian at the embedding, of this correlation (a number or a
    matrix, as in `predict`), as `simulate.sample` draws them. Relative error of `second_moment` below SPREAD_ERROR
    (linear response: largest where the correlation grows fast from 0); 20 % low for masks that keep few entries per
    neuron, and without bound where a block mask makes few large blocks. Attention patterns and routers are drawn
    (seed). `token_correlation` of attn_out is a lower bound: the Gram matrix of the realised tokens moves it too.
    Raises `AssumptionError` as `predict` does, and for other norm placements than "pre".
    Source: derived in proofs/prove_fluctuation.py. Checked by: tests/theory/test_fluctuation.py.

    >>> from varprop.spec import FeedForwardSpec, ModelSpec
    >>> relu = FeedForwardSpec(d_ff=683, activation="relu", gated=False)
    >>> spec = ModelSpec(d_model=256, n_layers=4, feed_forward=relu)
    >>> fluctuation(spec, n_tokens=128).second_moment[[0, 1, 4], 4].round(4)
    array([0.0078, 0.0128, 0.0256])
    """
    if is_tabulated(spec) and np.ndim(token_correlation) == 0:
        profile = predict(spec, n_tokens=n_tokens, token_correlation=token_correlation, seed=seed)
        q, c, wishart = np.asarray(profile.second_moment), np.asarray(profile.token_correlation), None
    else:
        q, c, wishart = _resolved(spec, n_tokens, token_correlation, seed)
    return spread_profile(spec, n_tokens=n_tokens, second_moment=q, token_correlation=c, wishart=wishart, seed=seed)


def _resolved(
    spec: ModelSpec, n_tokens: int, token_correlation: float | np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second moments, correlations and Wishart covariances from the position-resolved Gram matrices."""
    check_integer("n_tokens", n_tokens, 1)
    wrong, domain = "too many for a position-resolved recursion", f"at most {MAX_GRAM_TOKENS}"
    require(n_tokens <= MAX_GRAM_TOKENS, AssumptionError, "n_tokens", n_tokens, wrong, domain)
    matrix = np.asarray(checked_correlation(token_correlation, n_tokens))
    if matrix.ndim == 0:
        matrix = (1 - matrix) * np.eye(n_tokens) + matrix
    start = embedding_second_moment(spec) * matrix
    q, c = np.full((2, spec.n_layers + 1, 5), np.nan)
    wishart = np.full((spec.n_layers + 1, 5, 2, 2), np.nan)

    def write(layer: int, site: int, gram: np.ndarray) -> None:
        mean = Moments(gram.mean(axis=0, keepdims=True), n_tokens)
        q[layer, site], c[layer, site] = mean.second_moment[0], mean.token_correlation[0]
        wishart[layer, site] = gram_covariance(mean.gram[0], spec.d_model)

    write(0, POST, start[None])
    recursion = GramRecursion(spec, start, None if has_closure(spec) else seed)
    for layer, sites in enumerate(recursion, start=1):
        for site, gram in enumerate(sites):
            write(layer, site, gram)
    return q, c, wishart


def spread_profile(
    spec: ModelSpec,
    *,
    n_tokens: int,
    second_moment: np.ndarray,
    token_correlation: np.ndarray,
    wishart: np.ndarray | None = None,
    seed: int = 0,
) -> Fluctuation:
    """`fluctuation` around given means (n_layers + 1, 5): second moments and token correlations at every site.

    wishart: `gram_covariance` of the mean Gram matrix at every site, (n_layers + 1, 5, 2, 2), where tokens are not
    exchangeable; else that of exchangeable tokens.
    """
    placement = spec.norm.placement
    require(placement == "pre", AssumptionError, "norm.placement", placement, "not covered by the theory", "'pre'")
    recursion = _Recursion(spec, n_tokens, second_moment, np.clip(token_correlation, 0.0, 1.0), wishart, seed)
    for layer in range(1, spec.n_layers + 1):
        recursion.advance(layer)
    return Fluctuation(recursion.spread, recursion.correlation_spread)


PRE, ATTENTION, MIDDLE, MLP, POST = range(5)


class _Recursion:
    """Carries the covariance of (q, s) of the stream down the layers."""

    def __init__(
        self, spec: ModelSpec, n_tokens: int, q: np.ndarray, c: np.ndarray, wishart: np.ndarray | None, seed: int
    ) -> None:
        self.spec, self.n_tokens, self.q, self.c, self.wishart, self.seed = spec, n_tokens, q, c, wishart, seed
        self.spread, self.correlation_spread = np.full_like(q, np.nan), np.full_like(q, np.nan)
        self.laws: dict[Any, BranchLaw] = {}
        self.covariance = self._gaussian(0, POST)
        self._write(0, POST, self.covariance)

    def advance(self, layer: int) -> None:
        """One block: both branches, in sequence or in parallel."""
        before, at = self.covariance, (layer, PRE)
        self._write(layer, PRE, before)
        spec = self.spec
        has_attention, has_mlp = spec.attention is not None, spec.feed_forward is not None or spec.moe is not None
        parallel = spec.block == "parallel" and has_attention and has_mlp
        skip, shift, noise = np.eye(2), np.zeros((2, 2)), np.zeros((2, 2))
        middle = before
        if has_attention:
            shift, noise = self._branch(layer, ATTENTION, at, attention_law, before)
            skip = self.spec.skip_scale**2 * np.eye(2)
            middle = self._sum(before, skip + shift, noise, (layer, MIDDLE), at)
        self._write(layer, MIDDLE, middle)
        after = middle
        if has_mlp:
            source, state = (at, before) if parallel else ((layer, MIDDLE), middle)
            own_shift, own_noise = self._branch(layer, MLP, source, mlp_law, state)
            if parallel:
                after = self._sum(before, skip + shift + own_shift, noise + own_noise, (layer, POST), at)
            else:
                own_skip = self.spec.skip_scale**2 * np.eye(2)
                after = self._sum(middle, own_skip + own_shift, own_noise, (layer, POST), (layer, MIDDLE))
        self._write(layer, POST, after)
        self.covariance = after

    def _branch(
        self, layer: int, site: int, source: tuple[int, int], law: Callable[..., BranchLaw], state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Jacobian of a branch's mean (q, s) by those of its input, and the covariance that its inner weights add."""
        q, c = self.q[source], self.c[source]
        scale = self.q[layer, site]
        if scale == 0:
            return np.zeros((2, 2)), np.zeros((2, 2))
        input_moment = round(float(q / (q + self.spec.norm.eps)), 2)  # laws are smooth: two digits
        key = (site, self.spec.is_moe(layer), self.spec.attention and self.spec.window(layer), input_moment)
        if key not in self.laws:
            self.laws[key] = law(self.spec, layer, self.n_tokens, input_moment, self.seed)
        response, noise, entry = self.laws[key].at(float(c))
        # Given K the output weights add 2/d mean_ts K_ts^2, whose mean exceeds that of the mean K by Var K_ts: of the
        # inner weights and, in a feed-forward, of the realised cosines. Var C = (1 - c^2)^2 / d, Cov(G_ts, C_ts) =
        # q (1 - c^2) / d. Of order 1/d^2 in the variance, but the diagonal is only 1/T of mean_ts: it counts for T ~ d.
        slope = response[1] if site == MLP else 0.0
        pairs = self.n_tokens / max(1, self.n_tokens - 1)
        entry += pairs * slope**2 * (1 - c**2) ** 2 / self.spec.d_model
        cross = 2 * self.spec.skip_scale**2 * q / scale * slope * (1 - c**2) / self.spec.d_model
        shift = scale * np.outer(response, self._correlation_row(q, c))
        noise = scale**2 * (noise + 2 / self.spec.d_model * np.diag([entry, 0.0]))
        self._write(layer, site, shift @ state @ shift.T + self._gaussian(layer, site) + noise)
        return shift, noise + scale**2 * 2 / self.spec.d_model * np.diag([cross, 0.0])

    def _correlation_row(self, q: float, c: float) -> np.ndarray:
        """Derivative of c = (T s / q - 1) / (T - 1) by (q, s); zero for one token."""
        others = self.n_tokens - 1
        return np.zeros(2) if others == 0 else np.array([-(1 / others + c) / q, self.n_tokens / others / q])

    def _gaussian(self, layer: int, site: int) -> np.ndarray:
        if self.wishart is not None:
            return self.wishart[layer, site]
        q, c = self.q[layer, site], self.c[layer, site]
        return gaussian_covariance(q, c, self.n_tokens, self.spec.d_model)

    def _sum(
        self, state: np.ndarray, jacobian: np.ndarray, noise: np.ndarray, to: tuple[int, int], source: tuple[int, int]
    ) -> np.ndarray:
        """After a residual sum: the output weights add what makes a Wishart matrix of the sum out of that of x."""
        skip = self.spec.skip_scale**4
        return jacobian @ state @ jacobian.T + self._gaussian(*to) - skip * self._gaussian(*source) + noise

    def _write(self, layer: int, site: int, covariance: np.ndarray) -> None:
        q, c = self.q[layer, site], self.c[layer, site]
        if q == 0:
            self.spread[layer, site] = self.correlation_spread[layer, site] = 0.0
            return
        row = self._correlation_row(q, c)
        self.spread[layer, site] = math.sqrt(covariance[0, 0]) / q
        self.correlation_spread[layer, site] = math.sqrt(max(row @ covariance @ row, 0.0))
