"""The plain compiled loop that `train_speed` compares with: what one writes in an hour and tunes in another.

Separate products for q, k, v, gate and up, weights cast to bfloat16 where they are used, torch's attention (which takes
cuDNN's kernel here), one compiled function per block, logits in float32, fused AdamW. No statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop.spec import ModelSpec


class PlainBlock(nn.Module):
    """A Llama block."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        super().__init__()
        assert spec.feed_forward is not None
        d_model, d_ff = spec.d_model, spec.feed_forward.d_ff
        self.head_dim = spec.head_dim
        shapes = {**dict.fromkeys("qkvo", (d_model, d_model)), "gate": (d_ff, d_model), "up": (d_ff, d_model)}
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(n_out, n_in, device=device) * n_in**-0.5)
                for name, (n_out, n_in) in {**shapes, "down": (d_model, d_ff)}.items()
            }
        )
        self.norms = nn.ParameterList(torch.ones(d_model, device=device) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kind = x.dtype
        w = {name: weight.to(kind).t() for name, weight in self.weights.items()}
        h = functional.rms_norm(x, x.shape[-1:], self.norms[0].to(kind), 1e-5)
        q, k, v = ((h @ w[name]).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for name in "qkv")
        y = functional.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(-2) @ w["o"]
        h = functional.rms_norm(x, x.shape[-1:], self.norms[1].to(kind), 1e-5)
        return x + (functional.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def _rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = y.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class PlainLoop(nn.Module):
    """The model with its loss; `step` makes one update."""

    def __init__(
        self, spec: ModelSpec, n_tokens: int, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.embedding = nn.Parameter(torch.randn(spec.vocab_size, spec.d_model, device=device))
        self.head = nn.Parameter(torch.randn(spec.vocab_size, spec.d_model, device=device) * spec.d_model**-0.5)
        self.norm = nn.Parameter(torch.ones(spec.d_model, device=device))
        self.blocks = nn.ModuleList(PlainBlock(spec, device) for _ in range(spec.n_layers))
        if compiled:
            for block in self.blocks:
                block.compile(dynamic=False)
        half = spec.head_dim // 2
        angles = torch.arange(n_tokens, device=device)[:, None] * 1e4 ** (-torch.arange(half, device=device) / half)
        self.turns = angles.cos().to(dtype), angles.sin().to(dtype)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = functional.embedding(tokens, self.embedding).to(self.dtype)
        for block in self.blocks:
            x = block(x, *self.turns)
        x = functional.rms_norm(x, x.shape[-1:], self.norm.to(self.dtype), 1e-5)
        return functional.cross_entropy((x @ self.head.to(self.dtype).t()).float().flatten(0, 1), targets.flatten())

    def step(self, tokens: Tensor) -> None:
        """One update on tokens (B, T + 1)."""
        self.optimizer.zero_grad(set_to_none=True)
        self(tokens[:, :-1], tokens[:, 1:]).backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
