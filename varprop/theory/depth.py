"""The recursion over depth of a Pre-LN model at initialisation: `predict(spec)`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from varprop import results
from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec, layer_table
from varprop.theory.attention import exchangeable_attention, is_exchangeable, sampled_attention
from varprop.theory.error import Claim, ErrorBudget
from varprop.theory.feed_forward import feed_forward_gram
from varprop.theory.moe import moe_gram
from varprop.theory.moments import Moments
from varprop.theory.norm import norm_gram
from varprop.theory.residual import residual_second_moment

HEAD_BUDGET = 12_288
"""Heads drawn per layer, over all recursions, times n_tokens; between 8 and 512 heads."""
MAX_HEADS = 8
"""Heads per recursion: as many as the layer has, but not more than this."""
ROUTER_DRAWS = 8192
"""Router draws per layer for two exchangeable tokens, over all recursions."""


@dataclass(frozen=True)
class _Sampling:
    """How many independent recursions there are, and heads and routers drawn per layer in each."""

    n_recursions: int
    n_heads: int
    n_routers: int


def predict(
    spec: ModelSpec, *, n_tokens: int, token_correlation: float | np.ndarray = 0.0, seed: int = 0
) -> xr.Dataset:
    """Second moment and token correlation at every layer and site of a Pre-LN model at initialisation.

    token_correlation: of the embeddings of two tokens, a number in [0, 1], or a correlation matrix
    (n_tokens, n_tokens), 1 where two positions hold the same token. The embedding has the second moment
    (init std * embedding_scale)^2.

    Variables, dimensions (layer, site): `second_moment`, E|x|^2 / d averaged over positions; `token_correlation`,
    E x_i.x_j / d averaged over i != j over the second moment (1 for one token, 0 for an absent branch);
    `theory_error`, the claimed relative error of `second_moment`; `token_correlation_error`, its own claimed
    absolute error;
    `second_moment_stderr` and `token_correlation_stderr`, the standard errors from drawn heads and routers (0 where
    nothing was drawn); `exactness`,
    "exact", "quadrature" or "O(1/width)" of `second_moment`.

    The same seed gives bitwise the same result. Raises `AssumptionError` for other norm placements than "pre", for
    expert-choice routing, and for a token correlation outside its domain. Source: proofs/ of each component.

    >>> from varprop.spec import FeedForwardSpec, ModelSpec
    >>> spec = ModelSpec(d_model=64, n_layers=4, feed_forward=FeedForwardSpec(d_ff=256, activation="relu", gated=False))
    >>> [round(float(q), 3) for q in predict(spec, n_tokens=8).second_moment.sel(site="resid_post")]
    [1.0, 1.5, 2.0, 2.5, 3.0]
    """
    _check(spec, n_tokens, seed)
    tokens, sampling = _embedding(spec, n_tokens, token_correlation)
    budget = ErrorBudget(spec, n_tokens)
    table = _Table(spec.n_layers)
    table.write(0, "resid_post", tokens, budget.embedding())
    zero = tokens.with_gram(np.zeros_like(tokens.gram))
    for layer in range(1, spec.n_layers + 1):
        rng = np.random.default_rng([seed, layer])
        before = tokens
        attention, mlp, middle = zero, zero, before
        if spec.attention is not None:
            attention = _scaled(spec, _attention(spec, layer, before, sampling, rng))
            middle = _added(before, attention, spec.skip_scale)
        tokens = middle
        if spec.feed_forward is not None or spec.moe is not None:
            parallel = spec.block == "parallel"
            mlp = _scaled(spec, _mlp(spec, layer, before if parallel else middle, sampling, rng))
            one_sum = parallel and spec.attention is not None
            tokens = _added(middle, mlp, 1.0 if one_sum else spec.skip_scale)
        sites = dict(zip(results.SITES, (before, attention, middle, mlp, tokens), strict=True))
        claims = budget.advance(layer, {site: float(m.second_moment.mean()) for site, m in sites.items()})
        for site, moments in sites.items():
            table.write(layer, site, moments, claims[site])
    return results.new(
        table.variables(),
        source="theory",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=n_tokens,
        seed_entropy=str(seed),
        attributes={"token_correlation": float(token_correlation) if np.ndim(token_correlation) == 0 else "matrix"},
    )


def _check(spec: ModelSpec, n_tokens: int, seed: int) -> None:
    good = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool) and seed >= 0
    require(good, AssumptionError, "seed", seed, "outside the domain", "an integer >= 0")
    require(
        isinstance(n_tokens, (int, np.integer)) and not isinstance(n_tokens, bool) and n_tokens >= 1,
        AssumptionError,
        "n_tokens",
        n_tokens,
        "outside the domain",
        "an integer >= 1",
    )
    placement = spec.norm.placement
    require(placement == "pre", AssumptionError, "norm.placement", placement, "not covered by the theory", "'pre'")


def _embedding(spec: ModelSpec, n_tokens: int, token_correlation: float | np.ndarray) -> tuple[Moments, _Sampling]:
    """The embedding's moments in the smallest form that the spec's attention allows, and what to draw."""
    second_moment = (spec.tensor_table()[0].init_std * spec.embedding_scale) ** 2
    try:
        matrix = np.asarray(token_correlation, dtype=float)
    except (TypeError, ValueError):
        matrix = np.asarray(np.nan)
    sink = spec.attention is not None and spec.attention.sink_logit
    draws_heads = spec.attention is not None and not is_exchangeable(spec) and (n_tokens > 1 or sink)
    draws_routers = spec.moe is not None and n_tokens > 1
    if matrix.ndim == 0:
        _check_correlation(bool(0 <= matrix <= 1), float(matrix))
        if not draws_heads:
            n_recursions = 8 if draws_routers and spec.attention is not None else 1
            start = Moments.exchangeable(second_moment, float(matrix), n_tokens, n_recursions)
            return start, _Sampling(n_recursions, 1, ROUTER_DRAWS // n_recursions)
        matrix = (1 - matrix) * np.eye(n_tokens) + matrix
    _check_matrix(matrix, n_tokens)
    n_recursions, n_heads = (8 if draws_routers else 1), 1
    if spec.attention is not None:
        total = int(np.clip(HEAD_BUDGET // n_tokens, 8, 512))
        n_recursions = max(8, total // min(spec.n_heads, MAX_HEADS))
        n_heads = max(1, min(spec.n_heads, MAX_HEADS, total // n_recursions))
    gram = np.broadcast_to(second_moment * matrix, (n_recursions, n_tokens, n_tokens)).copy()
    return Moments(gram, n_tokens), _Sampling(n_recursions, n_heads, 1)


def _check_correlation(good: bool, value: object) -> None:
    domain = "a number in [0, 1] or an (n_tokens, n_tokens) correlation matrix"
    require(good, AssumptionError, "token_correlation", value, "outside the domain", domain)


def _check_matrix(matrix: np.ndarray, n_tokens: int) -> None:
    _check_correlation(matrix.shape == (n_tokens, n_tokens), f"array of shape {matrix.shape}")
    good = np.isfinite(matrix).all() and np.allclose(matrix, matrix.T) and np.allclose(np.diagonal(matrix), 1)
    _check_correlation(bool(good), "array that is not symmetric with a unit diagonal")
    rounding = 1e-8 * n_tokens
    _check_correlation(bool(np.linalg.eigvalsh(matrix)[0] > -rounding), "array that is not positive semidefinite")


def _normalised(spec: ModelSpec, tokens: Moments) -> Moments:
    return tokens.with_gram(norm_gram(tokens.gram, spec.norm.kind, spec.norm.eps, spec.d_model))


def _attention(spec: ModelSpec, layer: int, tokens: Moments, sampling: _Sampling, rng: np.random.Generator) -> Moments:
    tokens = _normalised(spec, tokens)
    if "exchangeable" in tokens.assumptions and is_exchangeable(spec):
        return tokens.with_gram(exchangeable_attention(spec, layer, tokens))
    return tokens.with_gram(sampled_attention(spec, layer, tokens, sampling.n_heads, rng))


def _mlp(spec: ModelSpec, layer: int, tokens: Moments, sampling: _Sampling, rng: np.random.Generator) -> Moments:
    gram = _normalised(spec, tokens).gram
    rows = layer_table(spec, layer)
    if spec.is_moe(layer):
        assert spec.moe is not None
        return tokens.with_gram(moe_gram(gram, rows, spec.moe, spec.d_model, sampling.n_routers, rng))
    part = spec.feed_forward
    assert part is not None
    matrices = {name.removeprefix("mlp."): row for name, row in rows.items() if name.startswith("mlp.")}
    return tokens.with_gram(feed_forward_gram(gram, matrices, part.activation, part.gated, spec.d_model))


def _scaled(spec: ModelSpec, branch: Moments) -> Moments:
    """What a branch adds to the stream, after its multiplier."""
    return branch.with_gram(residual_second_moment(0.0, branch.gram, branch_scale=spec.branch_scale))


def _added(stream: Moments, branch: Moments, skip_scale: float) -> Moments:
    return stream.with_gram(residual_second_moment(stream.gram, branch.gram, skip_scale=skip_scale))


class _Table:
    """The result's arrays, filled site by site; NaN and "" where a site does not exist."""

    def __init__(self, n_layers: int) -> None:
        shape = (n_layers + 1, len(results.SITES))
        names = (
            "second_moment",
            "token_correlation",
            "theory_error",
            "token_correlation_error",
            "second_moment_stderr",
            "token_correlation_stderr",
        )
        self.numbers = {name: np.full(shape, np.nan) for name in names}
        self.exactness = np.full(shape, "", dtype="<U10")

    def write(self, layer: int, site: str, moments: Moments, claim: Claim) -> None:
        at = layer, results.SITES.index(site)
        per_recursion = moments.second_moment
        count = per_recursion.size
        stderr = float(per_recursion.std(ddof=1)) / count**0.5 if count > 1 else 0.0
        weight = per_recursion.sum()
        correlation = float(per_recursion @ moments.token_correlation / weight) if weight > 0 else 0.0
        each = moments.token_correlation
        spread = float(each.std(ddof=1)) / count**0.5 if count > 1 else 0.0
        values = (float(per_recursion.mean()), correlation, claim.relative, claim.correlation, stderr, spread)
        for array, value in zip(self.numbers.values(), values, strict=True):
            array[at] = value
        self.exactness[at] = claim.exactness

    def variables(self) -> results.Variables:
        dims = ("layer", "site")
        return {name: (dims, array) for name, array in {**self.numbers, "exactness": self.exactness}.items()}
