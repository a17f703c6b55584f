"""How sparse attention is: effective number of keys, entropy, mass above thresholds, sinks.

A layer is run up to its attention, on what transformers gives the attention function of the configuration, or what
our own layers project; probabilities are then formed for some queries at a time and thrown away. No family has code of
its own, and no T x T matrix is held.

Shape suffixes: `B` sequences, `T` tokens, `N` query heads, `L` layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from varprop.diagnose.bootstrap import ratio, stderr
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.errors import ArgumentError, require
from varprop.measure import ATTENTION_THRESHOLDS, QUERY_STATISTICS, query_statistics
from varprop.nn.attention import allowed_keys, sequence_probabilities
from varprop.nn.block import KEY_MASK_STREAM, Block
from varprop.nn.init import make_generator
from varprop.nn.residual import branch_input

IMPLEMENTATION = "varprop_statistics"
"""Name under which the function that looks at attention is registered with transformers."""
NUMBER_BYTES = 32
"""Memory for each probability that is formed: logits, probabilities, and what statistics make of them."""
PLAIN = ("concentration", "entropy", "sink_mass", "first_4_mass", "total_mass", "effective_density")
"""Statistics that are a number for each query, those of thresholds apart."""
BY_THRESHOLD = ("mass_above", "key_share_above")
CONCENTRATION, TOTAL_MASS = QUERY_STATISTICS.index("concentration"), QUERY_STATISTICS.index("total_mass")


def attention(session: Session) -> Variables:
    """Sparsity of the attention of every layer and head, with standard errors over sequences.

    Means over the queries of all sequences of what `varprop.measure.query_statistics` defines for one:
    attention_concentration, attention_entropy (nats), attention_sink_mass (to position 0), attention_first_4_mass,
    attention_total_mass, attention_effective_density, attention_mass_above and attention_key_share_above (with a
    dimension attention_threshold), over heads too; head_* for each head, averaged over queries alone.
    attention_effective_keys and head_effective_keys: total_mass^2 / concentration of these means, which is
    1 / concentration where no sink logit takes a share. Causal queries see different numbers of keys, so
    attention_*_by_position has some of them apart for the octaves of query positions: query_position is the first of
    0, 1, 2-3, 4-7, ... Layer 0 is NaN.
    Exact to the rounding of logits and softmax in float32, or float64 for a model in it. Memory: as `replay.limits`
    say, whatever T. Raises `ArgumentError` for attention that transformers does not hand to the function of the
    configuration, and where that is neither sdpa nor eager.
    Source: effective keys arXiv 2603.15389; sinks arXiv 2309.17453. Checked by: tests/diagnose/test_attention.py,
    against the probabilities that eager implementations give.
    """
    replay = session.replay
    arrays = session.each_batch(
        "attention", lambda captured: replay.limits.retried(lambda: _of_batch(replay, captured))
    )
    head, queries = arrays["head"], arrays["position"]  # (S, L, N, statistics), (S, L, positions, statistics)
    names = [f"{name}_{t:g}" for name in BY_THRESHOLD for t in ATTENTION_THRESHOLDS]
    assert (*PLAIN, *names) == QUERY_STATISTICS
    starts = octave_starts(session.n_tokens)
    count = np.diff([*starts, session.n_tokens]).astype(float)[:, None]
    variables: Variables = {
        "attention_threshold": (("attention_threshold",), np.array(ATTENTION_THRESHOLDS)),
        "query_position": (("query_position",), np.array(starts)),
    }
    groups = (
        ("attention_{}", ("layer",), head.mean(axis=2)),
        ("head_{}", ("layer", "head"), head),
        ("attention_{}_by_position", ("layer", "query_position"), queries / count),
    )
    for pattern, dims, values in groups:
        errors = stderr(lambda mean: mean, values, seed=session.seed)
        for name, of_name in _split(values.mean(axis=0), errors).items():
            if name in BY_THRESHOLD and "query_position" in dims:
                continue
            own = (*dims, "attention_threshold") if name in BY_THRESHOLD else dims
            for suffix, table in zip(("", "_stderr"), of_name, strict=True):
                variables[pattern.format(name) + suffix] = (own, _from_1(table))
        keys = pattern.format("effective_keys")
        variables[keys] = (dims, _from_1(_effective_keys(values.mean(axis=0))))
        variables[f"{keys}_stderr"] = (dims, _from_1(stderr(_effective_keys, values, seed=session.seed)))
    return variables


def octave_starts(n_tokens: int) -> list[int]:
    """First positions of the octaves of query positions.

    >>> octave_starts(10)
    [0, 1, 2, 4, 8]
    """
    return [0] + [2**i for i in range((n_tokens - 1).bit_length())]


def _split(*tables: np.ndarray) -> dict[str, list[np.ndarray]]:
    """Tables (..., statistics) by name; statistics of thresholds keep an axis for these."""
    found = {name: [table[..., i] for table in tables] for i, name in enumerate(PLAIN)}
    n_thresholds = len(ATTENTION_THRESHOLDS)
    for i, name in enumerate(BY_THRESHOLD):
        first = len(PLAIN) + i * n_thresholds
        found[name] = [table[..., first : first + n_thresholds] for table in tables]
    return found


def _effective_keys(means: np.ndarray) -> np.ndarray:
    return ratio(means[..., TOTAL_MASS] ** 2, means[..., CONCENTRATION])


def _from_1(table: np.ndarray) -> np.ndarray:
    """A table over layers 1..L as one over 0..L, NaN at layer 0."""
    return np.concatenate([np.full_like(table[:1], np.nan), table])


@torch.no_grad()
def _of_batch(replay: Replay, captured: Captured) -> dict[str, Tensor]:
    """Per sequence: means over queries (B, L, N, statistics), sums over those of an octave (B, L, positions, ...)."""
    layers = [_of_layer(replay, index, captured) for index in range(replay.n_layers)]
    heads = {layer.shape[1] for layer in layers}
    require(len(heads) == 1, ArgumentError, "n_heads", sorted(heads), "different in layers", "as many heads in each")
    sums = torch.stack(layers, dim=1)  # (B, L, N, positions, statistics)
    return {"head": sums.sum(dim=3) / captured.n_tokens, "position": sums.mean(dim=2)}


def _of_layer(replay: Replay, index: int, captured: Captured) -> Tensor:
    """Sums over the queries of each octave, (B, N, positions, statistics)."""
    layer = replay.layers[index]
    if isinstance(layer, Block):
        return _of_block(layer, replay, index, captured)
    look, stream = _Look(replay), captured.streams[index][None]
    with _looking(layer, look), contextlib.suppress(_Seen):
        replay.layer(index, stream, captured)
    missing = "without attention by the function of its configuration (transformers' AttentionInterface)"
    require(
        look.sums is not None, ArgumentError, "architecture", replay.architecture, missing, "attention that uses it"
    )
    assert look.sums is not None
    return look.sums


class _Octaves:
    """Adds statistics of queries to those of their octave."""

    def __init__(self, n_tokens: int, device: torch.device) -> None:
        starts = torch.tensor(octave_starts(n_tokens), device=device)
        self._octave = torch.searchsorted(starts, torch.arange(n_tokens, device=device), right=True) - 1
        self._one_hot = nn.functional.one_hot(self._octave, len(starts)).double()

    def __call__(self, queries: slice, statistics: Tensor) -> Tensor:
        """Statistics of some queries (*lead, queries, statistics) summed in each octave, (*lead, positions, ...)."""
        return self._one_hot[queries].mT @ statistics


def _chunks(replay: Replay, n_tokens: int, numbers_per_query: int) -> Iterator[slice]:
    """Queries whose probabilities are formed at a time: a quarter of the memory."""
    size = max(1, int(replay.limits.memory / 4 / NUMBER_BYTES) // numbers_per_query)
    for start in range(0, n_tokens, size):
        yield slice(start, min(n_tokens, start + size))


def _of_block(block: Block, replay: Replay, index: int, captured: Captured) -> Tensor:
    """As `_of_layer`, of one of our own layers, sequence by sequence."""
    spec, weights = block.spec, block.weights()
    if spec.attention is None:
        raise ArgumentError("attention=None is missing in this model; expected attention, or other scores")
    stream, n_tokens = captured.streams[index], captured.n_tokens
    y = branch_input(stream, weights, spec, block.layer, "attention")
    allowed = allowed_keys(spec, block.layer, n_tokens, stream.device)
    visible = torch.full((n_tokens,), n_tokens, device=stream.device) if allowed is None else allowed.sum(dim=-1)
    generator = make_generator(block.seed, block.layer, KEY_MASK_STREAM)
    octaves = _Octaves(n_tokens, stream.device)
    found = []
    for probabilities in sequence_probabilities(y, weights, spec, block.layer, None, generator):
        sums = torch.zeros(())
        for queries in _chunks(replay, n_tokens, spec.n_heads * n_tokens):
            sums = sums + octaves(queries, query_statistics(probabilities(queries), visible[queries]))
        found.append(sums)
    return torch.stack(found)


class _Seen(Exception):  # noqa: N818
    """Ends the pass through a layer after its attention was looked at."""


class _Look:
    """The attention function that a layer is given: sums statistics and ends the layer's pass."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self.causal = False
        """Whether a layer without a mask that says it is causal is so: with sdpa, not with eager."""
        self.sums: Tensor | None = None

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> None:
        n_tokens = query.shape[2]
        good = attention_mask is None or (torch.is_tensor(attention_mask) and attention_mask.ndim == 4)
        kind = type(attention_mask).__name__
        require(good, ArgumentError, "attention_mask", kind, "not (B, heads, T, T)", "attention by sdpa or eager")
        wide = torch.promote_types(query.dtype, torch.float32)
        query = query.to(wide) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        key = key.to(wide).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = self.causal and bool(is_causal) and attention_mask is None
        octaves = _Octaves(n_tokens, query.device)
        sums = query.new_zeros((), dtype=torch.float64)
        for queries in _chunks(self._replay, n_tokens, query.shape[0] * query.shape[1] * n_tokens):
            seen = queries.stop if causal else n_tokens  # later keys are invisible to all of these queries
            logits = query[:, :, queries] @ key[:, :, :seen].mT
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            if position_bias is not None:
                logits = logits + position_bias[..., queries, :seen]
            logits, visible = _masked(logits, attention_mask, queries, causal)
            if s_aux is not None:
                extra = s_aux.to(wide).reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
                logits = torch.cat([logits, extra], dim=-1)
            probabilities = logits.softmax(dim=-1)[..., :seen]
            sums = sums + octaves(queries, query_statistics(probabilities, visible))
        self.sums = sums
        raise _Seen


def _masked(logits: Tensor, mask: Tensor | None, queries: slice, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits of some queries with -inf at keys that these may not see, and how many keys they see.

    mask: (B or 1, heads or 1, T, T), boolean, or numbers that are added. Its most negative numbers hide a key.
    """
    n_keys = logits.shape[-1]
    if mask is not None:
        mask = mask[..., queries, :n_keys]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        logits = logits if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    elif causal:
        position = torch.arange(n_keys, device=logits.device)
        allowed = position <= position[queries, None]
    else:
        return logits, torch.tensor(n_keys, device=logits.device)
    return logits.masked_fill(~allowed, -torch.inf), allowed.sum(dim=-1)


@contextlib.contextmanager
def _looking(layer: nn.Module, look: _Look) -> Iterator[None]:
    """While inside, `look` is the attention function of the layer's configurations."""
    from transformers import AttentionInterface  # here, so that our own models need no transformers

    AttentionInterface.register(IMPLEMENTATION, look)
    found: list[Any] = [getattr(module, "config", None) for module in layer.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for name in before.values():
        require(name in ("sdpa", "eager", None), ArgumentError, "attn_implementation", name, "unknown", "sdpa or eager")
    look.causal = "sdpa" in before.values()
    try:
        for config in configs.values():
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
