"""What is read off a network now and then: statistics of a fixed batch that are too expensive for every step.

Legend: S sequences, T tokens, D d_model, L layers (0 = embedding), N query heads, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from varprop.measure import (
    BRANCH_STREAM,
    QUANTILES,
    AttentionStatistics,
    TokenMoments,
    expert_load,
    expert_load_concentration,
    gate_second_moment,
    overlap_sums,
    router_entropy,
    sink_positions,
    token_correlation,
    token_moments,
    token_quantiles,
)
from varprop.nn import Transformer, block_forward
from varprop.nn.attention import Shared, allowed_keys
from varprop.nn.block import KEY_MASK_STREAM, Block, effective_weights
from varprop.nn.init import make_generator
from varprop.nn.residual import branch_input
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec
from varprop.train.distributed import full
from varprop.train.probe_attention import sequence_attention
from varprop.train.weights import matrix_labels

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "token_correlation": ("layer", "site"),
    **dict.fromkeys(("second_moment_quantile", "variance_quantile"), ("layer", "site", "quantile")),
    **dict.fromkeys(("skewness_median", "excess_kurtosis_median", "sink_second_moment"), ("layer", "site")),
    "sink_count": (),
    "branch_overlap": ("branch", "source_layer", "target_layer"),
    "block_overlap": ("source_layer", "target_layer"),
    **dict.fromkeys(("attention_concentration", "attention_entropy", "attention_sink_mass"), ("layer",)),
    **dict.fromkeys(("head_concentration", "head_entropy", "head_sink_mass"), ("layer", "head")),
    **dict.fromkeys(("gate_second_moment", "expert_load_concentration", "router_entropy"), ("layer",)),
    "expert_load": ("layer", "expert"),
}
"""Variable -> the dimensions of its tensor."""
OF_HEADS = ("head_concentration", "head_entropy", "head_sink_mass")
OF_LAYERS = ("attention_concentration", "attention_entropy", "attention_sink_mass")

KEPT_NUMBERS = 2**29
"""Numbers of branch outputs that are kept for their overlaps: 2 GiB in float32."""


def coordinates(spec: ModelSpec) -> dict[str, Any]:
    """Labels of the quantiles and, for `varprop.train.weights`, of the matrices; the others count from 0."""
    return {"quantile": list(QUANTILES), "matrix": matrix_labels(spec)}


@torch.no_grad()
def probe(
    model: Transformer,
    tokens: Tensor,
    *,
    documents: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Statistics of the network on `tokens` (S, T), before the final norm: float64, by the names of `DIMENSIONS`.

    Streams. token_correlation: mean over sequences of `measure.token_correlation`. second_moment_quantile,
    variance_quantile: over the positions of all sequences that are no sinks (`measure.sink_positions`, judged on the
    stream). skewness_median, excess_kurtosis_median: of a token over its neurons, the same positions.
    sink_second_moment: mean over the sinks, of which there are sink_count, the S first positions included.
    Layers. branch_overlap C_kl = mean over all S T tokens of f_k . f_l / D between what a branch adds in layers k and l
    (NaN at layer 0); block_overlap: of what whole blocks add, attention and feed-forward together, layer 0 the
    embedding. Where the stream is the sum (skip multiplier 1, no norm on the sum), the block overlaps of layers 0..l
    sum to its second moment after layer l. The cosine is C_kl / sqrt(C_kk C_ll).
    Attention. attention_concentration, attention_entropy, attention_sink_mass (what goes to position 0): means over
    queries, sequences and heads; head_* for each head. Queries in chunks: no T x T matrix of all heads is held.
    Mixtures. gate_second_moment, expert_load_concentration: of each sequence, averaged; router_entropy: of the router's
    scores over the experts, made to sum to 1, nats, mean over tokens. A layer without a mixture counts as one expert
    with gate 1. expert_load: share of each expert in all assignments, NaN in layers without a mixture.
    What the spec lacks is absent.

    documents: (S, T), the document that each token is of; attention then stays within it. compute_dtype: of the stream
    and the matrix products, float32 whatever the training uses, unless told. chunk: sequences in one forward pass, None
    = as many as `KEPT_NUMBERS` allow (a key mask is drawn for all of them, every time the same). Nothing is compiled;
    statistics are summed in float64 in a fixed order, so that ranks with the same weights get the same numbers. Memory
    beside the forward pass: (2 L + 1) chunk T D numbers of the branches, chunk T D in float64 a few times, and what
    `attention_statistics` and `overlap_sums` hold. Queries and keys are computed again from the stream. Of a sharded
    model one layer at a time is gathered, so all ranks have to call it.
    Checked by: tests/train/test_probe.py, float64 numpy definitions.
    """
    recorder = _Recorder(model.spec, tokens)
    embedding = full(model.get_parameter("embed"))
    if chunk is None:
        kept = (1 + len(BRANCHES) * model.spec.n_layers) * tokens.shape[1] * model.spec.d_model
        chunk = max(1, KEPT_NUMBERS // kept)
    for number in range(0, len(tokens), chunk):
        rows = slice(number, number + chunk)
        masks = None if documents is None else _document_masks(model.spec, documents[rows])
        x = (functional.embedding(tokens[rows], embedding) * model.spec.embedding_scale).to(compute_dtype)
        recorder(0, "resid_post", x)
        for block in model.layers:
            assert isinstance(block, Block)
            x = _pass(x, block, recorder, masks, compute_dtype)
        recorder.end_of_sequences()
    return recorder.values()


def _pass(
    x: Tensor, block: Block, recorder: _Recorder, masks: Mapping[int, Tensor] | None, compute_dtype: torch.dtype
) -> Tensor:
    """The stream after a block, which is recorded with its attention."""
    spec, layer = block.spec, block.layer
    parameters = {name: full(parameter) for name, parameter in block.named_parameters()}
    weights = effective_weights(spec, layer, parameters, dict(block.named_buffers()), compute_dtype)

    def generator() -> torch.Generator:
        return make_generator(block.seed, layer, KEY_MASK_STREAM)

    if spec.attention is not None:
        y = branch_input(x, weights, spec, layer, "attention")
        recorder.attention(layer, sequence_attention(y, weights, spec, layer, masks, generator()))
    shared = Shared(masks=masks)
    return block_forward(
        x, weights, spec, layer, recorder, generator(), recorder.observe, observe_attention=False, shared=shared
    )


class _Recorder:
    """Collects the statistics of all sequences, chunk by chunk: `record` and `observe` of the blocks."""

    def __init__(self, spec: ModelSpec, tokens: Tensor) -> None:
        self._spec = spec
        self._n_sequences, self._n_tokens = tokens.shape
        self._n_done = 0
        places = (spec.n_layers + 1, len(SITES))
        self._empty = torch.full((), torch.nan, dtype=torch.float64, device=tokens.device)
        self._by_token = self._empty.repeat(len(TokenMoments._fields), *places, *tokens.shape)
        self._correlation = self._empty.repeat(*places, self._n_sequences)
        n_contributions = 1 + len(BRANCHES) * spec.n_layers
        self._overlap = self._empty.new_zeros(n_contributions, n_contributions)
        self._contributions: list[Tensor] = []
        self._attention: dict[int, list[AttentionStatistics]] = defaultdict(list)
        self._mixture: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def __call__(self, layer: int, site: str, x: Tensor) -> None:
        at = layer, SITES.index(site), slice(self._n_done, self._n_done + len(x))
        if site == "resid_pre":  # the stream after the block before, measured there
            before = layer - 1, SITES.index("resid_post"), at[-1]
            self._by_token[:, *at], self._correlation[at] = self._by_token[:, *before], self._correlation[before]
            return
        self._by_token[:, *at], self._correlation[at] = torch.stack(token_moments(x)), token_correlation(x)
        if layer == 0 or site in BRANCH_STREAM:
            self._contributions.append(x)

    def attention(self, layer: int, found: Sequence[AttentionStatistics]) -> None:
        """Take the attention of the sequences of a chunk."""
        self._attention[layer].extend(found)

    def observe(self, layer: int, what: str, values: Tensor) -> None:
        """Take the router's logits and gates, (chunk, T, E)."""
        assert self._spec.moe is not None
        for sequence in values:
            if what == "router_logits":
                self._mixture[layer, "router_entropy"].append(router_entropy(sequence, self._spec.moe.router))
            elif what == "gates":
                self._mixture[layer, "gate_second_moment"].append(gate_second_moment(sequence))
                self._mixture[layer, "expert_load_concentration"].append(expert_load_concentration(sequence))
                self._mixture[layer, "expert_load"].append(expert_load(sequence).double())

    def end_of_sequences(self) -> None:
        """Add the overlaps of the chunk that went through all layers."""
        self._overlap += overlap_sums(self._contributions)
        self._n_done += len(self._contributions[0])
        self._contributions.clear()

    def values(self) -> dict[str, Tensor]:
        """Every statistic of all sequences by the names of `DIMENSIONS`."""
        by_name = dict(zip(TokenMoments._fields, self._by_token, strict=True))
        sinks = sink_positions(by_name["second_moment"][:, SITES.index("resid_post")])
        others = ~sinks if not sinks.all() else sinks
        quantiles = {name: token_quantiles(values, others) for name, values in by_name.items()}
        median = QUANTILES.index(0.5)
        return {
            "token_correlation": self._correlation.mean(dim=-1),
            **{f"{name}_quantile": quantiles[name] for name in ("second_moment", "variance")},
            **{f"{name}_median": quantiles[name][..., median] for name in ("skewness", "excess_kurtosis")},
            "sink_second_moment": by_name["second_moment"][..., sinks].mean(dim=-1),
            "sink_count": sinks.sum().double(),
            **self._overlaps(),
            **(self._attention_values() if self._spec.attention is not None else {}),
            **(self._mixture_values() if self._spec.moe is not None else {}),
        }

    def _overlaps(self) -> dict[str, Tensor]:
        n_layers, n_branches = self._spec.n_layers, len(BRANCHES)
        overlap = self._overlap / (self._n_sequences * self._n_tokens * self._spec.d_model)
        # The contributions stand in the order embedding, then attention and feed-forward of each layer.
        layer_of = torch.tensor([0, *(i for i in range(1, n_layers + 1) for _ in BRANCHES)], device=overlap.device)
        into_blocks = functional.one_hot(layer_of).double().mT
        by_branch = self._empty.repeat(n_branches, n_layers + 1, n_layers + 1)
        for number in range(n_branches):
            by_branch[number, 1:, 1:] = overlap[1 + number :: n_branches, 1 + number :: n_branches]
        return {"branch_overlap": by_branch, "block_overlap": into_blocks @ overlap @ into_blocks.mT}

    def _attention_values(self) -> dict[str, Tensor]:
        rows = [torch.stack([torch.stack(s) for s in found]).mean(dim=0) for found in self._attention.values()]
        means = _from_layer_0(rows)  # (L + 1, statistics, N)
        by_head = dict(zip(OF_HEADS, means.unbind(dim=1), strict=True))
        return {**by_head, **dict(zip(OF_LAYERS, means.mean(dim=-1).unbind(dim=1), strict=True))}

    def _mixture_values(self) -> dict[str, Tensor]:
        assert self._spec.moe is not None
        layers = range(1, self._spec.n_layers + 1)
        values = {}
        for name, alone in (("gate_second_moment", 1.0), ("expert_load_concentration", 1.0), ("router_entropy", 0.0)):
            found = [self._mixture.get((layer, name), [torch.full_like(self._empty, alone)]) for layer in layers]
            values[name] = _from_layer_0([torch.stack(of_sequences).mean() for of_sequences in found])
        nothing = self._empty.repeat(self._spec.moe.n_experts)
        loads = [torch.stack(self._mixture.get((layer, "expert_load"), [nothing])).sum(dim=0) for layer in layers]
        return {**values, "expert_load": _from_layer_0([load / load.sum().clamp(min=1) for load in loads])}


def _document_masks(spec: ModelSpec, documents: Tensor) -> dict[int, Tensor]:
    """By window (0 = none), which earlier token of its own document a token sees, (S, 1, T, T)."""
    own = (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)
    masks: dict[int, Tensor] = {}
    for layer in range(1, spec.n_layers + 1):
        allowed = allowed_keys(spec, layer, documents.shape[-1], documents.device)
        masks.setdefault(spec.window(layer) or 0, own if allowed is None else own & allowed)
    return masks


def _from_layer_0(rows: Sequence[Tensor]) -> Tensor:
    """Layers 1..L with a row of NaN, that of the embedding, before them."""
    return torch.stack([torch.full_like(rows[0], torch.nan), *rows])
