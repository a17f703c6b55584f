"""Fields that can be multiplied into the weights: `plain_spec` has them at their usual value, `plain_weights` the rest.

The two networks have equal logits, to rounding. Folded are: weight masks and their factor; the branch multiplier, into
the matrices that write to the stream (into the norm after the branch, where that is where it stands); the embedding
scale (a tied table is untied by it); the logit scale, into the queries; the 1/sqrt(layer) of LNS, into the norm; a norm
without gain, as gains of one; the gate multiplier and the mean of shared and routed experts, into the experts; a shared
expert without a gate, as twice itself times a gate of sigmoid(0) = 1/2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from varprop.nn import Transformer
from varprop.nn.block import effective_weights
from varprop.spec import ModelSpec, WeightMasks

OUTPUTS = (
    *("attention.o", "attention.o_bias", "mlp.down", "mlp.down_bias"),
    *("moe.experts.down", "moe.shared.down"),
)
"""What writes to the stream."""
NORMS = ("attention_norm.gain", "mlp_norm.gain")


def plain_spec(spec: ModelSpec) -> ModelSpec:
    """`spec` with every foldable field at the value that Hugging Face's families have.

    >>> from varprop import presets
    >>> plain_spec(presets.tiny_masked()) == presets.tiny()
    True
    """
    changes: dict[str, Any] = {"masks": WeightMasks(), "embedding_scale": 1.0, "norm.gain": True}
    if spec.embedding_scale != 1:
        changes["tied_embeddings"] = False
    if spec.norm.placement == "lns":
        changes["norm.placement"] = "pre"
    if spec.norm.placement in ("pre", "lns", "reordered"):
        changes |= {"residual.rule": "one", "residual.branch_multiplier": 1.0}
    if spec.attention is not None:
        changes["attention.logit_scale"] = None
    if spec.moe is not None:
        changes |= _plain_mixture(spec)
    return spec.with_fields(changes)


def _plain_mixture(spec: ModelSpec) -> dict[str, Any]:
    part = spec.moe
    assert part is not None
    changes: dict[str, Any] = {"moe.gate_multiplier": 1.0}
    if part.n_shared_experts:
        changes |= {"moe.shared_gate": True, "moe.shared_mixing": "sum"}
    if part.gate_order == "top_k_then_score" and part.router == "softmax":  # equal: the sum over all cancels
        changes |= {"moe.gate_order": "score_then_top_k", "moe.normalize_gates": True}
    kinds = {spec.is_moe(layer) for layer in range(1, spec.n_layers + 1)}
    if spec.moe_pattern and len(kinds) == 1:
        changes = {"moe_pattern": (), **({**changes, "feed_forward": None} if kinds == {True} else {"moe": None})}
    return changes


def folded_fields(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the fields that `plain_spec` changes, sorted.

    >>> from varprop import presets
    >>> folded_fields(presets.tiny().with_fields({"masks.q.density": 0.5, "norm.placement": "lns"}))
    ('masks.q', 'norm.placement')
    """
    before, after = (_two_levels(one) for one in (spec, plain_spec(spec)))
    return tuple(sorted(name for name in before if before[name] != after.get(name)))


def _two_levels(spec: ModelSpec) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in spec.to_dict().items():
        inner = value.items() if isinstance(value, dict) else ()
        fields |= {f"{name}.{leaf}": v for leaf, v in inner} if inner else {name: value}
    return fields


def plain_weights(model: Transformer) -> dict[str, Tensor]:
    """Tensors of the network of `plain_spec(model.spec)`, by the names of its tensor table, on the model's device."""
    spec = model.spec
    plain = plain_spec(spec)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    own.setdefault("unembed", own["embed"])
    factors = {"embed": spec.embedding_scale}
    for layer in range(1, spec.n_layers + 1):
        prefix = f"layers.{layer - 1}"
        block = model.get_submodule(prefix)
        whole = effective_weights(spec, layer, dict(block.named_parameters()), dict(block.named_buffers()))
        own |= {f"{prefix}.{name}": weight.detach() for name, weight in whole.items()}
        factors |= {f"{prefix}.{name}": factor for name, factor in _factors(spec, layer).items()}
    weights = {}
    for row in plain.tensor_table():  # rows that the network has not: gains, all one, and gates, all zero
        weight = own.get(row.name, torch.full(row.shape, row.init_mean).to(own["embed"]))
        factor = factors.get(row.name, 1.0)
        weights[row.name] = weight if factor == 1 else weight * factor
    return weights


def _factors(spec: ModelSpec, layer: int) -> dict[str, float]:
    """What multiplies the tensors of a layer, by their name in `layer_table`; 1 where it has no entry."""
    branch = spec.branch_scale
    reordered = spec.norm.placement == "reordered"
    factors: dict[str, float] = {name: branch for name in (NORMS if reordered else OUTPUTS)}
    if spec.norm.placement == "lns":
        factors |= dict.fromkeys(NORMS, layer**-0.5)
    part = spec.attention
    if part is not None and part.logit_scale is not None:
        scaled = ("attention.q_norm.gain",) if part.qk_norm != "none" else ("attention.q", "attention.q_bias")
        factors |= dict.fromkeys(scaled, part.logit_scale * spec.head_dim**0.5)
    if spec.moe is not None:
        mean = spec.moe.shared_mixing == "mean" and spec.moe.n_shared_experts > 0
        of_shared, of_routed = (1 / (spec.moe.top_k + 1), spec.moe.top_k / (spec.moe.top_k + 1)) if mean else (1.0, 1.0)
        of_gate = 1.0 if spec.moe.shared_gate else 2.0
        output = 1.0 if reordered else branch
        factors["moe.experts.down"] = output * of_routed * spec.moe.gate_multiplier
        factors["moe.shared.down"] = output * of_shared * of_gate
    return factors
