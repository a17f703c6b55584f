"""Gradients through depth with positions resolved: the Gram matrix of dL/dx_t over tokens, any pattern of attention.

In causal attention early keys are read by all later queries, so that gradients gather on the first positions, which
have the largest stream. With G_tu = E g_t.g_u / d of the gradient that arrives, C the cosines of the tokens, M the
uniform weights over the visible keys and Z_t the projection that centres over the n_t keys of query t, attention gives
at its normalised input sigma_OV^2 times

    M' G M + sum_tu G_tu (e_tu + s_t s_u C_tu b_tu) Z_t Z_u + G * s_t s_u kappa_t kappa_u (b_tu tr Z_t Z_u + v_tu / d),

the value, key and query path. E p_t p_u' = M_t M_u' + e_tu Z_t Z_u; E B_t B_u' = b_tu Z_t Z_u, B the softmax Jacobian;
v = E tr B_t tr B_u; s_t^2 the variance of the logits of query t over its keys, kappa_t^2 = 1 - c_l. The keys of a query
have their mean correlation c_t and are otherwise taken as exchangeable, rows of different queries as in
`softmax_jacobian.py`: uncorrelated ones are exact, and e and b go up with e^{C_tu L}, L = log(n Y).

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.attention import attention_gains, incoherent_average
from varprop.theory.branch_jacobian import branch_input, branch_powers, logit_std, norm_powers, projected_share
from varprop.theory.patterns import allowed_keys
from varprop.theory.softmax_jacobian import centred_overlap, mean_rotation, query_averages

ROUNDING = 1e-9


def gradient_by_position(
    spec: ModelSpec, grams: Sequence[tuple[np.ndarray, np.ndarray]], *, documents: np.ndarray | None = None
) -> np.ndarray:
    """E|dL/dx_t|^2 / d of the stream of every layer and position, (n_layers + 1, T), for uncorrelated unit gradients
    at the last layer.

    grams: for each layer the Gram matrices (T, T) of the stream before the attention and before the feed-forward (the
    latter not read by a parallel block). documents: (T,) integers; a query sees only keys of its own document. Equals
    `gradient_second_moment` for exchangeable tokens and full attention. Leading order in 1/d and 1/head_dim. Raises
    `AssumptionError` as `block_jacobian` does, and for a wrong number of Gram matrices.
    Source: derived in the module docstring. Checked by: tests/theory/test_position_gradient.py, autograd.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(n_layers=1, feed_forward=None)
    >>> gradient_by_position(spec, [(np.eye(3), np.eye(3))]).round(1).tolist()  # all queries see the first token
    [[2.6, 1.8, 1.4], [1.0, 1.0, 1.0]]
    """
    require(len(grams) == spec.n_layers, AssumptionError, "grams", len(grams), "of wrong length", str(spec.n_layers))
    gradient = np.eye(len(grams[0][0]))
    found = [np.diagonal(gradient)]
    for layer in range(spec.n_layers, 0, -1):
        gradient = block_gradient(spec, layer, *grams[layer - 1], gradient, documents)
        found.append(np.diagonal(gradient))
    return np.array(found[::-1])


def block_gradient(
    spec: ModelSpec,
    layer: int,
    gram: np.ndarray,
    middle_gram: np.ndarray,
    gradient: np.ndarray,
    documents: np.ndarray | None = None,
) -> np.ndarray:
    """Gram matrix E g_t.g_u / d of the gradient before a block, (T, T), from that after it, `gradient`.

    Other arguments, exactness and errors as in `gradient_by_position`. Source, Checked by: as there.

    >>> from varprop.spec import FeedForwardSpec
    >>> part = FeedForwardSpec(d_ff=64, activation="relu", gated=False)
    >>> spec = ModelSpec(d_model=10**6, n_layers=1, feed_forward=part)
    >>> stream = np.diag([1.0, 2.0])
    >>> block_gradient(spec, 1, stream, stream, np.eye(2)).diagonal().round(3).tolist()  # 1 + 1 / (2 q)
    [1.5, 1.25]
    """
    attention, mlp = spec.attention is not None, spec.feed_forward is not None or spec.moe is not None
    skip = spec.skip_scale**2
    if spec.block == "parallel" and attention and mlp:
        branches = (_attention(spec, layer, gram, documents), _feed_forward(spec, layer, gram))
        return skip * gradient + sum(branch.back(gradient) for branch in branches)
    if mlp:  # the last residual sum acts on the gradient first
        gradient = _residual(spec, layer, middle_gram, _feed_forward(spec, layer, middle_gram), gradient)
    if attention:
        gradient = _residual(spec, layer, gram, _attention(spec, layer, gram, documents), gradient)
    return gradient


@dataclass(frozen=True)
class _Branch:
    """What a branch does to gradients, factor * (M' G M + sum_tu (G * centred)_tu Z_t Z_u + local * G), all (T, T).

    after: times the gradient first, of a norm after attention; allowed: without it (feed-forward) the first two terms
    are absent; forward: second moment of the branch, geometric means of two tokens.
    """

    factor: np.ndarray
    local: np.ndarray
    forward: np.ndarray
    after: np.ndarray
    centred: np.ndarray | None = None
    allowed: np.ndarray | None = None

    def back(self, gradient: np.ndarray) -> np.ndarray:
        gradient = self.after * gradient
        total = self.local * gradient
        if self.allowed is not None and self.centred is not None:
            total = total + _moved(gradient, gradient * self.centred, self.allowed)
        return self.factor * total


def _moved(gradient: np.ndarray, centred: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """M' G M + sum_tu centred_tu Z_t Z_u, Z_t = diag(A_t) - A_t A_t' / n_t, A the rows of `allowed`."""
    mean = allowed / allowed.sum(axis=1, keepdims=True)
    rows = allowed.T * (allowed.T @ centred)
    crossed = rows @ mean
    total = mean.T @ (gradient + centred * (allowed @ allowed.T)) @ mean - crossed - crossed.T
    index = np.arange(len(allowed))
    total[index, index] += (rows * allowed.T).sum(axis=1)
    return total


def _residual(spec: ModelSpec, layer: int, gram: np.ndarray, branch: _Branch, gradient: np.ndarray) -> np.ndarray:
    if spec.norm_placement(layer) == "post":
        second_moment, cosine = _geometric(gram)
        after = spec.skip_scale**2 * second_moment + branch.forward
        gradient = gradient * np.where(np.eye(len(gram), dtype=bool), *norm_powers(spec, after, cosine))
    return spec.skip_scale**2 * gradient + branch.back(gradient)


def _feed_forward(spec: ModelSpec, layer: int, gram: np.ndarray) -> _Branch:
    powers = branch_powers(spec, layer, len(gram), "mlp", *_geometric(gram))
    same, ones = np.eye(len(gram), dtype=bool), np.ones_like(gram)
    return _Branch(np.where(same, powers.values["all_sources"], powers.pair), ones, powers.forward, ones)


def _attention(spec: ModelSpec, layer: int, gram: np.ndarray, documents: np.ndarray | None) -> _Branch:
    second_moment, cosine = _geometric(gram)
    tokens, gains = branch_input(spec, layer, second_moment, cosine), attention_gains(spec, layer)
    allowed = allowed_keys(spec, layer, len(gram), documents).astype(float)
    n_keys = allowed.sum(axis=1)
    others = np.maximum(n_keys - 1, 1.0)
    c = np.maximum((((allowed @ cosine) * allowed).sum(axis=1) - n_keys) / (n_keys * others), 0.0)
    key_c = c * mean_rotation(spec, layer, len(gram))
    std = logit_std(spec, gains.query * gains.key, np.diagonal(tokens.second_moment))
    mean = query_averages(spec, n_keys, std * np.sqrt(1 - key_c))
    overlap, pair_overlap, pair_square = _pairs(cosine, allowed, mean.participation)
    same, trace = np.eye(len(gram), dtype=bool), 1 - mean.participation
    key = np.sqrt(projected_share(spec) * (1 - c)) * std
    query = key * np.sqrt(1 - key_c)
    spread = np.where(same, mean.spread, np.outer(trace, trace)) / spec.d_model
    keyed = np.where(same, mean.key_square / others, pair_square)
    square = np.where(same, mean.square, pair_square * overlap)
    factor = gains.value_output * spec.branch_scale**2 * np.where(same, tokens.own, tokens.pair)
    centred = np.where(same, (mean.participation - 1 / n_keys) / others, pair_overlap)
    centred += np.outer(key, key) * cosine * keyed
    power = gains.value_output * np.diagonal(tokens.second_moment) * incoherent_average(c, mean.participation)
    forward = np.sqrt(np.outer(power, power))
    local = np.outer(query, query) * (square + spread)
    after = np.ones_like(gram)
    if spec.norm_placement(layer) in ("peri", "reordered"):
        after = np.where(same, *norm_powers(spec, forward, cosine))
    return _Branch(factor, local, spec.branch_scale**2 * forward, after, centred, allowed)


def _pairs(cosine: np.ndarray, allowed: np.ndarray, participation: np.ndarray) -> tuple[np.ndarray, ...]:
    """tr Z_t Z_u, e_tu and b_tu, (T, T); e and b hold for different queries only."""
    n_keys = allowed.sum(axis=1)
    common = allowed @ allowed.T
    overlap = centred_overlap(common, n_keys[:, None], n_keys)
    log_excess = np.sqrt(np.log(np.maximum(n_keys * participation, 1.0)))
    exponent = cosine * np.outer(log_excess, log_excess)
    shares = np.zeros_like(overlap)
    np.divide(common / np.outer(n_keys, n_keys), overlap, out=shares, where=overlap > ROUNDING)
    trace = (1 - participation) / np.maximum(n_keys - 1, 1.0)
    return overlap, shares * np.expm1(exponent), np.outer(trace, trace) * np.exp(exponent)


def _geometric(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Geometric means of the second moments of two tokens, and cosines; those below 0 count as 0."""
    root = np.sqrt(np.diagonal(gram))
    second_moment = np.outer(root, root)
    return second_moment, np.clip(gram / second_moment, 0.0, 1.0)
