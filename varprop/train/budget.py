"""How long a run is: training FLOP of a token, updates of a budget, and the share of a device's peak that is used."""

from __future__ import annotations

import math

from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec
from varprop.train.config import BUDGETS, TrainConfig

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}
"""Dense bfloat16 FLOP/s by a part of the device's name, the first that matches (NVIDIA's data sheets, no sparsity)."""


def flops_per_token(spec: ModelSpec, n_tokens: int) -> float:
    """Training FLOP per token: 6 per active weight of a matrix product, 12 n_heads head_dim K_l per layer's attention.

    6 is 2 for the forward and 4 for the backward pass. Matrix products: every tensor with two or more dimensions, the
    unembedding included (also where it is the embedding's table), the embedding's look-up not; of the experts, the
    share that acts on a token. K_l, the keys that a query sees in the mean over positions: T for full attention;
    (T^2 - (T - w)^2) / 2T for a causal window of w < T keys, sinks included; T / 2 for causal attention, so
    6 L n_heads head_dim T in all.
    Zeros of weight masks and key masks are counted: the kernels do not skip them. Norms, activations, the softmax, the
    optimiser and what activation checkpointing computes again are not counted.

    >>> from varprop import presets
    >>> flops_per_token(presets.d512(), 1024)  # 6 * (12 * 3407872 + 4194304) + 6 * 12 * 512 * 1024
    308281344.0
    """
    rows = [row for row in spec.tensor_table() if len(row.shape) >= 2 and row.matrix != "embed"]
    unembedding = spec.vocab_size * spec.d_model if spec.tied_embeddings else 0
    return 6.0 * (sum(row.n_active for row in rows) + unembedding) + attention_flops_per_token(spec, n_tokens)


def attention_flops_per_token(spec: ModelSpec, n_tokens: int) -> float:
    """The part of `flops_per_token` that is no matrix product with weights: 12 n_heads head_dim sum_l K_l."""
    if spec.attention is None:
        return 0.0
    keys = sum(_mean_keys(spec, layer, n_tokens) for layer in range(1, spec.n_layers + 1))
    return 12.0 * spec.n_heads * spec.head_dim * keys


def _mean_keys(spec: ModelSpec, layer: int, n_tokens: int) -> float:
    """Keys that a query sees in the mean over positions, without the half key by which the diagonal exceeds T / 2."""
    part = spec._attention()
    if part.pattern == "full":
        return float(n_tokens)
    window = spec.window(layer)
    unseen = 0 if window is None else max(0, n_tokens - window - part.n_sink_tokens)
    return (n_tokens**2 - unseen**2) / (2 * n_tokens)


def n_steps(config: TrainConfig, spec: ModelSpec) -> int:
    """Updates of the budget that `config` gives, rounded up to whole ones, at least 1.

    total_tokens: ceil(total_tokens / tokens_per_step). total_flops: ceil(total_flops / (flops_per_token
    tokens_per_step)), a quotient within 1e-12 of a whole number being that number. Raises `ArgumentError` where
    warmup_steps is larger, and beyond 2^63 updates.

    >>> from varprop import presets
    >>> n_steps(TrainConfig(total_tokens=5_000_000_000, batch_size=256, n_tokens=1024), presets.paper_dense_1b())
    19074
    """
    if config.n_steps is not None:
        return config.n_steps
    if config.total_tokens is not None:
        steps = -(-config.total_tokens // config.tokens_per_step)
    else:
        assert config.total_flops is not None
        quotient = config.total_flops / (flops_per_token(spec, config.n_tokens) * config.tokens_per_step)
        steps = max(1, math.ceil(quotient * (1 - 1e-12)))
    budget = next(name for name in BUDGETS if getattr(config, name) is not None)
    possible = steps < 2**63
    require(possible, ArgumentError, budget, getattr(config, budget), "too large", "fewer than 2^63 updates")
    good = config.warmup_steps <= steps
    domain = f"at most the {steps} updates of {budget}={getattr(config, budget)}"
    require(good, ArgumentError, "warmup_steps", config.warmup_steps, "too large", domain)
    return steps


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name, None where it is not in `PEAK_FLOPS`.

    >>> peak_flops("NVIDIA H200"), peak_flops("cpu")
    (989000000000000.0, None)
    """
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def mfu(spec: ModelSpec, n_tokens: int, tokens_per_s: float, device_name: str, n_devices: int = 1) -> float | None:
    """Model FLOP utilisation: `flops_per_token` tokens_per_s / (n_devices peak), None for a device of unknown peak.

    n_tokens: sequence length. tokens_per_s: of all devices together. device_name: as torch.cuda.get_device_name gives.

    >>> from varprop import presets
    >>> round(mfu(presets.paper_dense_1b(), 1024, 82_000, "NVIDIA H200"), 3)
    0.602
    """
    peak = peak_flops(device_name)
    return None if peak is None else flops_per_token(spec, n_tokens) * tokens_per_s / (n_devices * peak)
