"""The position-resolved recursion: the whole token Gram matrix, for causal, windowed and rotary attention.

Attention either by the deterministic closure (`causal.closed_attention`) or by heads drawn from their exact law given
the Gram matrix (`attention.sampled_attention`), in independent recursions whose spread gives the standard error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from varprop.spec import ModelSpec, layer_table
from varprop.theory.attention import sampled_attention
from varprop.theory.block import Frame, block
from varprop.theory.causal import closed_attention, closure_error
from varprop.theory.feed_forward import feed_forward_gram
from varprop.theory.moe import moe_gram
from varprop.theory.moments import Moments
from varprop.theory.norm import norm_gram

HEAD_BUDGET = 12_288
"""Heads drawn per layer, over all recursions, times n_tokens; between 8 and 512 heads."""
EVERY_LAYER = 256
"""Positions up to which the error of the closure is evaluated at every layer."""
MAX_HEADS = 8
"""Heads per recursion: as many as the layer has, but not more than this."""


@dataclass
class GramRecursion:
    """The layers of a spec, one after the other; iterating gives the Gram matrices (n_recursions, T, T) of five sites.

    start: (T, T) Gram matrix of the embeddings. seed: None for the closure, else that of the drawn heads.
    documents: (T,) integers, tokens see keys of their own document only; None = one document.
    """

    spec: ModelSpec
    start: np.ndarray
    seed: int | None
    documents: np.ndarray | None = None

    def __post_init__(self) -> None:
        n_tokens, spec = len(self.start), self.spec
        self.n_recursions, self.n_heads = 1, 1
        self.attention_error = np.zeros((spec.n_layers, 2))  # of the closure: total, irregular
        if self.seed is not None:
            total = int(np.clip(HEAD_BUDGET // n_tokens, 8, 512))
            self.n_recursions = max(8, total // min(spec.n_heads, MAX_HEADS))
            self.n_heads = max(1, min(spec.n_heads, MAX_HEADS, total // self.n_recursions))

    def __iter__(self):
        """Yield the five states of layers 1, 2, ..., n_layers."""
        frame = Frame(self.spec, self.spec.skip_scale, self.spec.branch_scale)
        state = np.broadcast_to(self.start, (self.n_recursions, *self.start.shape))
        for layer in range(1, self.spec.n_layers + 1):
            sites = block(state, layer, frame, self)
            yield sites
            state = sites[-1]

    def normalised(self, state: np.ndarray) -> np.ndarray:
        return norm_gram(state, self.spec.norm.kind, self.spec.norm.eps, self.spec.d_model)

    def attention(self, state: np.ndarray, layer: int) -> np.ndarray:
        tokens = Moments(state, state.shape[-1])
        if self.seed is None:
            if (
                layer & (layer - 1) == 0 or state.shape[-1] <= EVERY_LAYER
            ):  # 1, 2, 4, ...: it moves slowly, but costs T^3
                self.attention_error[layer - 1 :] = closure_error(self.spec, layer, tokens, self.documents)
            return closed_attention(self.spec, layer, tokens, self.documents)
        rng = np.random.default_rng([self.seed, layer])
        return sampled_attention(self.spec, layer, tokens, self.n_heads, rng, documents=self.documents)

    def feed_forward(self, state: np.ndarray, layer: int) -> np.ndarray:
        spec, rows = self.spec, layer_table(self.spec, layer)
        if spec.is_moe(layer):
            assert spec.moe is not None
            return moe_gram(state, rows, spec.moe, spec.d_model)
        part = spec.feed_forward
        assert part is not None
        matrices = {name.removeprefix("mlp."): row for name, row in rows.items() if name.startswith("mlp.")}
        return feed_forward_gram(state, matrices, part.activation, part.gated, spec.d_model)
