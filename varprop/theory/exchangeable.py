"""The two-scalar recursion: all tokens have one second moment q and all pairs one covariance k, full attention.

Branch rules are tabulated (pair_table.py), and the layers of many specs of one structure advance together as arrays:
the cost is linear in depth, and almost independent of the number of specs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np

from varprop.errors import AssumptionError
from varprop.spec import ModelSpec, MoESpec, layer_table
from varprop.spec.tensors import init_std
from varprop.theory.attention import (
    attention_gains,
    attention_logit_std,
    incoherent_average,
    is_exchangeable,
    value_key_coupling,
)
from varprop.theory.block import Frame, block
from varprop.theory.exchangeable_table import exchangeable_table
from varprop.theory.feed_forward import (
    feed_forward_covariance,
    feed_forward_gains,
    feed_forward_second_moment,
)
from varprop.theory.moe import MoEGains, expert_choice_moments, moe_covariance, moe_gains, moe_second_moment
from varprop.theory.norm import centred_second_moment, cosine_mean, normalised_second_moment
from varprop.theory.pair_table import PairTable, Rule

MARGIN = 1.05
MAX_ROUNDS = 40
LARGEST = 1e200
MAX_WIDE_STD = 3
"""Largest logit standard deviation where it changes over depth: a wider table takes longer than drawing heads."""


def structure(spec: ModelSpec) -> tuple[object, ...]:
    """What specs have to share to advance as one array."""
    feed_forward, moe = spec.feed_forward, spec.moe
    return (
        spec.n_layers,
        spec.d_model,
        replace(spec.norm, eps=0.0),
        spec.block,
        spec.attention is None,
        None if feed_forward is None else (feed_forward.activation, feed_forward.gated),
        None if moe is None else replace(moe, d_expert=1),
        spec.moe_pattern,
    )


def embedding_second_moment(spec: ModelSpec) -> float:
    """E x^2 of the embedding output: (init std * embedding_scale)^2."""
    return (init_std(spec, "embed", 1, spec.d_model) * spec.embedding_scale) ** 2


def largest_input(spec: ModelSpec) -> float:
    """Bound on the second moment that a branch reads: 1 after a norm; else the stream with normalised branches."""
    start = embedding_second_moment(spec)
    if spec.norm.placement == "reordered":  # each of 2 L branches adds at most branch_scale^2
        return start + 2 * spec.n_layers * spec.branch_scale**2
    return max(start, 1.0) if spec.norm.placement in ("post", "mix") else 1.0


def is_tabulated(spec: ModelSpec) -> bool:
    """Whether the tables resolve the spec's attention: exchangeable tokens, and logits that stay in their range."""
    if spec.attention is None:
        return True
    largest = attention_logit_std(spec, attention_gains(spec, 1), 1.0)
    high = largest_input(spec)
    return is_exchangeable(spec) and (high == 1 or largest * high <= MAX_WIDE_STD)


def exchangeable_profile(
    specs: Sequence[ModelSpec], n_tokens: int, token_correlation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Second moment and covariance, each (n_specs, n_layers, 5 sites), of specs of one `structure`.

    token_correlation: of the embeddings, (n_specs,). The sites are those of layers 1..n_layers. Quadrature; second
    moments exact where those of the branches are (`theory.error`). Raises `AssumptionError` where a stream overflows.
    For specs that are `is_tabulated`, or a single token.
    """
    first = specs[0]
    start = np.array([embedding_second_moment(spec) for spec in specs])
    state = np.stack([start, start * (token_correlation if n_tokens > 1 else 1.0)])
    frame = Frame(
        first,
        skip_scale=_one_or_array([spec.skip_scale for spec in specs]),
        branch_scale=_one_or_array([spec.branch_scale for spec in specs]),
    )
    rules = _Rules(specs, n_tokens, state[0])
    for _ in range(MAX_ROUNDS):
        sites = []
        current = state
        with np.errstate(over="ignore", invalid="ignore"):  # a stream that overflows is reported below
            for layer in range(1, first.n_layers + 1):
                sites.append(block(current, layer, frame, rules))
                current = sites[-1][-1]
                if not current[0].max() < LARGEST:
                    raise AssumptionError(f"second_moment passes {LARGEST:g} at layer {layer}; expected smaller scales")
        if rules.covers_what_it_met():
            break
    else:
        raise AssumptionError("second_moment grows without end over depth; expected smaller gains or scales")
    found = np.array(sites)  # (layers, sites, 2, specs)
    return tuple(np.moveaxis(found, (2, 3), (0, 1)))  # type: ignore[return-value]


def _one_or_array(values: list[float]) -> float | np.ndarray:
    """A number where all are equal: arithmetic with it is cheaper."""
    return values[0] if len(set(values)) == 1 else np.array(values)


def exchangeable_attention(
    spec: ModelSpec, n_tokens: int, token_correlation: float, second_moment: float = 1.0
) -> tuple[float, float]:
    """Second moment and covariance of the attention output for exchangeable tokens, full attention without positions.

    token_correlation: c of the entries of two tokens, in [0, 1]; second_moment: of the tokens, 1 after a norm. Formula
    and exactness: `_attention_rule`. Raises `AssumptionError` for other kinds of attention.
    Checked by: tests/theory/test_attention.py.

    >>> from varprop import presets
    >>> spec = presets.tiny().with_fields(pattern="full", rope_theta=None, logit_scale=1e-6)
    >>> [round(x, 6) for x in exchangeable_attention(spec, 16, 0.0)]  # uniform attention: 1 / T for both
    [0.0625, 0.0625]
    """
    if not is_exchangeable(spec) or spec.attention is None:
        pattern = None if spec.attention is None else spec.attention.pattern
        raise AssumptionError(
            f"attention.pattern={pattern!r} is not exchangeable here; expected full attention without positions, "
            "QK-norm, soft cap, sink logit or key mask"
        )
    size = np.array([second_moment])
    rule = _attention_rule([spec], n_tokens, size, size)
    diagonal, covariance = rule(size[:, None, None], np.array([float(token_correlation)]), slice(0, 1))
    return float(diagonal[0, 0, 0]), float(covariance[0, 0, 0])


class _Rules:
    """`block.Rules` for pairs (2, n_specs); tables over the range of second moments that the branches meet."""

    def __init__(self, specs: Sequence[ModelSpec], n_tokens: int, start: np.ndarray) -> None:
        self._specs, self._n_tokens = specs, n_tokens
        first = specs[0]
        self._eps = np.array([spec.norm.eps for spec in specs])
        self._d_model = first.d_model if first.norm.kind == "layer" else None
        reads_norm = first.norm.placement in ("pre", "peri", "lns")
        low = normalised_second_moment(start, self._eps) if reads_norm else np.minimum(start, 1.0)
        if first.norm.placement == "lns":
            low = low / first.n_layers
        high = np.array([largest_input(spec) for spec in specs])
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
                self._feed_forward[is_moe] = PairTable(_feed_forward_rule(specs, layer, self._n_tokens), low, high)

    def covers_what_it_met(self) -> bool:
        """Whether the tables covered every input; if not, they are built again over a wider range."""
        met = np.array(self._met)
        lowest, highest = met.min(axis=0), met.max(axis=0)
        self._met = []
        if (lowest >= self._low * (1 - 1e-12)).all() and (highest <= self._high * (1 + 1e-12)).all():
            return True
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
    """Second moment g (c + (1 - c) Y + coupling), covariance g (c + (1 - c) X + coupling of two queries).

    g = sigma_OV^2 m, Y and X softmax moments (softmax.py), the coupling O(T/d) (attention.py). The second moment is
    exact at any width for i.i.d. Gaussian tokens (c = 0) without eps, else up to O(1/d^2); the covariance up to
    relative O(1/d) of its incoherent part.
    """
    gains = [attention_gains(spec, 1) for spec in specs]
    value_output = np.array([g.value_output for g in gains])[:, None, None]
    unit_std = np.array([attention_logit_std(s, g, 1.0) for s, g in zip(specs, gains, strict=True)])
    head_dims = np.array([spec.head_dim for spec in specs])
    d_model, tables = specs[0].d_model, {}
    for head_dim in set(head_dims.tolist()):
        std = unit_std[head_dims == head_dim], low[head_dims == head_dim], high[head_dims == head_dim]
        tables[head_dim] = exchangeable_table(
            n_tokens, head_dim, d_model, float((std[0] * std[1]).min()), float((std[0] * std[2]).max())
        )

    def rule(second_moment: np.ndarray, correlation: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        c = cosine_mean(correlation, d_model)
        participation, pair, own, overlap = np.empty((4, *second_moment.shape[:2], len(correlation)))
        std = unit_std[chosen, None] * second_moment[..., 0]
        for head_dim, table in tables.items():
            rows = head_dims[chosen] == head_dim
            seen = std[rows, :, None] * np.sqrt(1 - c)
            participation[rows], pair[rows], own[rows] = table.moments(seen)
            overlap[rows] = table.overlap(std[rows], c)
        scale = value_output[chosen] * second_moment
        coupling, of_two = (value_key_coupling(c, k * pair, own, d_model) for k in (1.0, c))
        return scale * (incoherent_average(c, participation) + coupling), scale * (
            incoherent_average(c, overlap) + of_two
        )

    return rule


def _feed_forward_rule(specs: Sequence[ModelSpec], layer: int, n_tokens: int) -> Rule:
    tables, d_model = [layer_table(spec, layer) for spec in specs], specs[0].d_model
    if specs[0].is_moe(layer):
        return _mixture_rule(_stacked([moe_gains(rows) for rows in tables]), _part(specs[0]), d_model, n_tokens)
    part = specs[0].feed_forward
    assert part is not None
    names = {name: row for name, row in tables[0].items() if name.startswith("mlp.")}
    gains = _stacked([feed_forward_gains({n.removeprefix("mlp."): rows[n] for n in names}) for rows in tables])

    def rule(second_moment: np.ndarray, correlation: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        own = _chosen(gains, chosen)
        diagonal = feed_forward_second_moment(second_moment, own, part.activation, part.gated)
        covariance = feed_forward_covariance(
            second_moment, second_moment, correlation, own, part.activation, part.gated, d_model
        )
        return np.broadcast_to(diagonal, covariance.shape), covariance

    return rule


def _part(spec: ModelSpec) -> MoESpec:
    assert spec.moe is not None
    return spec.moe


def _mixture_rule(gains: MoEGains, part: MoESpec, d_model: int, n_tokens: int) -> Rule:
    def token_choice(m: np.ndarray, correlation: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        own = _chosen(gains, chosen)
        covariance = moe_covariance(m, m, correlation, own, part, d_model)
        return np.broadcast_to(moe_second_moment(m, own, part), covariance.shape), covariance

    def expert_choice(m: np.ndarray, correlation: np.ndarray, chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        return expert_choice_moments(m, correlation, _chosen(gains, chosen), part, n_tokens, d_model)

    return token_choice if part.routing == "token_choice" else expert_choice


def _stacked(each: Sequence[Any]) -> Any:
    """Gains of many specs as one: numbers become arrays (n_specs, 1, 1)."""
    first = each[0]
    values = {}
    for item in fields(first):
        found = [getattr(gains, item.name) for gains in each]
        if found[0] is None:
            values[item.name] = None
        else:
            values[item.name] = _stacked(found) if is_dataclass(found[0]) else np.array(found)[:, None, None]
    return type(first)(**values)


def _chosen(gains: Any, chosen: slice) -> Any:
    """Some of the specs of stacked gains."""
    values = {item.name: getattr(gains, item.name) for item in fields(gains)}
    return type(gains)(
        **{n: None if v is None else _chosen(v, chosen) if is_dataclass(v) else v[chosen] for n, v in values.items()}
    )
