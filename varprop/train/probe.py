"""What is read off a network now and then: statistics of a fixed batch that are too expensive for every step.

Legend: S sequences, T tokens, D d_model, L layers (0 = embedding), N query heads, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from varprop.measure import (
    AttentionStatistics,
    attention_statistics,
    expert_load_concentration,
    gate_second_moment,
    overlap_sums,
    sink_positions,
    token_correlation,
    token_moments,
    token_quantiles,
)
from varprop.measure.tokens import QUANTILES
from varprop.nn import Transformer
from varprop.nn.attention import allowed_keys, attention_probabilities, draw_kept_keys, heads
from varprop.nn.block import KEY_MASK_STREAM, Block
from varprop.nn.init import make_generator
from varprop.nn.moe import route
from varprop.nn.residual import branch_input
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec

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


def coordinates(spec: ModelSpec) -> dict[str, Any]:
    """Labels of the dimensions of `DIMENSIONS` that results do not label by themselves."""
    layers = list(range(spec.n_layers + 1))
    return {"quantile": list(QUANTILES), "source_layer": layers, "target_layer": layers}


@torch.no_grad()
def probe(
    model: Transformer,
    tokens: Tensor,
    *,
    spec: ModelSpec,
    compute_dtype: torch.dtype = torch.float32,
    chunk: int = 1,
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

    compute_dtype: of the matrix products, by autocast; float32 whatever the training uses, unless told. The stream and
    the weights are as the network has them; statistics are summed in float64 in a fixed order, so that ranks with the
    same weights get the same numbers. chunk: sequences in one forward pass. Memory beside the forward pass:
    (2 L + 1) chunk T D numbers of the branches and what `attention_statistics` and `overlap_sums` hold. Queries, keys
    and gates are computed again from the stream, one norm and three products a layer. Under a sharded model all ranks
    have to call it.
    Checked by: tests/train/test_probe.py, float64 numpy definitions.
    """
    recorder = _Recorder(model, spec, tokens)
    with (
        torch.compiler.set_stance("force_eager"),
        torch.autocast(tokens.device.type, compute_dtype, enabled=compute_dtype != torch.float32),
    ):
        for rows in tokens.split(chunk):
            model.hidden(rows, recorder)
            recorder.end_of_sequences()
    return recorder.values()


class _Recorder:
    """Collects the statistics of all sequences: pass it as `record`, chunk by chunk."""

    def __init__(self, model: Transformer, spec: ModelSpec, tokens: Tensor) -> None:
        self._spec, self._model = spec, model
        self._n_sequences, self._n_tokens = tokens.shape
        self._n_done = 0
        shape = (spec.n_layers + 1, len(SITES))
        self._by_token = {
            name: torch.full((*shape, *tokens.shape), torch.nan, dtype=torch.float64, device=tokens.device)
            for name in ("second_moment", "variance", "skewness", "excess_kurtosis")
        }
        self._correlation = torch.full(
            (*shape, self._n_sequences), torch.nan, dtype=torch.float64, device=tokens.device
        )
        n_contributions = 1 + len(BRANCHES) * spec.n_layers
        self._overlap = torch.zeros(n_contributions, n_contributions, dtype=torch.float64, device=tokens.device)
        self._contributions: list[Tensor] = []
        self._streams: dict[str, Tensor] = {}
        self._attention: dict[int, list[AttentionStatistics]] = {}
        self._mixture: dict[int, list[tuple[Tensor, ...]]] = {}

    def __call__(self, layer: int, site: str, x: Tensor) -> None:
        self._n_chunk = len(x)
        if site == "resid_pre":
            self._copy_from_the_layer_before(layer)
            self._attend(layer, x)
        else:
            with torch.autocast(x.device.type, enabled=False):
                self._of_tokens(layer, site, x)
        if site == "resid_mid" and self._spec.is_moe(layer):
            parallel = self._spec.block == "parallel" and self._spec.attention is not None
            self._mix(layer, self._streams["resid_pre"] if parallel else x)
        if site.startswith("resid"):
            self._streams[site] = x
        if layer == 0 or site in ("attn_out", "mlp_out"):
            self._contributions.append(x)

    def end_of_sequences(self) -> None:
        """Add the overlaps of the chunk that went through all layers."""
        with torch.autocast(self._overlap.device.type, enabled=False):
            self._overlap += overlap_sums(self._contributions)
        self._contributions.clear()
        self._n_done += self._n_chunk

    def _chunk(self) -> slice:
        return slice(self._n_done, self._n_done + self._n_chunk)

    def _of_tokens(self, layer: int, site: str, x: Tensor) -> None:
        place, rows = SITES.index(site), self._chunk()
        for number, sequence in zip(range(rows.start, rows.stop), x, strict=True):
            for name, values in token_moments(sequence)._asdict().items():
                self._by_token[name][layer, place, number] = values
            self._correlation[layer, place, number] = token_correlation(sequence)

    def _copy_from_the_layer_before(self, layer: int) -> None:
        here, before, rows = SITES.index("resid_pre"), SITES.index("resid_post"), self._chunk()
        for values in (*self._by_token.values(), self._correlation):
            values[layer, here, rows] = values[layer - 1, before, rows]

    def _attend(self, layer: int, x: Tensor) -> None:
        if self._spec.attention is None:
            return
        weights = self._block(layer).weights()
        y = branch_input(x, weights, self._spec, layer, "attention")
        q, k = (heads(y, weights, self._spec, name) for name in ("q", "k"))
        kept = _kept_keys(q, self._block(layer))
        sink = weights.get("attention.sink")
        for number in range(len(x)):
            found = _attention(q[number], k[number], sink, None if kept is None else kept[number], self._block(layer))
            self._attention.setdefault(layer, []).append(found)

    def _mix(self, layer: int, x: Tensor) -> None:
        part = self._spec.moe
        assert part is not None
        weights = self._block(layer).weights()
        y = branch_input(x, weights, self._spec, layer, "mlp")
        gates, active = route(y, weights, part)
        wide = torch.promote_types(y.dtype, torch.float32)
        logits = functional.linear(y.to(wide), weights["moe.router"].to(wide))
        for g, a, z in zip(gates, active, logits, strict=True):
            scores = (z.softmax(dim=-1) if part.router == "softmax" else z.sigmoid()).double()
            entropy = torch.special.entr(scores / scores.sum(dim=-1, keepdim=True)).sum(dim=-1).mean()
            found = (gate_second_moment(g), expert_load_concentration(g), entropy, a.sum(dim=0).double())
            self._mixture.setdefault(layer, []).append(found)

    def _block(self, layer: int) -> Block:
        block = self._model.layers[layer - 1]
        assert isinstance(block, Block)
        return block

    def values(self) -> dict[str, Tensor]:
        """Every statistic of all sequences by the names of `DIMENSIONS`."""
        sinks = sink_positions(self._by_token["second_moment"][:, SITES.index("resid_post")])
        others = ~sinks if not sinks.all() else sinks
        quantiles = {name: token_quantiles(values, others) for name, values in self._by_token.items()}
        median = QUANTILES.index(0.5)
        return {
            "token_correlation": self._correlation.mean(dim=-1),
            **{f"{name}_quantile": quantiles[name] for name in ("second_moment", "variance")},
            **{f"{name}_median": quantiles[name][..., median] for name in ("skewness", "excess_kurtosis")},
            "sink_second_moment": self._by_token["second_moment"][..., sinks].mean(dim=-1),
            "sink_count": sinks.sum().double(),
            **self._overlaps(),
            **(self._attention_values() if self._attention else {}),
            **(self._mixture_values() if self._mixture else {}),
        }

    def _overlaps(self) -> dict[str, Tensor]:
        n_layers = self._spec.n_layers
        overlap = self._overlap / (self._n_sequences * self._n_tokens * self._spec.d_model)
        # The contributions stand in the order embedding, then attention and feed-forward of each layer.
        layer_of = torch.tensor([0, *(i for i in range(1, n_layers + 1) for _ in BRANCHES)], device=overlap.device)
        into_blocks = functional.one_hot(layer_of).double().mT
        by_branch = torch.full((len(BRANCHES), n_layers + 1, n_layers + 1), torch.nan, dtype=torch.float64)
        by_branch = by_branch.to(overlap.device)
        for number in range(len(BRANCHES)):
            by_branch[number, 1:, 1:] = overlap[1 + number :: len(BRANCHES), 1 + number :: len(BRANCHES)]
        return {"branch_overlap": by_branch, "block_overlap": into_blocks @ overlap @ into_blocks.mT}

    def _attention_values(self) -> dict[str, Tensor]:
        rows = [[torch.stack(s) for s in self._attention[layer]] for layer in range(1, self._spec.n_layers + 1)]
        means = _from_layer_0([torch.stack(found).mean(dim=0) for found in rows])  # (L + 1, statistics, N)
        by_head = dict(zip(OF_HEADS, means.unbind(dim=1), strict=True))
        return {**by_head, **dict(zip(OF_LAYERS, means.mean(dim=-1).unbind(dim=1), strict=True))}

    def _mixture_values(self) -> dict[str, Tensor]:
        assert self._spec.moe is not None
        device = self._overlap.device
        alone = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64, device=device)
        nothing = torch.full((self._spec.moe.n_experts,), torch.nan, dtype=torch.float64, device=device)
        scalars, loads = [], []
        for layer in range(1, self._spec.n_layers + 1):
            found = self._mixture.get(layer, [])
            scalars.append(torch.stack([torch.stack(f[:3]) for f in found]).mean(dim=0) if found else alone)
            load = torch.stack([f[3] for f in found]).sum(dim=0) if found else nothing
            loads.append(load / load.sum().clamp(min=1) if found else nothing)
        names = ("gate_second_moment", "expert_load_concentration", "router_entropy")
        by_name = dict(zip(names, _from_layer_0(scalars).unbind(dim=1), strict=True))
        return {**by_name, "expert_load": _from_layer_0(loads)}


def _kept_keys(q: Tensor, block: Block) -> Tensor | None:
    """The key mask that the forward pass drew for these queries, (chunk, N, T, T); None where the spec has none."""
    density = block.spec._attention().key_mask_density
    if density == 1:
        return None
    return draw_kept_keys(q, density, make_generator(block.seed, block.layer, KEY_MASK_STREAM))


def _attention(q: Tensor, k: Tensor, sink: Tensor | None, kept: Tensor | None, block: Block) -> AttentionStatistics:
    """Statistics of one sequence from its queries and keys, (N, T, H)."""
    spec, layer = block.spec, block.layer
    part, n_tokens = spec._attention(), q.shape[-2]
    scale = part.logit_scale or spec.head_dim**-0.5
    allowed = allowed_keys(spec, layer, n_tokens, q.device)
    after_softmax = kept is not None and part.key_mask_place == "after_softmax"
    if kept is not None and not after_softmax:
        allowed = kept if allowed is None else kept & allowed

    def probabilities(queries: slice) -> Tensor:
        rows = None if allowed is None else allowed[..., queries, :]
        found = attention_probabilities(q[:, queries], k, rows, scale, part.logit_softcap, sink)
        return found * kept[:, queries] if kept is not None and after_softmax else found

    return attention_statistics(probabilities, n_tokens, spec.n_heads * n_tokens)


def _from_layer_0(rows: Sequence[Tensor]) -> Tensor:
    """Layers 1..L with a row of NaN, that of the embedding, before them."""
    return torch.stack([torch.full_like(rows[0], torch.nan), *rows])
