"""Attention of a network's sequences, read without ever holding the probabilities of all heads.

Shape suffixes: `S` sequences, `T` tokens, `N` query heads, `G` key/value heads, `H` head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varprop.measure import AttentionStatistics, attention_statistics
from varprop.nn.attention import (
    Shared,
    _queries_keys_values,
    allowed_keys,
    attention_probabilities,
    draw_kept_keys,
)
from varprop.nn.linear import Weights
from varprop.spec import ModelSpec


def sequence_attention(
    y: Tensor,
    weights: Weights,
    spec: ModelSpec,
    layer: int,
    masks: Mapping[int, Tensor] | None,
    generator: torch.Generator,
) -> list[AttentionStatistics]:
    """The attention of a layer in each of the sequences, from what its branch reads, y (S, T, D).

    masks: as of `nn.attention.Shared`, boolean (S, 1, T, T). generator: draws the key mask, where the spec has one, as
    the forward pass does from one in the same state.
    """
    q, k, _ = _queries_keys_values(y, weights, spec, Shared())
    k = k.repeat_interleave(spec.kv_group_size, dim=-3)
    density = spec._attention().key_mask_density
    kept = [None] * len(y) if density == 1 else draw_kept_keys(q, density, generator)
    seen = (
        [allowed_keys(spec, layer, y.shape[-2], y.device)] * len(y) if masks is None else masks[spec.window(layer) or 0]
    )
    sink = weights.get("attention.sink")
    return [_of_sequence(*parts, sink, spec) for parts in zip(q, k, seen, kept, strict=True)]


def _of_sequence(
    q: Tensor, k: Tensor, allowed: Tensor | None, kept: Tensor | None, sink: Tensor | None, spec: ModelSpec
) -> AttentionStatistics:
    """Statistics of one sequence from its queries and keys, (N, T, H)."""
    part, n_tokens = spec._attention(), q.shape[-2]
    scale = part.logit_scale or spec.head_dim**-0.5
    after_softmax = kept is not None and part.key_mask_place == "after_softmax"
    if kept is not None and not after_softmax:
        allowed = kept if allowed is None else kept & allowed

    def probabilities(queries: slice) -> Tensor:
        rows = None if allowed is None else allowed[..., queries, :]
        found = attention_probabilities(q[:, queries], k, rows, scale, part.logit_softcap, sink)
        return found * kept[:, queries] if kept is not None and after_softmax else found

    return attention_statistics(probabilities, n_tokens, spec.n_heads * n_tokens)
