"""One block at the level of moments: where the norms stand and how branches are added, for any kind of state.

A state is an array that adds and scales like a covariance: the Gram matrices of the tokens, (..., T, T), or the pair
(second moment, covariance of two exchangeable tokens), (2, n_specs). `Rules` knows how to normalise it and what the
branches make of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from varprop.spec import ModelSpec
from varprop.theory.residual import residual_second_moment


class Rules(Protocol):
    """What a block needs to know of a state."""

    def normalised(self, state: np.ndarray) -> np.ndarray: ...

    def attention(self, state: np.ndarray, layer: int) -> np.ndarray: ...

    def feed_forward(self, state: np.ndarray, layer: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Frame:
    """What stands around the branches of a spec; the scales may be arrays over specs that share the rest."""

    spec: ModelSpec
    skip_scale: Any
    branch_scale: Any

    @property
    def has_attention(self) -> bool:
        return self.spec.attention is not None

    @property
    def has_feed_forward(self) -> bool:
        return self.spec.feed_forward is not None or self.spec.moe is not None


def block(state: np.ndarray, layer: int, frame: Frame, rules: Rules) -> tuple[np.ndarray, ...]:
    """The states at the five sites of `results.SITES` of one layer (1, 2, ...), in their order.

    Every placement of `NormSpec`: pre x + f(N x); lns x + f(N(x) / sqrt(layer)) (arXiv 2502.05795); peri
    x + N(f(N x)) (arXiv 2502.02732); reordered x + N(f x); post N(x + f x); mix resolved per layer.
    """
    placement = frame.spec.norm_placement(layer)

    def added(x: np.ndarray, branch: Any) -> np.ndarray:
        if placement in ("pre", "peri", "lns"):
            x = rules.normalised(x)
        if placement == "lns":
            x = x / layer
        y = branch(x, layer)
        if placement in ("peri", "reordered"):
            y = rules.normalised(y)
        return frame.branch_scale**2 * y

    def summed(x: np.ndarray, y: np.ndarray, skip_scale: Any) -> np.ndarray:
        total = residual_second_moment(x, y, skip_scale=skip_scale)
        return rules.normalised(total) if placement == "post" else total

    zero = np.zeros_like(state)
    attention, feed_forward, middle = zero, zero, state
    if frame.has_attention:
        attention = added(state, rules.attention)
        middle = summed(state, attention, frame.skip_scale)
    after = middle
    if frame.has_feed_forward:
        one_sum = frame.spec.block == "parallel" and frame.has_attention
        feed_forward = added(state if one_sum else middle, rules.feed_forward)
        after = summed(middle, feed_forward, 1.0 if one_sum else frame.skip_scale)
    return state, attention, middle, feed_forward, after
