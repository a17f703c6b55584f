"""Stand-in until the deterministic overlap of the mixture part arrives."""

from __future__ import annotations

import functools

import numpy as np

from varprop.spec import MoESpec
from varprop.theory.moe import gate_overlap as _drawn


@functools.lru_cache
def _cached(n_experts, top_k, std, c, normalize, router, gate_order):
    part = MoESpec(
        n_experts=n_experts, top_k=top_k, d_expert=1, normalize_gates=normalize, router=router, gate_order=gate_order
    )
    root = np.array([[[1.0, 0.0], [c, np.sqrt(max(1 - c * c, 0))]]])
    return _drawn(np.repeat(root, 64, 0), std, part, 128, np.random.default_rng(0))[:, 0, 1].mean()


def gate_overlap(
    n_experts, top_k, logit_std, correlation, *, normalize, router="softmax", gate_order="score_then_top_k"
):
    return _cached(n_experts, top_k, float(logit_std), float(correlation), normalize, router, gate_order)
