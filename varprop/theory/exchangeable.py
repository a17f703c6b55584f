"""The two-scalar recursion: all tokens have one second moment q and all pairs one covariance k, full attention.

Branch rules are tabulated (pair_table.py), and the layers of many specs of one structure advance together as arrays:
the cost is linear in depth, and almost independent of the number of specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from varprop.errors import AssumptionError
from varprop.spec import ModelSpec, TensorRow, layer_table
from varprop.spec.tensors import init_std
from varprop.theory.attention import (
    attention_gains,
    attention_logit_std,
    incoherent_average,
    is_exchangeable,
    value_key_coupling,
)
from varprop.theory.block import Frame, block
from varprop.theory.feed_forward import (
    FeedForwardGains,
    feed_forward_covariance,
    feed_forward_gains,
    feed_forward_second_moment,
)
from varprop.theory.moe import moe_pair
from varprop.theory.norm import centred_second_moment, cosine_mean, normalised_second_moment
from varprop.theory.pair_table import PairTable, Rule
from varprop.theory.softmax_table import softmax_table

MARGIN = 1.05
MAX_ROUNDS = 40


def structure(spec: ModelSpec) -> tuple[object, ...]:
    """What specs have to share to advance as one array."""
    feed_forward, moe = spec.feed_forward, spec.moe
    return (
        spec.n_layers,
        replace(spec.norm, eps=0.0),
        spec.block,
        spec.attention is None,
        None if feed_forward is None else (feed_forward.activation, feed_forward.gated),
        None if moe is None else replace(moe, d_expert=1, gate_multiplier=1.0),
        spec.moe_pattern,
    )


def embedding_second_moment(spec: ModelSpec) -> float:
    """E x^2 of the embedding output: (init std * embedding_scale)^2."""
    return (init_std(spec, "embed", 1, spec.d_model) * spec.embedding_scale) ** 2


def exchangeable_profile(
    specs: Sequence[ModelSpec], n_tokens: int, token_correlation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Second moment and covariance, each (n_specs, n_layers, 5 sites), of specs of one `structure`.

    token_correlation: of the embeddings, (n_specs,). The sites are those of layers 1..n_layers. Quadrature; second
    moments exact where those of the branches are (`theory.error`). Raises `AssumptionError` unless `is_exchangeable`.
    """
    for spec in specs:
        if not is_exchangeable(spec):
            raise AssumptionError(
                f"attention.pattern={spec._attention().pattern!r} is not exchangeable here; expected full attention "
                "without positions, QK-norm, soft cap, sink logit or key mask"
            )
    first = specs[0]
    start = np.array([embedding_second_moment(spec) for spec in specs])
    state = np.stack([start, start * (token_correlation if n_tokens > 1 else 1.0)])
    frame = Frame(
        first,
        skip_scale=np.array([spec.skip_scale for spec in specs]),
        branch_scale=np.array([spec.branch_scale for spec in specs]),
    )
    rules = _Rules(specs, n_tokens, state[0])
    for _ in range(MAX_ROUNDS):
        sites = []
        current = state
        for layer in range(1, first.n_layers + 1):
            sites.append(block(current, layer, frame, rules))
            current = sites[-1][-1]
        if rules.covers_what_it_met():
            break
    else:
        raise AssumptionError("second_moment grows without end over depth; expected smaller gains or scales")
    found = np.array(sites)  # (layers, sites, 2, specs)
    return tuple(np.moveaxis(found, (2, 3), (0, 1)))  # type: ignore[return-value]


class _Rules:
    """`block.Rules` for pairs (2, n_specs); tables over the range of second moments that the branches meet."""

    def __init__(self, specs: Sequence[ModelSpec], n_tokens: int, start: np.ndarray) -> None:
        self._specs, self._n_tokens = specs, n_tokens
        first = specs[0]
        self._eps = np.array([spec.norm.eps for spec in specs])
        self._d_model = np.array([spec.d_model for spec in specs]) if first.norm.kind == "layer" else None
        reads_norm = first.norm.placement in ("pre", "peri", "lns")
        low = normalised_second_moment(start, self._eps) if reads_norm else np.minimum(start, 1.0)
        high = np.ones_like(start) if reads_norm else np.maximum(start, 1.0)
        if first.norm.placement == "lns":
            low = low / first.n_layers
        elif first.norm.placement == "reordered":  # a normalised branch adds at most branch_scale^2
            high = start + np.array([2 * spec.n_layers * spec.branch_scale**2 for spec in specs])
        self._kinds = [first.is_moe(layer) for layer in range(1, first.n_layers + 1)]
        self._build(low, high)

    def _build(self, low: np.ndarray, high: np.ndarray) -> None:
        self._low, self._high, self._met = low, high, []
        specs = self._specs
        self._attention = None
        if specs[0].attention is not None:
            self._attention = PairTable(_attention_rule(specs, self._n_tokens, low, high), low, high)
        self._feed_forward = {}
        if specs[0].feed_forward is not None or specs[0].moe is not None:
            for is_moe in set(self._kinds):
                layer = self._kinds.index(is_moe) + 1
                self._feed_forward[is_moe] = PairTable(_feed_forward_rule(specs, layer), low, high)

    def covers_what_it_met(self) -> bool:
        """Whether the tables covered every input; if not, they are built again over a wider range."""
        met = np.array(self._met)
        lowest, highest = met.min(axis=0), met.max(axis=0)
        self._met = []
        if (lowest >= self._low * (1 - 1e-12)).all() and (highest <= self._high * (1 + 1e-12)).all():
            return True
        if not np.isfinite(highest).all():
            raise AssumptionError("second_moment leaves the floating-point range; expected smaller gains or scales")
        low = np.where(lowest < self._low, lowest / MARGIN, self._low)
        self._build(low, np.where(highest > self._high, highest * MARGIN, self._high))
        return False

    def normalised(self, state: np.ndarray) -> np.ndarray:
        if self._d_model is not None:
            state = centred_second_moment(state, self._d_model)
        return state / (state[0] + self._eps)

    def attention(self, state: np.ndarray, layer: int) -> np.ndarray:
        assert self._attention is not None
        self._met.append(state[0])
        return self._attention(state)

    def feed_forward(self, state: np.ndarray, layer: int) -> np.ndarray:
        self._met.append(state[0])
        return self._feed_forward[self._kinds[layer - 1]](state)


def _attention_rule(specs: Sequence[ModelSpec], n_tokens: int, low: np.ndarray, high: np.ndarray) -> Rule:
    """Second moment g (c + (1 - c) Y + coupling), covariance g (c + (1 - c) X), g = sigma_OV^2 m (attention.py)."""
    gains = [attention_gains(spec, 1) for spec in specs]
    value_output = np.array([g.value_output for g in gains])[:, None, None]
    unit_std = np.array([attention_logit_std(s, g, 1.0) for s, g in zip(specs, gains, strict=True)])
    shapes = [(spec.head_dim, spec.d_model) for spec in specs]
    members = {shape: np.array([i for i, s in enumerate(shapes) if s == shape]) for shape in dict.fromkeys(shapes)}
    tables = {
        shape: softmax_table(n_tokens, *shape, float((unit_std * low)[rows].min()), float((unit_std * high)[rows].max()))
        for shape, rows in members.items()
    }

    def rule(second_moment: np.ndarray, correlation: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        shape = (*second_moment.shape[:2], len(correlation))
        diagonal, covariance = np.empty(shape), np.empty(shape)
        first, last = chosen.start, chosen.start + len(second_moment)
        for (_, d_model), table in tables.items():
            rows = members[(_, d_model)]
            rows = rows[(rows >= first) & (rows < last)]
            m = second_moment[rows - first]
            std, c = unit_std[rows, None] * m[..., 0], cosine_mean(correlation, d_model)
            participation, pair, own = table.moments(std[..., None] * np.sqrt(1 - c))
            coupling = value_key_coupling(c, pair, own, d_model)
            scale = value_output[rows] * m
            diagonal[rows - first] = scale * (incoherent_average(c, participation) + coupling)
            covariance[rows - first] = scale * incoherent_average(c, table.overlap(std, c))
        return diagonal, covariance

    return rule


def _feed_forward_rule(specs: Sequence[ModelSpec], layer: int) -> Rule:
    rows = [layer_table(spec, layer) for spec in specs]
    d_model = np.array([spec.d_model for spec in specs])[:, None, None]
    if specs[0].is_moe(layer):
        parts = [spec.moe for spec in specs]
        return moe_pair(rows, parts, d_model)  # type: ignore[arg-type]
    part = specs[0].feed_forward
    assert part is not None
    return dense_pair([_mlp_rows(r) for r in rows], part.activation, part.gated, d_model)


def _mlp_rows(rows: dict[str, TensorRow]) -> dict[str, TensorRow]:
    return {name.removeprefix("mlp."): row for name, row in rows.items() if name.startswith("mlp.")}


def dense_pair(rows: Sequence[dict[str, TensorRow]], activation: str, gated: bool, d_model: np.ndarray) -> Rule:
    """The feed-forward rule of a pair of tokens for many specs; d_model: (n_specs, 1, 1)."""
    each = [feed_forward_gains(r) for r in rows]
    inner, up, down = (np.array([getattr(g, name) for g in each])[:, None, None] for name in ("inner", "up", "down"))

    def rule(second_moment: np.ndarray, correlation: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        gains = FeedForwardGains(inner[chosen], up[chosen], down[chosen])
        diagonal = feed_forward_second_moment(second_moment, gains, activation, gated)
        covariance = feed_forward_covariance(
            second_moment, second_moment, correlation, gains, activation, gated, d_model[chosen]
        )
        return np.broadcast_to(diagonal, covariance.shape), covariance

    return rule
