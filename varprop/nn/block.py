"""One block: attention and feed-forward, in sequence or in parallel, and the five reading points of `results.SITES`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from varprop.nn.attention import Uniform, attention
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
"""Called with the layer, and `attention` and its probabilities (*lead, N, T, T) or `gates` and theirs (*lead, T, E)."""
KEY_MASK_STREAM = 1


def block_forward(
    x: Tensor,
    weights: Weights,
    spec: ModelSpec,
    layer: int,
    record: Record | None = None,
    generator: torch.Generator | Uniform | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """The stream (*lead, T, D) after block `layer` (1..n_layers).

    weights: (out, in) or (*lead, out, in) by the names of `layer_table`. The generator draws the key mask. A part that
    the block lacks adds zeros and leaves the stream as it is.
    """
    here = None if observe is None else functools.partial(observe, layer)

    def attend(y: Tensor) -> Tensor:
        return attention(y, weights, spec, layer, generator, here)

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


class Block(NamedParameters):
    """The parameters of one layer, named as in `layer_table`, and `block_forward` on them."""

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec, self.layer, self.seed = spec, layer, seed
        rows = layer_table(spec, layer)
        self.mask_factors = {name: row.mask.factor for name, row in rows.items() if row.mask is not None}
        self.add_tensors(draw_tensors(rows, make_generator(seed, layer)), device, dtype)

    def weights(self) -> dict[str, Tensor]:
        """Effective weights by name: weight * mask * factor where there is a mask."""
        weights: dict[str, Tensor] = dict(self.named_parameters())
        masks = dict(self.named_buffers())
        for name, factor in self.mask_factors.items():
            weights[name] = weights[name] * masks[name + MASK_SUFFIX] * factor
        return weights

    def forward(self, x: Tensor, record: Record | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The stream after this block. Without a generator every call draws the same key mask."""
        if generator is None and self.spec.attention is not None and self.spec.attention.key_mask_density < 1:
            generator = make_generator(self.seed, self.layer, KEY_MASK_STREAM)
        return block_forward(x, self.weights(), self.spec, self.layer, record, generator)
