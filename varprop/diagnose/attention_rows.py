"""The attention probabilities of any layer, formed for the queries that are asked for.

A layer is run up to its attention and no further. What attention works on is what reaches torch's fused attention; of
eager implementations, what transformers hands to the attention function of the configuration, or, in families that do
not ask it, what reaches a softmax; in our own layers, what they project. No family has code of its own.

Shape suffixes: `B` sequences, `T` tokens, `N` query heads, `G` key/value heads, `H` head_dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from varprop.diagnose.replay import Captured, Replay
from varprop.errors import ArgumentError, UnsuitedError, require
from varprop.nn.attention import allowed_keys, sequence_probabilities
from varprop.nn.block import KEY_MASK_STREAM, Block
from varprop.nn.init import make_generator
from varprop.nn.residual import branch_input

IMPLEMENTATION = "varprop_rows"
"""Name under which the function that looks at attention is registered with transformers."""
_SOFTMAX = {functional.softmax, torch.softmax, torch.Tensor.softmax}


class Rows(NamedTuple):
    """Attention of some sequences.

    of: for a slice of the queries the probabilities (B, N, queries, keys), which multiply the values, in float32 or
    float64, and how many keys each of them may see, broadcast to (B, N, queries). Keys after the last one that is seen
    may be missing.
    """

    n_sequences: int
    n_heads: int
    of: Callable[[slice], tuple[Tensor, Tensor]]


def attention_rows(replay: Replay, index: int, captured: Captured) -> Iterator[Rows]:
    """The attention of layer `index` (0..L-1) in the sequences that were captured, in their order.

    Memory: queries and keys, until the next ones are asked for; families that make their own softmax hold its T x T
    logits, as they do in every pass. Raises `UnsuitedError` where no attention is found or another
    implementation than sdpa and eager, `ArgumentError` where a mask has another form
    than those of sdpa and eager.
    """
    layer, stream = replay.layers[index], captured.streams[index]
    if isinstance(layer, Block):
        yield from _of_block(layer, stream)
        return
    found: list[Rows] = []
    configs = {id(part.config): part.config for part in layer.modules() if hasattr(part, "config")}
    names = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    for name in names.values():
        require(name in ("sdpa", "eager", None), UnsuitedError, "attn_implementation", name, "unknown", "sdpa or eager")
    eager = [configs[key] for key, name in names.items() if name == "eager"]
    for watching in (_as_implementation(eager, found), _Watch(found)):
        with watching, contextlib.suppress(_Seen):
            replay.layer(index, stream[None], captured)
        if found:
            yield found[0]
            return
    wrong, expected = f"without softmax attention in layer {index + 1}", "attention in each, or other scores"
    raise UnsuitedError(f"architecture={replay.architecture!r} is {wrong}; expected {expected}")


def _of_block(block: Block, stream: Tensor) -> Iterator[Rows]:
    """Sequence by sequence of a layer of ours. A key that only its random mask hides counts as one that may be seen."""
    spec, weights, n_tokens = block.spec, block.weights(), stream.shape[1]
    if spec.attention is None:
        raise UnsuitedError("attention=None is missing in this model; expected attention, or other scores")
    y = branch_input(stream, weights, spec, block.layer, "attention")
    allowed = allowed_keys(spec, block.layer, n_tokens, stream.device)
    visible = torch.full((n_tokens,), n_tokens, device=stream.device) if allowed is None else allowed.sum(dim=-1)
    generator = make_generator(block.seed, block.layer, KEY_MASK_STREAM)

    def rows(probabilities: Callable[[slice], Tensor], queries: slice) -> tuple[Tensor, Tensor]:
        return probabilities(queries)[None], visible[queries]

    for probabilities in sequence_probabilities(y, weights, spec, block.layer, None, generator):
        yield Rows(1, spec.n_heads, functools.partial(rows, probabilities))


class _Seen(Exception):  # noqa: N818
    """Ends the pass through a layer at its attention."""


@contextlib.contextmanager
def _as_implementation(eager: Sequence[Any], found: list[Rows]) -> Iterator[None]:
    """While inside, attention by these configurations of eager attention appends its rows to `found`."""
    if not eager:  # so that our own models need no transformers
        yield
        return
    from transformers import AttentionInterface

    def look(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> None:
        _see(found, query, key, attention_mask, False, scaling, softcap, s_aux, position_bias)

    AttentionInterface.register(IMPLEMENTATION, look)
    for config in eager:
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        for config in eager:
            config._attn_implementation = "eager"


class _Watch(TorchFunctionMode):
    """Inside it torch's fused attention and every softmax of shape (B, N, T, T) append their rows to `found`."""

    def __init__(self, found: list[Rows]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        if func in _SOFTMAX:
            logits = args[0] if args else kwargs["input"]
            if logits.ndim == 4 and logits.shape[-1] == logits.shape[-2]:
                self._found.append(Rows(logits.shape[0], logits.shape[1], functools.partial(_of_logits, logits)))
                raise _Seen
        return func(*args, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        _see(self._found, query, key, attn_mask, is_causal, scale)


def _see(
    found: list[Rows],
    query: Tensor,
    key: Tensor,
    mask: Any,
    causal: bool,
    scale: float | None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Append the attention of queries (B, N, T, H) to keys (B, G, T, H), and end the layer's pass.

    mask: (B or 1, N or 1, T, T), boolean, or numbers that are added, the most negative of which hide a key; None = with
    `causal` later keys are hidden. softcap: c in c tanh(logit / c). sink: (N), one more logit of each head's softmax.
    bias: added to the logits.
    """
    good = mask is None or (torch.is_tensor(mask) and mask.ndim == 4)
    wrong = "no mask (B, heads, T, T)"
    require(good, ArgumentError, "attention_mask", type(mask).__name__, wrong, "attention by sdpa or eager")
    wide = torch.promote_types(query.dtype, torch.float32)
    q = query.to(wide) * (query.shape[-1] ** -0.5 if scale is None else scale)
    k = key.to(wide).repeat_interleave(query.shape[1] // key.shape[1], dim=1)

    def rows(queries: slice) -> tuple[Tensor, Tensor]:
        n_keys = queries.stop if causal and mask is None else k.shape[2]
        logits = q[:, :, queries] @ k[:, :, :n_keys].mT
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[..., queries, :n_keys]
        logits, visible = _masked(logits, mask, queries, causal)
        if sink is None:
            return logits.softmax(dim=-1), visible
        extra = sink.to(wide).reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, extra], dim=-1).softmax(dim=-1)[..., :n_keys], visible

    found.append(Rows(q.shape[0], q.shape[1], rows))
    raise _Seen


def _masked(logits: Tensor, mask: Tensor | None, queries: slice, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits of some queries with -inf at keys that these may not see, and how many keys they see."""
    n_keys = logits.shape[-1]
    if mask is not None:
        mask = mask[..., queries, :n_keys]
        allowed = mask if mask.dtype == torch.bool else _shown(mask)
        logits = logits if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
    elif causal:
        position = torch.arange(n_keys, device=logits.device)
        allowed = position <= position[queries, None]
    else:
        return logits, torch.tensor(n_keys, device=logits.device)
    return logits.masked_fill(~allowed, -torch.inf), allowed.sum(dim=-1)


def _of_logits(logits: Tensor, queries: slice) -> tuple[Tensor, Tensor]:
    """As `Rows.of`, of logits (B, N, T, T) the most negative of which hide a key."""
    part = logits[:, :, queries]
    return part.to(torch.promote_types(part.dtype, torch.float32)).softmax(dim=-1), _shown(part).sum(dim=-1)


def _shown(numbers: Tensor) -> Tensor:
    return numbers > torch.finfo(numbers.dtype).min / 2
