"""The whole network: embedding, blocks, final norm, unembedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop.nn.attention import Shared
from varprop.nn.block import Block, Observe, Record
from varprop.nn.init import draw_tensors, make_generator
from varprop.nn.norm import norm
from varprop.nn.parameters import NamedParameters
from varprop.spec import ModelSpec


class Transformer(NamedParameters):
    """The network that a spec describes, with weights drawn from `seed`.

    The state dict has exactly the names of `spec.tensor_table()`, plus `<name>_mask` for each masked matrix. Weights
    are the same for every device and type. `layers[i]` is the `Block` of layer i + 1. compute_dtype: of the stream and
    the matrix products; None = that of the parameters.

    >>> from varprop import presets
    >>> model = Transformer(presets.tiny(), seed=1)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 8192])
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.compute_dtype = spec, compute_dtype
        outer = {row.name: row for row in spec.tensor_table() if row.layer is None}
        self.add_tensors(draw_tensors(outer, make_generator(seed, 0)), device, dtype)
        self.final_norm_names = [name for name in outer if name.startswith("final_norm.")]
        layers = range(1, spec.n_layers + 1)
        types: dict[str, Any] = {"device": device, "dtype": dtype, "compute_dtype": compute_dtype}
        self.layers = nn.ModuleList(Block(spec, layer, seed=seed, **types) for layer in layers)

    def forward(self, tokens: Tensor, record: Record | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Logits (B, T, vocab_size) of tokens (B, T).

        record: called with layer 0 and site `resid_post`, then for every layer with the sites of `results.SITES` in
        order. generator: draws key masks, where the spec has them; None = the same ones at every call.
        """
        return self.logits(self.hidden(tokens, record, generator))

    def hidden(
        self,
        tokens: Tensor,
        record: Record | None = None,
        generator: torch.Generator | None = None,
        observe: Observe | None = None,
        shared: Shared | None = None,
    ) -> Tensor:
        """The stream (B, T, D) after the final norm."""
        x = self.embed_tokens(tokens)
        if record is not None:
            record(0, "resid_post", x)
        for block in self.layers:
            x = block(x, record, generator, observe, shared=shared)
        return self.normalise(x)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """The stream (B, T, D) before the first block."""
        x = functional.embedding(tokens, self.get_parameter("embed")) * self.spec.embedding_scale
        return x if self.compute_dtype is None else x.to(self.compute_dtype)

    def normalise(self, x: Tensor) -> Tensor:
        """The stream (B, T, D) as the unembedding reads it."""
        if not self.spec.norm.final:
            return x
        weights = {name: self.get_parameter(name) for name in self.final_norm_names}
        return norm(x, weights, self.spec, "final_norm")

    @property
    def unembedding(self) -> Tensor:
        """The matrix (vocab_size, D) of the unembedding, which may be the embedding."""
        return self.get_parameter("embed" if self.spec.tied_embeddings else "unembed")

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, vocab_size) of the final hidden states (B, T, D)."""
        return hidden @ self.unembedding.to(hidden.dtype).mT
