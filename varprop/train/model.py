"""The network as it is trained: loss and statistics of every layer in one pass, compiled a few layers at a time.

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
import torch.utils.checkpoint
from torch import Tensor, nn

from varprop import measure
from varprop.nn import Block, Transformer, block_forward
from varprop.nn.attention import Shared
from varprop.nn.block import KEY_MASK_STREAM, effective_weights
from varprop.nn.init import make_generator
from varprop.nn.residual import DEPTH_FACTOR
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec
from varprop.train.attention_masks import AttentionMasks
from varprop.train.config import TrainConfig
from varprop.train.loss import chunk_loss, chunk_size, chunked_mean_loss

SUMS = (
    *(f"{site} {power}" for site in SITES[1:] for power in ("sum", "squares")),
    *(f"{branch}_out product" for branch in BRANCHES),
)
"""What is summed over the neurons of every token in every layer: x and x^2 at each site (`resid_pre` is the
`resid_post` of the layer before), and stream times branch."""


class Layer(NamedTuple):
    """The tensors of a layer for the compiled function. key_mask: numbers of [0, 1) that draw it, or None."""

    parameters: dict[str, Tensor]
    masks: dict[str, Tensor]
    depth_factor: Tensor
    key_mask: Tensor | None


class Forward(NamedTuple):
    """What a forward pass gives: the loss to differentiate, its cross-entropy, and statistics, which are detached.

    loss: cross-entropy plus auxiliary losses. stream: variance, second_moment (L + 1, sites) and branch_correlation
    (L + 1, branches), means over the sequences, float64, NaN where there is no such site. mixtures: name -> (mixture
    layers, ...), empty without a mixture: `expert_load` (tokens of each expert), `gate_second_moment`, and the losses
    `load_balance` and `router_z` before their weights.
    """

    loss: Tensor
    cross_entropy: Tensor
    stream: dict[str, Tensor]
    mixtures: dict[str, Tensor]


class Functions(NamedTuple):
    """The parts of a pass, compiled or as they are."""

    run_layers: Callable[..., Any]
    embed: Callable[..., Any]
    normalise: Callable[..., Any]
    chunk_loss: Callable[..., Any]
    stream_statistics: Callable[..., Any]


class TrainingModel(nn.Module):
    """A `Transformer` whose forward pass gives the loss of a batch and the statistics of every layer.

    compute_dtype: of the stream and the matrix products; weights are float32. Nothing in a pass waits for the device.
    In evaluation mode nothing is compiled, so that other shapes cost no compilation.
    """

    def __init__(
        self, spec: ModelSpec, config: TrainConfig, *, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec = spec
        self.transformer = Transformer(spec, seed=config.seed, device=device, compute_dtype=compute_dtype)
        self.compute_dtype = compute_dtype
        self._checkpointing = config.activation_checkpointing
        for name, parameter in self.transformer.named_parameters():
            if name.endswith("moe.router_bias"):  # selects only: it has no gradient
                parameter.requires_grad_(False)
        self._auxiliary = {"load_balance": config.load_balance_weight, "router_z": config.router_z_weight}
        self._chunk = chunk_size(device.type, spec.vocab_size)
        self._depth_factors = torch.arange(1, spec.n_layers + 1, device=device, dtype=torch.float32).rsqrt()
        self.statistics = True  # a benchmark turns them off
        self._plain = Functions(run_layers, _embed, Transformer.normalise, chunk_loss, stream_statistics)
        self._compiled = self._plain
        if config.compile:
            # What was compiled for another network: torch counts it against this one, and fails after eight.
            torch._dynamo.reset()
            self._compiled = Functions(*(torch.compile(f, dynamic=False, fullgraph=True) for f in self._plain))
        self._masks = AttentionMasks(spec)
        self._units = _units(spec, config.compile_layers if config.parallel == "ddp" else 1)

    def forward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Forward:
        """Loss and statistics of tokens (B, T) with their next tokens (B, T).

        documents: (B, T), the document of each token; attention then stays within it.
        """
        model, do = self.transformer, self._compiled if self.training else self._plain
        shared = self._masks.shared(tokens.shape[-1], tokens.device, documents)
        x, embedded = do.embed(model, tokens)
        sums: list[Tensor] = []
        mixtures: list[dict[str, Tensor]] = []
        for unit in self._units:
            x, unit_sums, unit_mixtures = self._unit(do.run_layers, x, unit, shared)
            sums.append(unit_sums)
            mixtures.extend(unit_mixtures)
        hidden = do.normalise(model, x)
        cross_entropy = chunked_mean_loss(hidden, model.unembedding, targets, self._chunk, do.chunk_loss)
        found = {name: torch.stack([layer[name] for layer in mixtures]) for name in (mixtures[0] if mixtures else {})}
        loss = cross_entropy
        for name, weight in self._auxiliary.items():
            if name in found and weight:
                loss = loss + weight * found[name].sum()
        found = {name: value.detach() for name, value in found.items()}
        stream = do.stream_statistics(embedded, sums, self.spec.d_model) if self.statistics else {}
        return Forward(loss, cross_entropy.detach(), stream, found)

    def _unit(self, run_layers: Callable[..., Any], x: Tensor, unit: range, shared: Shared) -> Any:
        if len(unit) > 1:
            return self._layers(run_layers, x, [self.transformer.layers[i] for i in unit], shared)  # type: ignore[misc]
        # As a call of the block, which is what gathers its parameters when they are sharded.
        block = self.transformer.layers[unit[0]]
        return block(x, through=lambda x, block: self._layers(run_layers, x, [block], shared))

    def _layers(self, run_layers: Callable[..., Any], x: Tensor, blocks: Sequence[Block], shared: Shared) -> Any:
        layers = [
            Layer(
                dict(block.named_parameters()),
                dict(block.named_buffers()),
                self._depth_factors[block.layer - 1],
                self._key_mask(block, x),
            )
            for block in blocks
        ]
        numbers = tuple(representative(self.spec, block.layer) for block in blocks)
        run = functools.partial(
            run_layers, spec=self.spec, numbers=numbers, dtype=self.compute_dtype, statistics=self.statistics
        )
        if self._checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(run, x, layers, shared, use_reentrant=False)
        return run(x, layers, shared)

    def _key_mask(self, block: Block, x: Tensor) -> Tensor | None:
        """As `Block.forward` draws it: at every call the same numbers, (B, N, T, T)."""
        if self.spec.attention is None or self.spec.attention.key_mask_density == 1:
            return None
        n_sequences, n_tokens, _ = x.shape
        generator = make_generator(block.seed, block.layer, KEY_MASK_STREAM)
        shape = (n_sequences, self.spec.n_heads, n_tokens, n_tokens)
        return torch.rand(shape, generator=generator).to(x.device)


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
    return next(i for i in range(1, layer + 1) if spec.kind(i) == spec.kind(layer))


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
        weights[DEPTH_FACTOR] = layer.depth_factor  # float32 without axes: it leaves the type of what it multiplies
        seen: dict[str, Tensor] = {}
        sums: list[Tensor] = []
        products: list[Tensor] = []
        routed: dict[str, Tensor] = {}

        def record(_: int, site: str, value: Tensor, seen=seen, sums=sums, products=products) -> None:
            seen[site] = value = value.detach()
            if site != "resid_pre":
                sums.extend(_sums(value))
            if site in measure.BRANCH_STREAM:
                products.append((seen[measure.BRANCH_STREAM[site]].float() * value.float()).sum(dim=-1))

        def observe(_: int, what: str, value: Tensor, routed=routed) -> None:
            routed[what] = value

        x = block_forward(
            x,
            weights,
            spec,
            number,
            record if statistics else None,
            None if layer.key_mask is None else lambda _, drawn=layer.key_mask: drawn,
            observe,
            observe_attention=False,
            shared=shared,
        )
        rows.append(torch.stack((*sums, *products)) if statistics else x.new_zeros(1))
        if routed:
            mixtures.append(_mixture(spec, routed["router_logits"], routed["gates"].detach()))
    return x, torch.stack(rows), mixtures


def stream_statistics(embedded: Tensor, token_sums: Sequence[Tensor], d_model: int) -> dict[str, Tensor]:
    """The `stream` of a `Forward` from sums over neurons: embedded (2, B, T) of x and x^2 at layer 0, and `SUMS`.

    token_sums: tensors (layers, len(SUMS), B, T) that are those of all layers together. Each per-token sum is float32
    and divided by d_model; means over tokens are float64. The variance is the difference of two moments: its relative
    error is about 1e-7 mean^2 / variance, 0.2 % for tokens whose mean is 300 standard deviations. Branch correlations
    are of each sequence, then averaged.
    """
    sums = dict(zip(SUMS, torch.cat(tuple(token_sums)).unbind(dim=1), strict=True))  # (L, B, T)
    squares = {site: sums[f"{site} squares"] / d_model for site in SITES[1:]}
    means = {site: sums[f"{site} sum"] / d_model for site in SITES[1:]}
    for kind, first in ((means, embedded[0]), (squares, embedded[1])):
        kind["resid_post"] = torch.cat((first[None] / d_model, kind["resid_post"]))  # layer 0 too
    wide = torch.float64
    moments = {site: value.mean(dim=(1, 2), dtype=wide) for site, value in squares.items()}
    centres = {site: value.square().mean(dim=(1, 2), dtype=wide) for site, value in means.items()}
    variances = {site: (moments[site] - centres[site]).clamp(min=0) for site in moments}
    powers = {site: value.mean(dim=-1, dtype=wide) for site, value in squares.items()}  # (L, B)
    powers["resid_pre"] = powers["resid_post"][:-1]
    correlations = []
    for site, stream in measure.BRANCH_STREAM.items():
        product = (sums[f"{site} product"] / d_model).mean(dim=-1, dtype=wide)
        correlations.append(measure.cosine(product, powers[stream] * powers[site]).mean(dim=-1))
    correlation = torch.stack(correlations, dim=-1)
    absent = torch.full_like(correlation[:1], torch.nan)
    return {
        "variance": _table(variances),
        "second_moment": _table(moments),
        "branch_correlation": torch.cat((absent, correlation)),
    }


def _table(by_site: dict[str, Tensor]) -> Tensor:
    """(L + 1, sites), NaN at layer 0 but for resid_post."""
    post = by_site["resid_post"]
    absent = torch.full_like(post[:1], torch.nan)
    shifted = by_site | {"resid_pre": post[:-1]}
    return torch.stack([post if s == "resid_post" else torch.cat((absent, shifted[s])) for s in SITES], dim=-1)


def _mixture(spec: ModelSpec, logits: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """Load, gates and auxiliary losses of a mixture; each layer's losses count alike, at any place and depth."""
    assert spec.moe is not None
    load = measure.expert_load(gates).flatten(0, -2).sum(dim=0)
    return {
        "expert_load": load,
        "gate_second_moment": measure.gate_second_moment(gates).mean(),
        "load_balance": measure.load_balance_loss(logits, load, spec.moe.router),
        "router_z": measure.router_z_loss(logits),
    }
