"""Small specs that together give every field of `ModelSpec` a value besides its default."""

from __future__ import annotations

from typing import Any

from varprop.spec import AttentionSpec, FeedForwardSpec, MaskSpec, ModelSpec, MoESpec

BASE = ModelSpec(
    d_model=16,
    n_layers=3,
    vocab_size=11,
    attention=AttentionSpec(n_heads=4),
    feed_forward=FeedForwardSpec(d_ff=12),
)
EXPERTS: dict[str, Any] = {"feed_forward": None, "moe": MoESpec(n_experts=4, top_k=2, d_expert=8)}


def _masked(kind: str, rescale: str, **options: Any) -> dict[str, Any]:
    names = ("q", "k", "v", "o", "gate", "up", "down", "router")
    mask = MaskSpec(kind=kind, density=0.5, rescale=rescale, **options)  # type: ignore[arg-type]
    return {"masks": {name: mask for name in names}}


def _moe(**fields: Any) -> dict[str, Any]:
    return {**EXPERTS, **{f"moe.{name}": value for name, value in fields.items()}}


_CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "d_model": {"d_model": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 7, "d_ff": 5},
    "untied": {"tied_embeddings": False, "embedding_scale": 3.0},
    "attention_only": {"feed_forward": None},
    "feed_forward_only": {"attention": None},
    "parallel": {"block": "parallel", "skip_multiplier": 0.9, "branch_multiplier": 0.7},
    "parallel_attention_only": {"block": "parallel", "feed_forward": None},
    "parallel_post": {"block": "parallel", "placement": "post"},
    "gqa": {"n_kv_heads": 2, "head_dim": 6},
    "mqa": {"n_kv_heads": 1, "rope_theta": None},
    "rope_fraction": {"rope_fraction": 0.5, "rope_theta": 100.0},
    "qk_norm_head": {"qk_norm": "head", "n_kv_heads": 2},
    "qk_norm_projection": {"qk_norm": "projection", "n_kv_heads": 2, "norm.eps": 0.01},
    "logits": {"logit_scale": 0.7, "logit_softcap": 1.5},
    "full": {"attention.pattern": "full"},
    "full_softcap": {"attention.pattern": "full", "logit_softcap": 2.0},
    "window": {"attention.pattern": "window", "window": 2},
    "window_sink": {"attention.pattern": "window", "window": 2, "n_sink_tokens": 1, "sink_logit": True},
    "window_pattern": {"attention.pattern": "window", "window_pattern": [3, 0]},
    "key_mask_before": {"key_mask_density": 0.5},
    "key_mask_before_full": {"key_mask_density": 0.5, "attention.pattern": "full"},
    "key_mask_after": {"key_mask_density": 0.5, "key_mask_place": "after_softmax", "n_kv_heads": 2},
    "biases": {"qkv_bias": True, "output_bias": True, "feed_forward.bias": True},
    "biases_ungated": {"feed_forward.bias": True, "feed_forward.gated": False, "feed_forward.activation": "gelu"},
    **{f"activation_{name}": {"activation": name} for name in ("relu", "relu2", "gelu", "gelu_tanh", "identity")},
    "moe": _moe(),
    **{f"moe_{name}": _moe(activation=name) for name in ("relu2", "gelu", "gelu_tanh", "identity")},
    "moe_pattern": {"moe": EXPERTS["moe"], "moe_pattern": [False, True]},
    "moe_normalised": _moe(n_experts=5, top_k=3, normalize_gates=True, d_expert=6),
    "moe_sigmoid": _moe(router="sigmoid", normalize_gates=True, router_bias=True, gate_multiplier=2.5),
    "moe_top_k_first": _moe(gate_order="top_k_then_score", router_bias=True),
    "moe_top_k_first_sigmoid": _moe(gate_order="top_k_then_score", router="sigmoid"),
    "moe_shared": _moe(n_shared_experts=2, shared_gate=True, gated=False, activation="relu"),
    "moe_shared_mean": _moe(n_shared_experts=1, shared_mixing="mean"),
    "moe_expert_choice": _moe(routing="expert_choice"),
    "moe_expert_choice_normalised": _moe(routing="expert_choice", normalize_gates=True, top_k=1),
    "moe_expert_choice_top_k_first": _moe(routing="expert_choice", gate_order="top_k_then_score", router_bias=True),
    "moe_peri_lns": {**_moe(), "norm.placement": "peri", "norm.bias": True},
    **{f"placement_{name}": {"placement": name} for name in ("post", "peri", "reordered", "lns")},
    "mix": {"placement": "mix", "post_fraction": 0.5},
    "layer_norm": {"norm.kind": "layer", "norm.bias": True, "norm.eps": 0.1},
    "plain_norm": {"norm.kind": "layer", "norm.gain": False, "norm.final": False},
    **{f"residual_{rule}": {"residual.rule": rule} for rule in ("inverse_sqrt_2L", "inverse_sqrt_L", "inverse_L")},
    "deepnorm": {"residual.rule": "deepnorm", "placement": "post"},
    "init_fixed": {"init.rule": "fixed", "init.std": 0.5, "output_scaling": "inverse_sqrt_2L", "embedding_std": 2.0},
    "init_xavier": {"init.rule": "xavier", "init.gain": 1.5, "init.overrides": [("q", 0.1)]},
    "mask_bernoulli": _masked("bernoulli", "inverse_sqrt"),
    "mask_magnitude": _masked("magnitude", "inverse"),
    "mask_n_of_m": _masked("n_of_m", "none", group=2),
    "mask_block": _masked("block", "none", block_size=3),
    "mask_moe": {**_moe(n_shared_experts=1), **_masked("bernoulli", "inverse")},
}
SPECS: dict[str, ModelSpec] = {name: BASE.with_fields(changes) for name, changes in _CHANGES.items()}
