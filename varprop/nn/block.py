"""One block: attention and feed-forward, in sequence or in parallel, and the five reading points of `results.SITES`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from varprop.nn.attention import Shared, Uniform, attention
from varprop.nn.feed_forward import feed_forward
from varprop.nn.init import draw_tensors, make_generator
from varprop.nn.linear import Weights
from varprop.nn.moe import moe
from varprop.nn.parameters import MASK_SUFFIX, NamedParameters
from varprop.nn.residual import added, close, scaled
from varprop.spec import ModelSpec, layer_table

Record = Callable[[int, str, Tensor], None]
"""Called with the layer, the site and the tensor (*lead, T, D) there; it must not change the tensor."""
Observe = Callable[[int, str, Tensor], None]
"""Called with the layer, and `attention` and its probabilities (*lead, N, T, T), or `router_logits` or `gates` and
theirs (*lead, T, E)."""
KEY_MASK_STREAM = 1


def block_forward(
    x: Tensor,
    weights: Weights,
    spec: ModelSpec,
    layer: int,
    record: Record | None = None,
    generator: torch.Generator | Uniform | None = None,
    observe: Observe | None = None,
    *,
    observe_attention: bool = True,
    shared: Shared | None = None,
) -> Tensor:
    """The stream (*lead, T, D) after block `layer` (1..n_layers).

    weights: (out, in) or (*lead, out, in) by the names of `layer_table`. The generator draws the key mask. A part that
    the block lacks adds zeros and leaves the stream as it is. observe_attention: whether `observe` sees attention,
    which then forms the probabilities; the mixture's router is seen in any case.
    """
    here = None if observe is None else functools.partial(observe, layer)

    def attend(y: Tensor) -> Tensor:
        return attention(y, weights, spec, layer, generator, here if observe_attention else None, shared)

    def feed(y: Tensor) -> Tensor:
        return moe(y, weights, spec, layer, here) if spec.is_moe(layer) else feed_forward(y, weights, spec, layer)

    has_attention = spec.attention is not None
    has_feed_forward = spec.feed_forward is not None or spec.moe is not None
    parallel = spec.block == "parallel" and has_attention and has_feed_forward
    attn_out = mlp_out = None
    middle = x
    if has_attention:
        attn_out = added(x, weights, spec, layer, "attention", attend)
        middle = close(scaled(spec.skip_scale, x) + attn_out, weights, spec, layer, "attention")
    after = middle
    if has_feed_forward:
        mlp_out = added(x if parallel else middle, weights, spec, layer, "mlp", feed)
        after = (middle if parallel else scaled(spec.skip_scale, middle)) + mlp_out
        after = close(after, weights, spec, layer, "mlp")
    if record is not None:
        record(layer, "resid_pre", x)
        record(layer, "attn_out", torch.zeros_like(x) if attn_out is None else attn_out)
        record(layer, "resid_mid", middle)
        record(layer, "mlp_out", torch.zeros_like(x) if mlp_out is None else mlp_out)
        record(layer, "resid_post", after)
    return after


def effective_weights(
    spec: ModelSpec,
    layer: int,
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Weights of a layer by name: weight * mask * factor where there is a mask, in the type that they are used in.

    Norms, the router and the sink logits work in float32 whatever the compute type, and keep theirs.
    """
    rows, weights = layer_table(spec, layer), {}
    for name, weight in parameters.items():
        mask = rows[name].mask
        if mask is not None:
            weight = weight * masks[name + MASK_SUFFIX] * mask.factor
        keep = compute_dtype is None or "norm." in name or name.startswith(("moe.router", "attention.sink"))
        weights[name] = weight if keep else weight.to(compute_dtype)
    return weights


class Block(NamedParameters):
    """The parameters of one layer, named as in `layer_table`, and `block_forward` on them.

    compute_dtype: type of the stream and the matrix products; None = that of the parameters.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.layer, self.seed, self.compute_dtype = spec, layer, seed, compute_dtype
        self.add_tensors(draw_tensors(layer_table(spec, layer), make_generator(seed, layer)), device, dtype)

    def weights(self) -> dict[str, Tensor]:
        """Effective weights by name."""
        tensors = dict(self.named_parameters()), dict(self.named_buffers())
        return effective_weights(self.spec, self.layer, *tensors, self.compute_dtype)

    def forward(
        self,
        x: Tensor,
        record: Record | None = None,
        generator: torch.Generator | None = None,
        observe: Observe | None = None,
        *,
        shared: Shared | None = None,
        through: Callable[[Tensor, Block], Any] | None = None,
    ) -> Any:
        """The stream after this block. Without a generator every call draws the same key mask.

        through: what computes it instead, from x and this block, whose parameters are whole while it runs.
        """
        if through is not None:
            return through(x, self)
        if generator is None and self.spec.attention is not None and self.spec.attention.key_mask_density < 1:
            generator = make_generator(self.seed, self.layer, KEY_MASK_STREAM)
        return block_forward(x, self.weights(), self.spec, self.layer, record, generator, observe, shared=shared)
