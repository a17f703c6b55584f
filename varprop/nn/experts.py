"""The experts of a mixture on their own tokens: assignments sorted by expert, then products of one matrix per expert.

Gather, products and gather back: where tokens choose, no atomic additions, so that the result does not depend on the
order of threads. In bfloat16 all shapes are static and nothing waits for the device.

Shape suffixes: `n` tokens of all sequences, `D` d_model, `E` experts, `K` active experts of a token, `R` assignments
(token, expert) in all, R = n K where tokens choose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from varprop.nn import kernels
from varprop.nn.activation import ACTIVATIONS
from varprop.nn.linear import Weights

_grouped_mm = getattr(functional, "grouped_mm", None) or torch._grouped_mm  # pyright: ignore[reportPrivateImportUsage]
ALIGNMENT = 8
"""Rows in bfloat16 start at multiples of 16 bytes, or the grouped kernel refuses them."""


class Assignments(NamedTuple):
    """Pairs of a token and an expert that acts on it, sorted by expert.

    token, gate: (R,), the row of x and the gate in float32 or better. ends: (E,) int32, one past the last pair of each
    expert. places: (n, K), where the pairs of a token stand; None where tokens have different numbers of experts.
    """

    token: Tensor
    gate: Tensor
    ends: Tensor
    places: Tensor | None


def assign_tokens(chosen: Tensor, gates: Tensor, n_experts: int) -> Assignments:
    """The assignments where token t takes the experts chosen[t], with gates of the same shape (n, K).

    >>> pairs = assign_tokens(torch.tensor([[2, 0], [0, 1]]), torch.tensor([[0.9, 0.1], [0.6, 0.4]]), 3)
    >>> pairs.token.tolist(), pairs.ends.tolist(), pairs.gate
    ([0, 1, 1, 0], [2, 3, 4], tensor([0.1000, 0.6000, 0.4000, 0.9000]))
    """
    n_active = chosen.shape[-1]
    key = chosen.flatten().to(torch.uint8 if n_experts <= 256 else torch.int32)  # a radix sort passes over its bits
    key, order = key.sort(stable=True)
    rows = torch.arange(len(order), device=order.device)
    places = torch.zeros_like(order).scatter(0, order, rows)
    ends = (key.unsqueeze(-1) <= torch.arange(n_experts, device=key.device)).sum(dim=0, dtype=torch.int32)
    gate = _Spread.apply(gates.flatten(), order, places.unsqueeze(-1))
    return Assignments(order // n_active, gate, ends, places.view_as(chosen))


def assign_experts(chosen: Tensor, gates: Tensor, n_tokens: int) -> Assignments:
    """The assignments where expert e of sequence b takes the tokens chosen[b, :, e] of n_tokens, with gates alike.

    >>> pairs = assign_experts(torch.tensor([[[1, 0]], [[0, 0]]]), torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]]]), 2)
    >>> pairs.token.tolist(), pairs.ends.tolist()
    ([1, 2, 0, 2], [2, 4])
    """
    n_sequences, _, n_experts = chosen.shape
    first = torch.arange(n_sequences, device=chosen.device)[:, None, None] * n_tokens
    token = (chosen + first).movedim(-1, 0).flatten()  # by expert, by sequence, by rank
    gate = gates.movedim(-1, 0).flatten()
    n_rows = len(token) // n_experts
    ends = torch.arange(1, n_experts + 1, dtype=torch.int32, device=chosen.device) * n_rows
    return Assignments(token, gate, ends, None)


def apply_experts(x: Tensor, pairs: Assignments, experts: Weights, activation: str) -> Tensor:
    """Sum over the assignments of a token of gate times expert output, (n, D), of x (n, D).

    experts: (E, out, in) by the names `moe.experts.up`, `down` and, where present, `gate`; used in the type of x, or
    that of autocast. The gate multiplies the inner activations before they are rounded: no pass over the outputs.
    """
    device = x.device.type
    x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
    phi = ACTIVATIONS[activation]
    up, down = experts["moe.experts.up"], experts["moe.experts.down"]
    gated = "moe.experts.gate" in experts
    first = torch.cat((experts["moe.experts.gate"], up), dim=1) if gated else up
    inner = grouped_linear(_spread(x, pairs), first.to(x.dtype), pairs.ends)
    if gated and activation == "silu" and kernels.serves_width(x, up.shape[1]):
        inner = kernels.swiglu(inner.contiguous(), pairs.gate.float())
    else:
        if gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = phi(gate) * inner
        else:
            inner = phi(inner)
        inner = (inner * pairs.gate.unsqueeze(-1)).to(x.dtype)
    return _collect(grouped_linear(inner, down.to(x.dtype), pairs.ends), pairs, len(x))


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows[i] W_e^T for the expert e of row i, (R, out).

    rows: (R, in), by expert; weight: (E, out, in); ends: as in `Assignments`. bfloat16 takes the grouped kernel, padded
    with zeros where a width is no multiple of 8. Other types take one product per expert, which waits for the device:
    the kernel has no float64, and no float32 when compiled.
    """
    if rows.dtype != torch.bfloat16:
        return _looped_linear(rows, weight, ends)
    n_out, n_in = weight.shape[1:]
    more_out, more_in = -n_out % ALIGNMENT, -n_in % ALIGNMENT
    if more_out or more_in:
        rows, weight = functional.pad(rows, (0, more_in)), functional.pad(weight, (0, more_in, 0, more_out))
    return _grouped_mm(rows, weight.mT, offs=ends)[:, :n_out]


@torch.library.custom_op("varprop::looped_linear", mutates_args=())
def _looped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out, splits = rows.new_empty(len(rows), weight.shape[1]), ends[:-1].long().cpu()
    for group, w, part in zip(rows.tensor_split(splits), weight, out.tensor_split(splits), strict=True):
        torch.mm(group, w.mT, out=part)
    return out


@torch.library.custom_op("varprop::looped_outer", mutates_args=())
def _looped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum of left_i right_i^T over the rows of each expert, (E, left, right)."""
    out, splits = left.new_empty(len(ends), left.shape[1], right.shape[1]), ends[:-1].long().cpu()
    for a, b, part in zip(left.tensor_split(splits), right.tensor_split(splits), out, strict=True):
        torch.mm(a.mT, b, out=part)
    return out


@_looped_linear.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[1])


@_looped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, ends = ctx.saved_tensors
    return _looped_linear(grad, weight.mT, ends), _looped_outer(grad, rows, ends), None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right, ends = ctx.saved_tensors
    return _looped_linear(right, grad, ends), _looped_linear(left, grad.mT, ends), None


_looped_linear.register_autograd(_linear_backward, setup_context=_save_inputs)
_looped_outer.register_autograd(_outer_backward, setup_context=_save_inputs)


def _spread(x: Tensor, pairs: Assignments) -> Tensor:
    """The row of x of each assignment, (R, D)."""
    if pairs.places is None:  # in float32 or better, for the sum in the backward pass
        return x.to(_wide(x)).index_select(0, pairs.token).to(x.dtype)
    return _Spread.apply(x, pairs.token, pairs.places)


def _collect(y: Tensor, pairs: Assignments, n_tokens: int) -> Tensor:
    """The sum over the assignments of each token, (n, D), of their rows y (R, D)."""
    if pairs.places is None:  # added in no fixed order on CUDA, unless torch is asked for deterministic algorithms
        zeros = y.new_zeros(n_tokens, y.shape[1], dtype=_wide(y))
        return zeros.index_add(0, pairs.token, y.to(zeros.dtype)).to(y.dtype)
    return _Collect.apply(y, pairs.token, pairs.places)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Spread(torch.autograd.Function):
    """x[source], whose transpose is `_Collect`: autograd's own would add atomically. places[i]: where source is i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(source, places)
        return x[source]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Collect.apply(grad, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """sum_k y[places[:, k]], in this order, rounded once; its transpose is `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, source: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(source, places)
        return y[places].sum(dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _Spread.apply(grad, *ctx.saved_tensors), None, None
