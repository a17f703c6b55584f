"""The network as it is trained: loss and statistics of every layer in one forward pass, compiled a few layers at a time.

All layers share one compiled function: it gets their tensors, and of a layer's number only what it means for the code
(`representative`). A unit of several layers is compiled together, so that a residual sum and the norm that follows it
in the next layer are one pass over the stream.
Legend: B sequences, T tokens, D d_model, L layers, V vocabulary, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varprop import measure
from varprop.nn import Block, Transformer, block_forward
from varprop.nn.attention import Shared, rotation
from varprop.nn.block import effective_weights
from varprop.nn.residual import DEPTH_FACTOR
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec
from varprop.train.config import TrainConfig
from varprop.train.loss import chunk_loss, chunk_size, chunked_mean_loss

SUMS = (
    *(f"{site} {power}" for site in SITES[1:] for power in ("sum", "squares")),
    *(f"{branch}_out product" for branch in BRANCHES),
)
"""What is summed over the neurons of every token in every layer: x, x^2 at each site (`resid_pre` is the `resid_post` of
the layer before), and stream times branch."""


class Layer(NamedTuple):
    """The tensors of a layer for the compiled function."""

    parameters: dict[str, Tensor]
    masks: dict[str, Tensor]
    depth_factor: Tensor


class Forward(NamedTuple):
    """What a forward pass gives: the loss to differentiate, its cross-entropy, and sums for the statistics.

    loss: cross-entropy plus auxiliary losses. embedded: (2, B, T) sums over neurons of x and x^2 at layer 0.
    token_sums: (L, len(SUMS), B, T). mixtures: name -> (mixture layers, ...), empty without a mixture.
    """

    loss: Tensor
    cross_entropy: Tensor
    embedded: Tensor
    token_sums: Tensor
    mixtures: dict[str, Tensor]


class TrainingModel(nn.Module):
    """A `Transformer` whose forward pass gives the loss of a batch and the statistics of every layer.

    compute_dtype: of the stream and the matrix products; weights are float32. Nothing in a pass waits for the device.
    """

    def __init__(
        self, spec: ModelSpec, config: TrainConfig, *, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec = spec
        self.transformer = Transformer(spec, seed=config.seed, device=device, compute_dtype=compute_dtype)
        self.compute_dtype = compute_dtype
        self._checkpointing = config.activation_checkpointing
        self._auxiliary = {"load_balance": config.load_balance_weight, "router_z": config.router_z_weight}
        self._chunk = chunk_size(device.type, spec.vocab_size)
        self._depth_factors = torch.arange(1, spec.n_layers + 1, device=device, dtype=torch.float32).rsqrt()
        self._compiled = config.compile
        compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True) if config.compile else _as_it_is
        self.statistics = True
        self._run_layers: Callable[..., Any] = compiled(run_layers)
        self._embed: Callable[..., Any] = compiled(_embed)
        self._normalise: Callable[..., Any] = compiled(Transformer.normalise)
        self._chunk_loss: Callable[..., Any] = compiled(chunk_loss)
        self._units = _units(spec, config.compile_layers)

    def forward(self, tokens: Tensor, targets: Tensor, shared: Shared | None = None) -> Forward:
        """Loss and statistics of tokens (B, T) with their next tokens (B, T)."""
        model = self.transformer
        shared = shared or self.shared(tokens.shape[-1], tokens.device)
        x, embedded = self._embed(model, tokens)
        sums: list[Tensor] = []
        mixtures: list[dict[str, Tensor]] = []
        for unit in self._units:
            x, unit_sums, unit_mixtures = self._unit(x, unit, shared)
            sums.append(unit_sums)
            mixtures.extend(unit_mixtures)
        hidden = self._normalise(model, x)
        cross_entropy = chunked_mean_loss(hidden, model.unembedding, targets, self._chunk, self._chunk_loss)
        found = {name: torch.stack([layer[name] for layer in mixtures]) for name in (mixtures[0] if mixtures else {})}
        loss = cross_entropy
        for name, weight in self._auxiliary.items():
            if name in found and weight:
                loss = loss + weight * found[name].sum()
        found = {name: value.detach() for name, value in found.items()}
        return Forward(loss, cross_entropy.detach(), embedded, torch.cat(sums), found)

    def shared(self, n_tokens: int, device: torch.device) -> Shared:
        """What the layers share at this length."""
        attention = self.spec.attention
        if attention is None or attention.rope_theta is None:
            return Shared()
        return Shared(rotation=rotation(self.spec, n_tokens, device))

    def _unit(self, x: Tensor, unit: range, shared: Shared) -> Any:
        if len(unit) > 1:
            return self._layers(x, [self.transformer.layers[i] for i in unit], shared)  # type: ignore[misc]
        # As a call of the block, which is what gathers its parameters when they are sharded.
        return self.transformer.layers[unit[0]](x, through=lambda x, block: self._layers(x, [block], shared))

    def _layers(self, x: Tensor, blocks: Sequence[Block], shared: Shared) -> Any:
        layers = [
            Layer(dict(b.named_parameters()), dict(b.named_buffers()), self._depth_factors[b.layer - 1]) for b in blocks
        ]
        numbers = tuple(representative(self.spec, block.layer) for block in blocks)
        run = functools.partial(
            self._run_layers, spec=self.spec, numbers=numbers, dtype=self.compute_dtype, statistics=self.statistics
        )
        if self._checkpointing:
            return torch.utils.checkpoint.checkpoint(run, x, layers, shared, use_reentrant=False)
        return run(x, layers, shared)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _units(spec: ModelSpec, size: int) -> list[range]:
    """Layers (from 0) that are compiled together: `size` each, and what is left over one by one."""
    whole = spec.n_layers // size * size
    return [
        *(range(i, i + size) for i in range(0, whole, size)),
        *(range(i, i + 1) for i in range(whole, spec.n_layers)),
    ]


@functools.lru_cache(maxsize=4096)
def representative(spec: ModelSpec, layer: int) -> int:
    """The first layer with the code of `layer`: equal norm placement, window and kind of feed-forward."""
    return next(i for i in range(1, layer + 1) if _kind(spec, i) == _kind(spec, layer))


def _kind(spec: ModelSpec, layer: int) -> tuple[Any, ...]:
    window = spec.window(layer) if spec.attention else None
    return spec.norm_placement(layer), window, spec.is_moe(layer)


def _embed(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    x = model.embed_tokens(tokens)
    return x, torch.stack(_sums(x.detach()))


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    return wide.sum(dim=-1), wide.square().sum(dim=-1)


def run_layers(
    x: Tensor,
    layers: Sequence[Layer],
    shared: Shared,
    *,
    spec: ModelSpec,
    numbers: tuple[int, ...],
    dtype: torch.dtype,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """The stream (B, T, D) after some layers, their sums (layers, len(SUMS), B, T) and what their mixtures did.

    numbers: the `representative` of each layer.
    """
    rows: list[Tensor] = []
    mixtures: list[dict[str, Tensor]] = []
    for layer, number in zip(layers, numbers, strict=True):
        weights = effective_weights(spec, number, layer.parameters, layer.masks, dtype)
        weights[DEPTH_FACTOR] = layer.depth_factor.to(dtype)
        seen: dict[str, Tensor] = {}
        sums: list[Tensor] = []
        products: list[Tensor] = []

        def record(_: int, site: str, value: Tensor, seen=seen, sums=sums, products=products) -> None:
            seen[site] = value = value.detach()
            if site != "resid_pre":
                sums.extend(_sums(value))
            if site in measure.BRANCH_STREAM:
                stream = seen.get(measure.BRANCH_STREAM[site])
                products.append((stream.float() * value.float()).sum(dim=-1))

        x = block_forward(x, weights, spec, number, record if statistics else None, shared=shared)
        rows.append(torch.stack((*sums, *products)) if statistics else x.new_zeros(1))
    return x, torch.stack(rows), mixtures
