"""A slow transformer in numpy float64, written with loops over positions, heads and experts and sharing no code with
`varprop.nn`: it reads `ModelSpec` and a state dict, one sequence at a time."""

from __future__ import annotations

import math

import numpy as np

from varprop.spec import MaskSpec, ModelSpec


def forward(spec: ModelSpec, state: dict, tokens: list[int], kept_keys: dict) -> tuple[np.ndarray, dict]:
    """Logits (T, vocab) and the sites {(layer, site): (T, D)}. kept_keys: layer -> (N, T, T) key mask, where used."""
    weights = {name: value for name, value in state.items() if not name.endswith("_mask")}
    for row in spec.tensor_table():
        if row.mask is not None:
            weights[row.name] = weights[row.name] * state[row.name + "_mask"] * factor(row.mask)
    x = np.array([weights["embed"][token] * spec.embedding_scale for token in tokens])
    sites = {(0, "resid_post"): x}
    for layer in range(1, spec.n_layers + 1):
        prefix = f"layers.{layer - 1}."
        own = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        x = block(x, own, spec, layer, kept_keys.get(layer), sites)
    if spec.norm.final:
        x = norm_rows(x, weights, spec, "final_norm")
    table = weights["embed"] if spec.tied_embeddings else weights["unembed"]
    return np.array([table @ row for row in x]), sites


def factor(mask: MaskSpec) -> float:
    if mask.rescale == "inverse_sqrt":
        return 1 / math.sqrt(mask.density)
    return 1 / mask.density if mask.rescale == "inverse" else 1.0


def block(
    x: np.ndarray, weights: dict, spec: ModelSpec, layer: int, kept: np.ndarray | None, sites: dict
) -> np.ndarray:
    n_layers = spec.n_layers
    skip, scale = spec.residual.skip_multiplier, spec.residual.branch_multiplier
    if spec.residual.rule == "deepnorm":
        skip *= (2 * n_layers) ** 0.25
    elif spec.residual.rule == "inverse_sqrt_2L":
        scale /= math.sqrt(2 * n_layers)
    elif spec.residual.rule == "inverse_sqrt_L":
        scale /= math.sqrt(n_layers)
    elif spec.residual.rule == "inverse_L":
        scale /= n_layers
    placement = spec.norm.placement
    if placement == "mix":
        placement = "post" if layer <= round(spec.norm.post_fraction * n_layers) else "pre"

    def branch(stream: np.ndarray, name: str) -> np.ndarray:
        y = stream
        if placement in ("pre", "peri", "lns"):
            y = norm_rows(y, weights, spec, name + "_norm")
        if placement == "lns":
            y = y / math.sqrt(layer)
        if name == "attention":
            y = attention(y, weights, spec, layer, kept)
        elif any(key.startswith("moe.") for key in weights):
            y = mixture(y, weights, spec)
        else:
            y = np.array([feed_forward(row, weights, "mlp", spec.feed_forward) for row in y])
        if placement == "peri":
            y = norm_rows(y, weights, spec, name + "_out_norm")
        if placement == "reordered":
            y = norm_rows(y, weights, spec, name + "_norm")
        return scale * y

    zeros = np.zeros_like(x)
    has_mlp = spec.feed_forward is not None or spec.moe is not None
    if spec.block == "parallel" and spec.attention is not None and has_mlp:
        attn_out, mlp_out = branch(x, "attention"), branch(x, "mlp")
        middle = skip * x + attn_out
        after = skip * x + attn_out + mlp_out
        if placement == "post":
            after = norm_rows(after, weights, spec, "mlp_norm")
    else:
        attn_out = mlp_out = zeros
        middle = x
        if spec.attention is not None:
            attn_out = branch(x, "attention")
            middle = skip * x + attn_out
            if placement == "post":
                middle = norm_rows(middle, weights, spec, "attention_norm")
        after = middle
        if has_mlp:
            mlp_out = branch(middle, "mlp")
            after = skip * middle + mlp_out
            if placement == "post":
                after = norm_rows(after, weights, spec, "mlp_norm")
    names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    for name, value in zip(names, (x, attn_out, middle, mlp_out, after), strict=True):
        sites[layer, name] = value
    return after


def norm_rows(x: np.ndarray, weights: dict, spec: ModelSpec, name: str) -> np.ndarray:
    rows = []
    for row in x:
        centred = row - row.sum() / len(row) if spec.norm.kind == "layer" else row
        y = centred / math.sqrt((centred**2).sum() / len(row) + spec.norm.eps)
        if spec.norm.gain:
            y = y * weights[name + ".gain"]
        if spec.norm.bias:
            y = y + weights[name + ".bias"]
        rows.append(y)
    return np.array(rows)


def attention(x: np.ndarray, weights: dict, spec: ModelSpec, layer: int, kept: np.ndarray | None) -> np.ndarray:
    part = spec.attention
    n_tokens, n_heads, head_dim = len(x), part.n_heads, spec.head_dim
    n_kv_heads = part.n_kv_heads or n_heads
    per_kv_head = n_heads // n_kv_heads
    scale = part.logit_scale if part.logit_scale is not None else 1 / math.sqrt(head_dim)
    window = part.window
    if spec.window_pattern:
        window = spec.window_pattern[(layer - 1) % len(spec.window_pattern)] or None

    def project(t: int, name: str) -> np.ndarray:
        y = weights[f"attention.{name}"] @ x[t]
        return y + weights[f"attention.{name}_bias"] if part.qkv_bias else y

    def rms(y: np.ndarray, name: str) -> np.ndarray:
        return y / math.sqrt((y**2).mean() + spec.norm.eps) * weights[f"attention.{name}_norm.gain"]

    def head(t: int, name: str, index: int) -> np.ndarray:
        y = project(t, name)
        if name != "v" and part.qk_norm == "projection":
            y = rms(y, name)
        y = y[index * head_dim : (index + 1) * head_dim]
        if name != "v" and part.qk_norm == "head":
            y = rms(y, name)
        if name == "v" or part.rope_theta is None:
            return y
        y = y.copy()
        rotated = round(part.rope_fraction * head_dim)
        for i in range(rotated // 2):
            angle = t * part.rope_theta ** (-2 * i / rotated)
            a, b = y[i], y[i + rotated // 2]
            y[i] = a * math.cos(angle) - b * math.sin(angle)
            y[i + rotated // 2] = b * math.cos(angle) + a * math.sin(angle)
        return y

    def sees(query: int, key: int) -> bool:
        if part.pattern == "full":
            return True
        near = window is None or query - key < window or key < part.n_sink_tokens
        return key <= query and near

    out = []
    for i in range(n_tokens):
        heads = []
        for h in range(n_heads):
            kv = h // per_kv_head
            q = head(i, "q", h)
            terms = {}
            for j in range(n_tokens):
                if not sees(i, j):
                    continue
                if kept is not None and part.key_mask_place == "before_softmax" and not kept[h, i, j]:
                    continue
                logit = scale * float(q @ head(j, "k", kv))
                if part.logit_softcap is not None:
                    logit = part.logit_softcap * math.tanh(logit / part.logit_softcap)
                terms[j] = math.exp(logit)
            total = sum(terms.values())
            if part.sink_logit:
                total += math.exp(weights["attention.sink"][h])
            mixed = np.zeros(head_dim)
            for j, term in terms.items():
                if kept is not None and part.key_mask_place == "after_softmax" and not kept[h, i, j]:
                    continue
                mixed += term / total * head(j, "v", kv)
            heads.append(mixed)
        y = weights["attention.o"] @ np.concatenate(heads)
        out.append(y + weights["attention.o_bias"] if part.output_bias else y)
    return np.array(out)


def activation(name: str, z: float) -> float:
    if name == "relu":
        return max(z, 0.0)
    if name == "relu2":
        return max(z, 0.0) ** 2
    if name == "gelu":
        return z * (1 + math.erf(z / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    return z / (1 + math.exp(-z)) if name == "silu" else z


def feed_forward(row: np.ndarray, weights: dict, prefix: str, part, expert: int | None = None) -> np.ndarray:
    def apply(y: np.ndarray, name: str) -> np.ndarray:
        matrix = weights[f"{prefix}.{name}"]
        y = (matrix if expert is None else matrix[expert]) @ y
        return y + weights[f"{prefix}.{name}_bias"] if getattr(part, "bias", False) else y

    up = apply(row, "up")
    phi = [activation(part.activation, z) for z in (apply(row, "gate") if part.gated else up)]
    inner = np.array([a * u for a, u in zip(phi, up, strict=True)]) if part.gated else np.array(phi)
    return apply(inner, "down")


def mixture(x: np.ndarray, weights: dict, spec: ModelSpec) -> np.ndarray:
    part = spec.moe
    n_tokens, n_experts = len(x), part.n_experts
    logits = np.array([weights["moe.router"] @ row for row in x])

    def scores(values: list[float]) -> list[float]:
        if part.router == "sigmoid":
            return [1 / (1 + math.exp(-z)) for z in values]
        return [math.exp(z) / sum(math.exp(y) for y in values) for z in values]

    first = part.gate_order == "score_then_top_k"
    selection = np.array([scores(list(row)) if first else row for row in logits])
    if part.router_bias:
        selection = selection + weights["moe.router_bias"]
    active = [[False] * n_experts for _ in range(n_tokens)]
    if part.routing == "token_choice":
        for t in range(n_tokens):
            for e in sorted(range(n_experts), key=lambda e: -selection[t, e])[: part.top_k]:
                active[t][e] = True
    else:
        capacity = max(1, math.floor(n_tokens * part.top_k / n_experts))
        for e in range(n_experts):
            for t in sorted(range(n_tokens), key=lambda t: -selection[t, e])[:capacity]:
                active[t][e] = True
    out = []
    for t in range(n_tokens):
        chosen = [e for e in range(n_experts) if active[t][e]]
        every = scores(list(logits[t]))
        gates = [every[e] for e in chosen] if first else scores([logits[t, e] for e in chosen])
        if part.normalize_gates:
            gates = [gate / sum(gates) for gate in gates]
        routed = np.zeros(spec.d_model)
        for gate, e in zip(gates, chosen, strict=True):
            routed += part.gate_multiplier * gate * feed_forward(x[t], weights, "moe.experts", part, e)
        if part.n_shared_experts:
            shared = feed_forward(x[t], weights, "moe.shared", part)
            if part.shared_gate:
                shared = shared / (1 + math.exp(-float(weights["moe.shared_gate"][0] @ x[t])))
            mean = part.shared_mixing == "mean"
            routed = (shared + part.top_k * routed) / (part.top_k + 1) if mean else shared + routed
        out.append(routed)
    return np.array(out)
