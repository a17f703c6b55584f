"""What all layers of a pass share: rotary angles, and who may see whom where that is not plain causal attention.

On a GPU a mask is a `BlockMask` of FlexAttention, which skips the blocks that nobody sees (torch waits for the device
where it makes one: of documents once in every pass); on a CPU, and for what
FlexAttention does not do (sink logits, key masks), a matrix of booleans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from varprop.nn.attention import Shared, allowed_keys, rotation
from varprop.spec import ModelSpec


class AttentionMasks:
    """Makes the `Shared` of a forward pass; what does not depend on the documents is made once for each length."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._windows: dict[tuple[int, torch.device], dict[int, Tensor | BlockMask]] = {}

    def shared(self, n_tokens: int, device: torch.device, documents: Tensor | None = None) -> Shared:
        """Rotary angles and masks for (B, T) tokens. documents: (B, T), the document of each token, or None."""
        spec = self._spec
        part = spec.attention
        if part is None:
            return Shared()
        turns = None if part.rope_theta is None else rotation(spec, n_tokens, device)
        if documents is not None:
            return Shared(turns, self._masks(n_tokens, device, documents))
        if part.pattern != "window":
            return Shared(turns)
        if (n_tokens, device) not in self._windows:
            self._windows[n_tokens, device] = self._masks(n_tokens, device, None)
        return Shared(turns, self._windows[n_tokens, device])

    def _masks(self, n_tokens: int, device: torch.device, documents: Tensor | None) -> dict[int, Tensor | BlockMask]:
        part = self._spec._attention()
        explicit = device.type != "cuda" or part.sink_logit or part.key_mask_density < 1
        make = self._booleans if explicit else self._blocks
        first = {self._spec.window(layer) or 0: layer for layer in range(self._spec.n_layers, 0, -1)}
        return {window: make(layer, n_tokens, device, documents) for window, layer in first.items()}

    def _booleans(self, layer: int, n_tokens: int, device: torch.device, documents: Tensor | None) -> Tensor:
        allowed = allowed_keys(self._spec, layer, n_tokens, device)
        if allowed is None:
            allowed = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=device)
        if documents is None:
            return allowed
        return allowed & (documents[:, None, :, None] == documents[:, None, None, :])

    def _blocks(self, layer: int, n_tokens: int, device: torch.device, documents: Tensor | None) -> BlockMask:
        part, window = self._spec._attention(), self._spec.window(layer)

        def seen(b: Any, h: Any, query: Any, key: Any) -> Any:
            allowed = query >= key if part.pattern != "full" else query >= 0
            if window is not None:
                allowed = allowed & ((query - key < window) | (key < part.n_sink_tokens))
            return allowed if documents is None else allowed & (documents[b, query] == documents[b, key])

        n_sequences = None if documents is None else len(documents)
        return create_block_mask(seen, n_sequences, None, n_tokens, n_tokens, device=device)  # type: ignore[arg-type]
