"""Multi-head softmax attention with grouped keys and values.

Shape suffixes: `T` tokens, `D` d_model, `N` query heads, `G` key/value heads, `H` head_dim. Query head h reads the
key/value head h // kv_group_size. The spec's plain cases run on torch's fused attention, the others (soft-cap, sink
logit, a key mask after the softmax) on the explicit softmax; who observes the probabilities forces the latter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from varprop.errors import ArgumentError
from varprop.nn import kernels
from varprop.nn.linear import Weights, linear, packed_linear
from varprop.nn.norm import rms_norm
from varprop.spec import ModelSpec

Uniform = Callable[[tuple[int, ...]], Tensor]
"""Numbers of [0, 1) in the shape asked for."""


class Shared(NamedTuple):
    """What all layers of a forward pass have in common, computed once and outside of compiled blocks.

    rotation: cosine and sine of the rotary angles, (T, half). masks: by window (0 = none), what a query may see:
    a boolean (T, T) or (B, 1, T, T), or a `BlockMask` of FlexAttention. What is None is made in each layer.
    """

    rotation: tuple[Tensor, Tensor] | None = None
    masks: Mapping[int, Tensor | BlockMask] | None = None


def attention(
    x: Tensor,
    weights: Weights,
    spec: ModelSpec,
    layer: int,
    generator: torch.Generator | Uniform | None = None,
    observe: Callable[[str, Tensor], None] | None = None,
    shared: Shared | None = None,
) -> Tensor:
    """Output of the attention of a layer, (*lead, T, D). The generator draws the key mask, where the spec has one.

    observe: called with `attention` and the probabilities (*lead, N, T, T) that multiply the values.
    """
    part, shared = spec._attention(), shared or Shared()
    q, k, v = _queries_keys_values(x, weights, spec, shared)  # (*lead, N, T, H), (*lead, G, T, H)
    scale = part.logit_scale or spec.head_dim**-0.5
    mask = None if shared.masks is None else shared.masks[spec.window(layer) or 0]
    if isinstance(mask, BlockMask):
        mixed = _flex(q, k, v, mask, scale, part.logit_softcap)
        return linear(mixed.transpose(-3, -2).flatten(-2), weights, "attention.o")
    allowed = allowed_keys(spec, layer, x.shape[-2], x.device) if mask is None else mask
    kept = draw_kept_keys(q, part.key_mask_density, generator) if part.key_mask_density < 1 else None
    after_softmax = part.key_mask_place == "after_softmax"
    if kept is not None and not after_softmax:
        allowed = kept if allowed is None else kept & allowed
    if observe is not None or part.logit_softcap or part.sink_logit or (kept is not None and after_softmax):
        sink = weights["attention.sink"] if part.sink_logit else None
        k, v = (y.repeat_interleave(spec.kv_group_size, dim=-3) for y in (k, v))
        probabilities = attention_probabilities(q, k, allowed, scale, part.logit_softcap, sink).to(v.dtype)
        if kept is not None and after_softmax:
            probabilities = probabilities * kept
        if observe is not None:
            observe("attention", probabilities)
        mixed = probabilities @ v
    else:
        causal = kept is None and mask is None and part.pattern != "full" and spec.window(layer) is None
        mixed = functional.scaled_dot_product_attention(
            q, k, v, None if causal else allowed, is_causal=causal, scale=scale, enable_gqa=spec.kv_group_size > 1
        )
    return linear(mixed.transpose(-3, -2).flatten(-2), weights, "attention.o")


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, softcap: float | None) -> Tensor:
    """Attention under a block mask by FlexAttention, which skips the blocks that nobody sees."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    modify = None if softcap is None else capped
    gqa = q.shape[-3] != k.shape[-3]
    return flex_attention(q, k, v, score_mod=modify, block_mask=mask, scale=scale, enable_gqa=gqa)  # type: ignore[return-value]


def _queries_keys_values(x: Tensor, weights: Weights, spec: ModelSpec, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (*lead, N, T, H), keys and values (*lead, G, T, H): projected, normalised, rotated."""
    part = spec._attention()
    turns = shared.rotation
    if part.rope_theta is not None and turns is None:
        turns = rotation(spec, x.shape[-2], x.device, torch.promote_types(x.dtype, torch.float32))
    power_of_two = spec.head_dim & (spec.head_dim - 1) == 0
    whole = part.rope_fraction == 1 and part.qk_norm == "none" and power_of_two
    if turns is not None and whole and kernels.serves(x, weights["attention.q"]):
        packed = packed_linear(x, weights, ("attention.q", "attention.k"))
        q, k = kernels.split_and_rotate(packed, *turns, spec.n_heads)
        return q.transpose(-3, -2), k.transpose(-3, -2), _heads(linear(x, weights, "attention.v"), weights, spec, "v")
    q, k, v = (_heads(linear(x, weights, f"attention.{name}"), weights, spec, name) for name in "qkv")
    return (q, k, v) if turns is None else (rotate(q, *turns), rotate(k, *turns), v)


def _heads(y: Tensor, weights: Weights, spec: ModelSpec, name: str) -> Tensor:
    """A projection split into heads, (*lead, heads, T, H), queries and keys normalised."""
    normalised = spec._attention().qk_norm if name != "v" else "none"
    if normalised == "projection":
        y = rms_norm(y, weights[f"attention.{name}_norm.gain"].unsqueeze(-2), spec.norm.eps)
    y = y.unflatten(-1, (-1, spec.head_dim))
    if normalised == "head":
        y = rms_norm(y, weights[f"attention.{name}_norm.gain"].unsqueeze(-2).unsqueeze(-2), spec.norm.eps)
    return y.transpose(-3, -2)


def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first dimensions of y (*lead, T, H), pairs being half of them apart.

    cos, sin: (T, half); dimension i and i + half turn by angle i.
    """
    half = cos.shape[-1]
    first, second, rest = y.split((half, half, y.shape[-1] - 2 * half), dim=-1)
    turned = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    return torch.cat((*(part.to(y.dtype) for part in turned), rest), dim=-1)


def rotation(
    spec: ModelSpec, n_tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, (T, half): theta^(-i / half) times the position; every layer's."""
    part = spec._attention()
    assert part.rope_theta is not None
    return _turns(n_tokens, part.rope_theta, round(part.rope_fraction * spec.head_dim) // 2, dtype, device)


@functools.lru_cache(maxsize=8)
def _turns(n_tokens: int, theta: float, half: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        frequencies = theta ** (-torch.arange(half, device=device, dtype=torch.float64) / half)
        angles = torch.arange(n_tokens, device=device, dtype=torch.float64)[:, None] * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


def allowed_keys(spec: ModelSpec, layer: int, n_tokens: int, device: torch.device) -> Tensor | None:
    """(T, T) boolean, query by key: what a query may see; None where it sees everything."""
    part = spec._attention()
    if part.pattern == "full":
        return None
    position = torch.arange(n_tokens, device=device)
    distance = position[:, None] - position
    allowed = distance >= 0
    window = spec.window(layer)
    if window is not None:
        allowed &= (distance < window) | (position < part.n_sink_tokens)
    return allowed


def draw_kept_keys(q: Tensor, density: float, generator: torch.Generator | Uniform | None) -> Tensor:
    """(*lead, N, T, T) boolean: each key kept with probability `density` for each query and head, its own always.

    Raises `ArgumentError` without a generator.
    """
    if generator is None:
        raise ArgumentError("generator=None is missing; expected a torch.Generator, which draws the key mask")
    n_tokens = q.shape[-2]
    shape = (*q.shape[:-1], n_tokens)
    if isinstance(generator, torch.Generator):
        uniform = torch.rand(shape, generator=generator, device=generator.device)
    else:
        uniform = generator(shape)
    return (uniform.to(q.device) < density) | torch.eye(n_tokens, dtype=torch.bool, device=q.device)


def attention_probabilities(
    q: Tensor, k: Tensor, allowed: Tensor | None, scale: float, softcap: float | None = None, sink: Tensor | None = None
) -> Tensor:
    """Softmax over the keys of cap(scale q k^T), (*lead, N, T, T), in float32 or better.

    allowed: boolean, broadcast to the logits. softcap: cap(z) = softcap tanh(z / softcap). sink: (N) or (*lead, N), one
    more logit in the denominator, which leaves the rows below a sum of one.
    """
    logits = (q * scale) @ k.mT
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    if sink is None:
        return logits.softmax(dim=-1)
    extra = sink[..., None, None].to(logits.dtype).expand(*logits.shape[:-1], 1)
    return torch.cat((logits, extra), dim=-1).softmax(dim=-1)[..., :-1]


def sequence_probabilities(
    y: Tensor,
    weights: Weights,
    spec: ModelSpec,
    layer: int,
    masks: Mapping[int, Tensor] | None,
    generator: torch.Generator | Uniform | None,
) -> Iterator[Callable[[slice], Tensor]]:
    """For each sequence a function that gives the probabilities of some of its queries, (N, queries, T).

    They are what multiplies the values in `attention`, without ever holding those of all queries. y: what the branch
    reads, (S, T, D). masks: as of `Shared`, boolean (S, 1, T, T). generator: draws the key mask, where the spec has
    one, as `attention` does from one in the same state.
    """
    part = spec._attention()
    q, k, _ = _queries_keys_values(y, weights, spec, Shared())
    k = k.repeat_interleave(spec.kv_group_size, dim=-3)
    kept = [None] * len(y) if part.key_mask_density == 1 else draw_kept_keys(q, part.key_mask_density, generator)
    seen = (
        [allowed_keys(spec, layer, y.shape[-2], y.device)] * len(y) if masks is None else masks[spec.window(layer) or 0]
    )
    for parts in zip(q, k, seen, kept, strict=True):
        yield functools.partial(_of_queries, *parts, weights.get("attention.sink"), spec)


def _of_queries(
    q: Tensor,
    k: Tensor,
    allowed: Tensor | None,
    kept: Tensor | None,
    sink: Tensor | None,
    spec: ModelSpec,
    queries: slice,
) -> Tensor:
    """Probabilities of some queries of one sequence from all its queries and keys, (N, T, H)."""
    part = spec._attention()
    after_softmax = kept is not None and part.key_mask_place == "after_softmax"
    if kept is not None and not after_softmax:
        allowed = kept if allowed is None else kept & allowed
    rows = None if allowed is None else allowed[..., queries, :]
    scale = part.logit_scale or spec.head_dim**-0.5
    found = attention_probabilities(q[:, queries], k, rows, scale, part.logit_softcap, sink)
    return found * kept[:, queries] if kept is not None and after_softmax else found
