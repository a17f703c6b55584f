"""Two passes over memory that the compiler does not find, for matrices whose outputs lie side by side (GPU, bfloat16).

One product for queries and keys, and one for gate and up, save reads of their common input and, in the backward pass,
the sum of its gradients. What follows must then read and write the packed tensor in one pass: compiled from plain
torch, the gradient of a split is a concatenation that reads every operand once per part (1.9 times the time). These
kernels read and write each number once, and hand attention the contiguous heads that its fastest kernels ask for;
values need no turning, so a product of their own leaves them as attention wants them.

Shape suffixes: `B` sequences, `T` tokens, `N` query heads, `G` key/value heads, `H` head_dim, `F` d_ff; of a program:
`R` rows and `C` columns of its tile, `HALF` of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:  # a build of torch without an accelerator
    triton: Any = None

TILE = 1024
"""Outputs of one program: eight a thread, 16 bytes of bfloat16."""


def serves(x: Tensor, weight: Any) -> bool:
    """Whether these kernels serve x with a weight (..., out, in): bfloat16 on a GPU, shared by the sequences."""
    plain = isinstance(weight, Tensor) and weight.dim() == 2
    return plain and serves_width(x, weight.shape[0])


def serves_width(x: Tensor, width: int) -> bool:
    """Whether these kernels serve outputs of this width in the type and on the device of x."""
    return triton is not None and x.is_cuda and x.dtype == torch.bfloat16 and width % 16 == 0


def _tile(width: int) -> tuple[int, int]:
    """Rows and columns of a tile of a row-major table: columns divide `width` and are a power of two."""
    columns = min(width & -width, TILE)
    return max(1, TILE // columns), columns


if triton is not None:

    @triton.jit
    def _swiglu_kernel(
        packed, scale, out, n_rows, F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr
    ):  # fmt: skip
        rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
        columns = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
        inside = rows < n_rows
        gate = tl.load(packed + rows * (2 * F) + columns, mask=inside).to(tl.float32)
        up = tl.load(packed + rows * (2 * F) + F + columns, mask=inside).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up
        if SCALED:
            value *= tl.load(scale + rows, mask=inside)
        tl.store(out + rows * F + columns, value, mask=inside)

    @triton.jit
    def _swiglu_backward_kernel(
        packed, scale, of_out, of_packed, of_scale, n_rows,
        F: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr,
    ):  # fmt: skip
        rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
        columns = (tl.program_id(1) * C + tl.arange(0, C))[None, :]
        inside = rows < n_rows
        at = rows * (2 * F) + columns
        gate = tl.load(packed + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(packed + at + F, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(of_out + rows * F + columns, mask=inside, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        silu = gate * open_
        if SCALED:  # the gradient of the scale, from this tile's columns
            part = tl.sum(gradient * silu * up, axis=1)[:, None]
            tl.store(of_scale + rows * (F // C) + tl.program_id(1), part, mask=inside)
            gradient *= tl.load(scale + rows, mask=inside, other=0.0)
        tl.store(of_packed + at, gradient * up * (open_ + silu * (1 - open_)), mask=inside)
        tl.store(of_packed + at + F, gradient * silu, mask=inside)

    @triton.jit
    def _rotate_kernel(
        packed, q, k, cos, sin, n_rows, n_tokens,
        N: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
    ):  # fmt: skip
        """One head of R tokens: packed to q, k and turned (SPLIT), or q, k to packed and turned back."""
        rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
        head = tl.program_id(1)
        i = tl.arange(0, HALF)[None, :]
        inside = rows < n_rows
        at = (rows * (N + G) + head) * (2 * HALF) + i
        if head < N:
            own = q
            own_at = (rows * N + head) * (2 * HALF) + i
        else:
            own = k
            own_at = (rows * G + head - N) * (2 * HALF) + i
        if SPLIT:
            first = tl.load(packed + at, mask=inside).to(tl.float32)
            second = tl.load(packed + at + HALF, mask=inside).to(tl.float32)
        else:
            first = tl.load(own + own_at, mask=inside).to(tl.float32)
            second = tl.load(own + own_at + HALF, mask=inside).to(tl.float32)
        c = tl.load(cos + (rows % n_tokens) * HALF + i, mask=inside)
        s = tl.load(sin + (rows % n_tokens) * HALF + i, mask=inside)
        if not SPLIT:  # the inverse turn is the transpose
            s = -s
        if SPLIT:
            tl.store(own + own_at, first * c - second * s, mask=inside)
            tl.store(own + own_at + HALF, second * c + first * s, mask=inside)
        else:
            tl.store(packed + at, first * c - second * s, mask=inside)
            tl.store(packed + at + HALF, second * c + first * s, mask=inside)

    @torch.library.triton_op("varprop::swiglu", mutates_args=())
    def swiglu(packed: Tensor, scale: Tensor | None = None) -> Tensor:
        """silu(gate) * up of packed = gate | up (..., 2 F), computed in float32: (..., F).

        scale: one more factor for each row (...), float32: the gates of a mixture.
        """
        width = packed.shape[-1] // 2
        out = packed.new_empty(*packed.shape[:-1], width)
        n_rows, (rows, columns) = out.numel() // width, _tile(width)
        grid = (triton.cdiv(n_rows, rows), width // columns)
        torch.library.wrap_triton(_swiglu_kernel)[grid](
            packed, packed if scale is None else scale, out, n_rows, width, rows, columns, scale is not None
        )
        return out

    @torch.library.triton_op("varprop::swiglu_backward", mutates_args=())
    def swiglu_backward(of_out: Tensor, packed: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gradients of `packed` and of `scale` (empty without one) from that of `swiglu(packed, scale)`."""
        width = of_out.shape[-1]
        of_packed = torch.empty_like(packed)
        n_rows, (rows, columns) = of_out.numel() // width, _tile(width)
        parts = packed.new_empty(n_rows if scale is not None else 0, width // columns, dtype=torch.float32)
        grid = (triton.cdiv(n_rows, rows), width // columns)
        torch.library.wrap_triton(_swiglu_backward_kernel)[grid](
            packed, packed if scale is None else scale, of_out.contiguous(), of_packed, parts, n_rows,
            width, rows, columns, scale is not None,
        )  # fmt: skip
        return of_packed, parts.sum(dim=-1)

    @torch.library.triton_op("varprop::split_and_rotate", mutates_args=())
    def split_and_rotate(packed: Tensor, cos: Tensor, sin: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
        """Rotated queries (B, T, N, H) and keys (B, T, G, H) of packed = queries | keys (B, T, (N + G) H).

        cos, sin: (T, H / 2), float32. The rotation of `varprop.nn.attention.rotate`, in float32.
        """
        head_dim = 2 * cos.shape[-1]
        q = packed.new_empty(*packed.shape[:-1], n_heads, head_dim)
        k = packed.new_empty(*packed.shape[:-1], packed.shape[-1] // head_dim - n_heads, head_dim)
        _rotate(packed, q, k, cos, sin, True)
        return q, k

    @torch.library.triton_op("varprop::join_and_rotate_back", mutates_args=())
    def join_and_rotate_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The inverse of `split_and_rotate`, which is its transpose: from gradients of q and k that of `packed`."""
        packed = q.new_empty(*q.shape[:-2], (q.shape[-2] + k.shape[-2]) * q.shape[-1])
        _rotate(packed, q.contiguous(), k.contiguous(), cos, sin, False)
        return packed

    def _rotate(packed: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, split: bool) -> None:
        n_heads, n_kv_heads, half = q.shape[-2], k.shape[-2], cos.shape[-1]
        n_rows = packed.numel() // packed.shape[-1]
        rows = max(1, TILE // half)
        grid = (triton.cdiv(n_rows, rows), n_heads + n_kv_heads)
        torch.library.wrap_triton(_rotate_kernel)[grid](
            packed, q, k, cos, sin, n_rows, packed.shape[-2], n_heads, n_kv_heads, half, rows, split
        )

    def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _swiglu_gradient(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor | None]:
        packed, scale = ctx.saved_tensors
        of_packed, of_scale = swiglu_backward(of_out, packed, scale)
        return of_packed, None if scale is None else of_scale.view_as(scale)

    def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1], inputs[2])

    def _rotate_gradient(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor, None, None, None]:
        return join_and_rotate_back(q, k, *ctx.saved_tensors), None, None, None

    swiglu.register_autograd(_swiglu_gradient, setup_context=_swiglu_setup)
    split_and_rotate.register_autograd(_rotate_gradient, setup_context=_rotate_setup)
