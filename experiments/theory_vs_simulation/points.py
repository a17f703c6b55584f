"""The points of the grid: a model, its tokens and the depths at which it is read.

Every model has d_model 256 and 8 heads of 32; grouped queries share 2 key/value heads, multi-query attention has 1. The
feed-forward is gated SiLU: 512 wide, or experts of 128 active units in all. Masks are Bernoulli on every matrix but the
router, without rescaling.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec, MoESpec, WeightMasks

Point = dict[str, Any]
"""group, the factors, n_layers, n_tokens, token_correlation: plain and ordered, so that its JSON is its identity."""

DEPTHS = (1, 4, 16, 64, 128)
FACTORS: dict[str, tuple[Any, ...]] = {
    "heads": ("mha", "gqa", "mqa"),
    "density": (1.0, 0.5, 0.25, 0.1),
    "mixture": ("dense", "8/2", "8/2 normalised", "64/8", "64/8 normalised"),
    "placement": ("pre", "post", "peri", "reordered", "mix", "lns"),
}
"""Levels of each factor, the usual one first."""
LONG = 1024
"""Tokens whose attention is full and without positions, so that they are exchangeable: others cost minutes to predict.
"""
LONG_LAYERS, LONG_CAUSAL_LAYERS = 16, 4
SMALL = {"d_model": 32, "n_heads": 4, "d_ff": 48, "active_experts": 16}
SIZES = {"d_model": 256, "n_heads": 8, "d_ff": 512, "active_experts": 128}


def _mixture(**options: Any) -> dict[str, Any]:
    return {"feed_forward": None, "moe": MoESpec(n_experts=8, top_k=2, d_expert=64, **options)}


COMPONENTS: dict[str, dict[str, Any]] = {
    "attention alone": {"feed_forward": None},
    **{
        f"feed-forward alone: {'gated ' if gated else ''}{activation}": {
            "attention": None,
            "activation": activation,
            "gated": gated,
        }
        for activation in ("relu", "relu2", "gelu", "gelu_tanh", "silu", "identity")
        for gated in (False, True)
    },
    "layer norm": {"norm.kind": "layer"},
    "norm eps 0.1": {"norm.eps": 0.1},
    "residual 1/sqrt(2L)": {"residual.rule": "inverse_sqrt_2L"},
    "residual 1/sqrt(L)": {"residual.rule": "inverse_sqrt_L"},
    "residual 1/L": {"residual.rule": "inverse_L"},
    "deepnorm": {"residual.rule": "deepnorm", "norm.placement": "post"},
    "output scaling 1/sqrt(2L)": {"init.output_scaling": "inverse_sqrt_2L"},
    "branch multiplier 2, skip 0.9": {"branch_multiplier": 2.0, "skip_multiplier": 0.9},
    "QK norm of heads": {"qk_norm": "head"},
    "QK norm of the projection": {"qk_norm": "projection"},
    "logit soft cap 20": {"logit_softcap": 20.0},
    "sink logit": {"sink_logit": True},
    "large logits": {"logit_scale": 0.5},
    "window 4": {"pattern": "window", "window": 4},
    "window 4, 2 sink tokens": {"pattern": "window", "window": 4, "n_sink_tokens": 2},
    "windows 4 and all in turn": {"pattern": "window", "window_pattern": [4, 0]},
    "full, rotary": {"pattern": "full"},
    "causal, no positions": {"rope_theta": None},
    "half rotary": {"rope_fraction": 0.5},
    "key mask before the softmax": {"key_mask_density": 0.5},
    "key mask after the softmax": {"key_mask_density": 0.5, "key_mask_place": "after_softmax"},
    "parallel block": {"block": "parallel"},
    "Xavier": {"init.rule": "xavier", "n_kv_heads": 2},
    "fixed std 0.05": {"init.rule": "fixed", "init.std": 0.05},
    "token correlation 0.5": {"token_correlation": 0.5},
    "masks rescaled": {"masks": WeightMasks.uniform(0.25, rescale="inverse_sqrt")},
    "masks by magnitude": {"masks": WeightMasks.uniform(0.5, "magnitude")},
    "masks 2 of 4": {"masks": WeightMasks.uniform(0.5, "n_of_m")},
    "masks by block of 4": {"masks": WeightMasks.uniform(0.5, "block", block_size=4)},
    "sigmoid router": _mixture(router="sigmoid"),
    "top k, then score": _mixture(gate_order="top_k_then_score"),
    "shared expert, sum": _mixture(n_shared_experts=1),
    "shared expert, mean": _mixture(n_shared_experts=1, shared_mixing="mean"),
    "shared expert, gated": _mixture(n_shared_experts=1, shared_gate=True),
    "expert choice": _mixture(routing="expert_choice"),
    "mixture in every second layer": {"moe": _mixture()["moe"], "moe_pattern": [True, False]},
}
"""Parts of a model, each alone or alone changed: changes to the usual point, at 16 tokens and 16 layers."""
DEPTH_RULES = ("residual.rule", "init.output_scaling")
"""Changes that make a block depend on n_layers."""


def points(smoke: bool = False) -> list[Point]:
    """Every point, main effects first: a deadline then leaves out the highest interactions of factors."""
    if smoke:
        some = [("mha", 1.0, "dense", "pre"), ("gqa", 0.5, "8/2", "pre"), ("mqa", 1.0, "dense", "mix")]
        found = [_grid_point(dict(zip(FACTORS, levels, strict=True)), 8, 4) for levels in some]
        return [{**point, "small": True} for point in [*found, _component_point("sink logit", 4)]]
    components = [
        _component_point(name, n_layers)
        for name, changes in COMPONENTS.items()
        for n_layers in ((1, 16) if any(rule in changes for rule in DEPTH_RULES) else (16,))
    ]
    grid = []
    for levels in itertools.product(*FACTORS.values()):
        factors = dict(zip(FACTORS, levels, strict=True))
        for n_tokens in (16, 128, LONG):
            deepest = _deepest(factors, n_tokens)
            own = [depth for depth in DEPTHS if depth <= deepest] if factors["placement"] == "mix" else [deepest]
            grid += [_grid_point(factors, n_tokens, n_layers) for n_layers in own]
        if interaction_order(factors) <= 1:
            if factors["placement"] != "reordered":
                grid.append(_grid_point(factors, LONG, LONG_CAUSAL_LAYERS, pattern="causal"))
            grid += [_grid_point(factors, n_tokens, DEPTHS[-1], pattern="full") for n_tokens in (16, 128)]
    return components + sorted(grid, key=interaction_order)


def _deepest(factors: Mapping[str, Any], n_tokens: int) -> int:
    """What one machine can simulate and predict in minutes.

    At LONG tokens all pairs of factors have all depths, more of them 16 layers. Where attention reads the stream as it
    is (`reordered`) its logits grow with depth, and `predict` draws heads: one layer at LONG tokens, 16 at 128.
    """
    order = interaction_order(factors)
    if factors["placement"] == "reordered" and n_tokens > 16:
        return 1 if n_tokens == LONG else LONG_LAYERS if order > 1 else DEPTHS[-1]
    return LONG_LAYERS if n_tokens == LONG and order > 2 else DEPTHS[-1]


def interaction_order(factors: Mapping[str, Any]) -> int:
    """Number of factors at another than their usual level."""
    return sum(factors[name] != levels[0] for name, levels in FACTORS.items())


def _grid_point(factors: Mapping[str, Any], n_tokens: int, n_layers: int, pattern: str | None = None) -> Point:
    pattern = pattern or ("full" if n_tokens == LONG else "causal")
    return {"group": "grid", **factors, "pattern": pattern, "n_tokens": n_tokens, "n_layers": n_layers}


def _component_point(name: str, n_layers: int) -> Point:
    return {"group": "component", "component": name, "n_tokens": 16, "n_layers": n_layers}


def point_id(point: Point) -> str:
    """First 12 hexadecimal digits of the SHA-256 of the model, its tokens and the layers read."""
    content = {"spec": make_spec(point).to_json(), **run_arguments(point), "layers": layers_read(point)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def label(point: Point) -> str:
    """One line for a table."""
    names = [point["component"]] if "component" in point else [str(point[name]) for name in FACTORS]
    return " ".join([*names, point.get("pattern", ""), f"T={point['n_tokens']} L={point['n_layers']}"])


def layers_read(point: Point) -> list[int]:
    """Layers compared: all depths up to n_layers where blocks do not depend on n_layers, else the last one."""
    n_layers = point["n_layers"]
    changes = COMPONENTS.get(point.get("component", ""), {})
    if point.get("placement") == "mix" or any(rule in changes for rule in DEPTH_RULES):
        return [n_layers]
    return [depth for depth in DEPTHS if depth <= n_layers]


def run_arguments(point: Point) -> dict[str, Any]:
    """Arguments of `sample` and `predict` besides the spec."""
    correlation = COMPONENTS.get(point.get("component", ""), {}).get("token_correlation", 0.0)
    return {"n_tokens": point["n_tokens"], "token_correlation": correlation}


def make_spec(point: Point) -> ModelSpec:
    """The model of a point."""
    return _spec(json.dumps(point, sort_keys=True))


@functools.lru_cache(maxsize=4096)
def _spec(canonical: str) -> ModelSpec:
    point = json.loads(canonical)
    sizes = SMALL if point.get("small") else SIZES
    base = ModelSpec(
        d_model=sizes["d_model"],
        n_layers=point["n_layers"],
        attention=AttentionSpec(n_heads=sizes["n_heads"]),
        feed_forward=FeedForwardSpec(d_ff=sizes["d_ff"]),
    )
    if "component" in point:
        changes = COMPONENTS[point["component"]]
        return base.with_fields({name: value for name, value in changes.items() if name != "token_correlation"})
    kv_heads = {"mha": sizes["n_heads"], "gqa": sizes["n_heads"] // 4, "mqa": 1}
    changes: dict[str, Any] = {"n_kv_heads": kv_heads[point["heads"]], "norm.placement": point["placement"]}
    if point["pattern"] == "full":
        changes |= {"pattern": "full", "rope_theta": None}
    if point["mixture"] != "dense":
        n_experts, top_k = map(int, point["mixture"].split()[0].split("/"))
        normalised = point["mixture"].endswith("normalised")
        width = sizes["active_experts"] // top_k
        experts = MoESpec(n_experts=n_experts, top_k=top_k, d_expert=width, normalize_gates=normalised)
        changes |= {"feed_forward": None, "moe": experts}
    return base.with_fields(changes).with_fields(density=point["density"])
