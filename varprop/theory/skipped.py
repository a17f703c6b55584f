"""The causal matrix of a network at initialisation: what skipping a layer does to the contributions of later layers.

The network and the one with a layer skipped read the same tokens with the same weights. To the recursion over Gram
matrices they are two documents of T tokens each, which see no keys of each other: at layer s the first document has the
stream after it and the second the stream before it, x' = x_(s-1), whose inner products with x_s are those with x_(s-1),
since what the layer adds has mean zero given the stream. From there on both go through the same layers. The
contribution delta of a layer has the Gram matrix of the change of the stream, so that for token t

    E|delta'_t - delta_t|^2 = D_tt + D'_tt - 2 C_tt,   C the Gram matrix between the two documents.

Shape suffixes: `S` skipped layers, `T` tokens.
"""

from __future__ import annotations

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.block import Frame, block
from varprop.theory.exchangeable import embedding_second_moment
from varprop.theory.gram import GramRecursion

MAX_TOKENS = 256
"""Positions, of which the recursion holds (2 T)^2 numbers for every skipped layer."""


def skipped_layer_effect(
    spec: ModelSpec, *, n_tokens: int, token_correlation: float = 0.0, seed: int = 0
) -> np.ndarray:
    """mean_t |delta'_l - delta_l| / mean_t |delta_l| with layer s skipped, (n_layers, n_layers), s by l; 0 for l <= s.

    The causal effect of arXiv 2603.15389 with norms sqrt(E |.|^2) in place of the norms: an error O(1 / d_model).
    token_correlation: of the embeddings of two positions. seed: of the attention heads that are drawn from their exact
    law given the Gram matrix (the deterministic closure takes the logits of the two networks for independent where they
    are nearly the same, and is up to 10 % off).
    Raises `AssumptionError` for norms after the sum (`post`, `mix`), for which contributions and stream are not
    orthogonal, and for more than `MAX_TOKENS` tokens.
    Source: derived above. Checked by: tests/theory/test_skipped.py, random networks.

    >>> from varprop.spec import FeedForwardSpec
    >>> spec = ModelSpec(d_model=64, n_layers=3, feed_forward=FeedForwardSpec(d_ff=256, activation="relu", gated=False))
    >>> skipped_layer_effect(spec, n_tokens=1).round(3)
    array([[0.   , 0.567, 0.563],
           [0.   , 0.   , 0.49 ],
           [0.   , 0.   , 0.   ]])
    """
    placements = {spec.norm_placement(layer) for layer in range(1, spec.n_layers + 1)}
    wrong, expected = "a norm after the residual sum", "norms inside the branches"
    require("post" not in placements, AssumptionError, "norm.placement", spec.norm.placement, wrong, expected)
    good = isinstance(n_tokens, int) and 1 <= n_tokens <= MAX_TOKENS
    require(good, AssumptionError, "n_tokens", n_tokens, "outside the domain", f"an integer in 1..{MAX_TOKENS}")
    heads = None if spec.attention is None else seed
    start = embedding_second_moment(spec) * ((1 - token_correlation) * np.eye(n_tokens) + token_correlation)
    streams = [start]
    for sites in GramRecursion(spec, start, heads):
        streams.append(sites[-1].mean(axis=0))
    documents = np.repeat([0, 1], n_tokens)
    frame = Frame(spec, spec.skip_scale, spec.branch_scale)
    effect = np.zeros((spec.n_layers, spec.n_layers))
    states: list[np.ndarray] = []
    for layer in range(2, spec.n_layers + 1):
        before, after = streams[layer - 2], streams[layer - 1]  # of the layer that is skipped now
        carried = _carried(spec) * before
        states.append(np.block([[after, carried], [carried, before]]))
        for skipped, state in enumerate(states):
            rules = _AveragedHeads(spec, state, heads, documents)
            _, attn, _, mlp, following = (site[0] for site in block(state[None], layer, frame, rules))
            added = (_carried(spec) - 1) ** 2 * state + _passed(spec) * attn + mlp
            own, other, cross = (added[quarter].diagonal() for quarter in _quarters(n_tokens))
            gap = np.sqrt(np.clip(own + other - 2 * cross, 0, None))
            effect[skipped, layer - 1] = gap.mean() / np.sqrt(own).mean()
            states[skipped] = following
    return effect


class _AveragedHeads(GramRecursion):
    """Attention averaged over all heads that a recursion would draw in copies of the state."""

    def attention(self, state: np.ndarray, layer: int) -> np.ndarray:
        copies = np.broadcast_to(state, (self.n_recursions, *state.shape[1:]))
        return super().attention(copies, layer).mean(axis=0, keepdims=True)


def _carried(spec: ModelSpec) -> float:
    """x_before . x_after / |x_before|^2: the skip multipliers of a layer."""
    sums = (spec.attention is not None) + (spec.feed_forward is not None or spec.moe is not None)
    return spec.skip_scale ** (1 if spec.block == "parallel" else max(1, sums))


def _passed(spec: ModelSpec) -> float:
    """What the second moment of attention's output is multiplied with by the end of the layer."""
    return _carried(spec) ** 2 / spec.skip_scale**2 if spec.attention is not None else 1.0


def _quarters(n_tokens: int) -> tuple[tuple[slice, slice], ...]:
    """First document, second, and first against second."""
    first, second = slice(0, n_tokens), slice(n_tokens, 2 * n_tokens)
    return (first, first), (second, second), (first, second)
