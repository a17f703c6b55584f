"""A small spec for every family, and specs whose fields are folded into the weights."""

from __future__ import annotations

from typing import Any

import torch

from varprop import presets
from varprop.nn import Transformer
from varprop.spec import ModelSpec

BASE = presets.tiny().with_fields(d_model=32, n_layers=3, d_ff=48, vocab_size=64)
_EXPERTS: dict[str, Any] = {"feed_forward": None, "n_experts": 4, "top_k": 2, "d_expert": 24}
_MIXED: dict[str, Any] = {"n_experts": 4, "top_k": 2, "d_expert": 24, "moe_pattern": (False, True)}
_ALL_BIASES = {"qkv_bias": True, "output_bias": True}

_HELD: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2},
    "llama tied": {"tied_embeddings": True, "norm.eps": 0.01, "rope_theta": 500.0, "activation": "gelu_tanh"},
    "llama biases": {**_ALL_BIASES, "feed_forward.bias": True, "head_dim": 6},
    "mistral": {"n_heads": 3, "head_dim": 6, "activation": "relu2"},
    "mistral window": {"pattern": "window", "window": 4, "n_kv_heads": 1},
    "qwen2": {"qkv_bias": True, "head_dim": 6, "tied_embeddings": True},
    "qwen3": {"qk_norm": "head", "n_kv_heads": 2, "head_dim": 6},
    "olmo2": {"qk_norm": "projection", "placement": "reordered", "n_kv_heads": 2, "head_dim": 6},
    "olmoe": {**_EXPERTS, "qk_norm": "projection", "n_kv_heads": 2, "norm.eps": 0.01},
    "olmoe normalised": {**_EXPERTS, "qk_norm": "projection", "normalize_gates": True, **_ALL_BIASES},
    "mixtral": {**_EXPERTS, "normalize_gates": True, "n_kv_heads": 2, "head_dim": 6, "rope_theta": 300.0},
    "mixtral window": {**_EXPERTS, "normalize_gates": True, "pattern": "window", "window": 3},
    "qwen2_moe": {**_EXPERTS, "n_shared_experts": 2, "shared_gate": True, "qkv_bias": True},
    "qwen2_moe unshared": {**_EXPERTS},
    "qwen2_moe pattern": {**_MIXED, "n_shared_experts": 1, "shared_gate": True, "normalize_gates": True},
    "qwen3_moe": {**_EXPERTS, "qk_norm": "head", "normalize_gates": True, "head_dim": 6, "n_kv_heads": 2},
    "qwen3_moe pattern": {**_MIXED, "qk_norm": "head"},
}
HELD: dict[str, ModelSpec] = {name: BASE.with_fields(changes) for name, changes in _HELD.items()}
"""Specs that a family holds as they are; the first word is its model_type."""

_MULTIPLIED = {"residual.rule": "inverse_sqrt_2L", "branch_multiplier": 3.0, "logit_scale": 0.7}
_FOLDED: dict[str, dict[str, Any]] = {
    "llama masked": {"density": 0.5, "masks.q.rescale": "inverse", "masks.down.kind": "magnitude"},
    "llama multiplied": {**_MULTIPLIED, **_ALL_BIASES, "feed_forward.bias": True, "embedding_scale": 3.0},
    "llama untied": {"embedding_scale": 3.0, "tied_embeddings": True},
    "llama lns": {"placement": "lns", "norm.gain": False},
    "llama pattern": {**_MIXED, "moe_pattern": (False,)},
    "olmo2 multiplied": {**_MULTIPLIED, "qk_norm": "projection", "placement": "reordered", "norm.gain": False},
    "mixtral masked": {**_EXPERTS, "gate_order": "top_k_then_score", "density": 0.5, "masks.router.density": 0.5},
    "mixtral pattern": {**_MIXED, "moe_pattern": (True, True), "normalize_gates": True, "gate_multiplier": 2.5},
    "qwen2_moe mean": {**_EXPERTS, "n_shared_experts": 1, "shared_mixing": "mean", **_MULTIPLIED},
    "qwen2_moe lns": {**_MIXED, "n_shared_experts": 2, "placement": "lns", "shared_gate": True},
}
FOLDED: dict[str, ModelSpec] = {name: BASE.with_fields(changes) for name, changes in _FOLDED.items()}
"""Specs that a family holds once fields are folded."""


def network(spec: ModelSpec, seed: int = 1) -> Transformer:
    """A network whose biases and gains are random, too."""
    model = Transformer(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


def tokens(spec: ModelSpec, seed: int = 2) -> torch.Tensor:
    """Ids (3, 17)."""
    return torch.randint(spec.vocab_size, (3, 17), generator=torch.Generator().manual_seed(seed))
