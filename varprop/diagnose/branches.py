"""What attention and the feed-forward part of any layer add to the stream, watched or changed while the layer runs.

The stream is followed through the layer's own additions: every sum of which one term is the stream is a residual sum,
and the other term is what a branch adds, after any norm and multiplier. The branch after which attention was computed
is attention's. So no family has code of its own.

Shape suffixes: `R` rows (variants times sequences), `T` tokens, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from varprop.errors import ArgumentError

Edit = Callable[[str, Tensor], Tensor]
"""Called with `attn` or `mlp` and what it adds to the stream (R, T, D); gives what is added instead."""
_SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.add_}
_PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_NORMS = {functional.layer_norm, functional.rms_norm, torch.layer_norm, torch.rms_norm}
_SOFTMAX = {functional.softmax, torch.softmax, torch.Tensor.softmax}
_SAME = {functional.dropout, torch.dropout}
_CASTS = {torch.Tensor.to, torch.Tensor.float, torch.Tensor.type_as}
_SDPA = functional.scaled_dot_product_attention


class Branches(TorchFunctionMode):
    """Inside it a layer is called once on `stream`, the very tensor that is given to the layer.

    edit: sees each branch and gives what is added instead. `found` has the names of the branches seen, `middle` is the
    stream between them: what feed-forward is added to, after a norm of attention's sum if one follows it. `added` and
    `inputs` are, by branch, what it adds and of which stream it is a function.
    """

    def __init__(self, stream: Tensor, edit: Edit) -> None:
        super().__init__()
        self.edit = edit
        self.found: list[str] = []
        self.middle: Tensor | None = None
        self.added: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self._shape = stream.shape
        self._stream = [stream]  # with whatever a norm or a number made of it
        self._normed: list[Tensor] = []  # norms of the stream: the stream itself where the norm follows the sum
        self._attended = False
        self._sums: list[tuple[Tensor, Tensor, Tensor]] = []  # sums of two branches: result and terms
        self._made: list[Tensor] = []  # tensors of the stream's shape, in the order they were made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._sum(func, args, kwargs) if func in _SUMS else func(*args, **kwargs)
        if func is _SDPA or (func in _SOFTMAX and torch.is_tensor(result) and result.ndim == 4):
            self._attended = True
        if torch.is_tensor(result) and result.shape == self._shape:
            self._made.append(result)
            self._follow(func, args, result)
        return result

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], result: Tensor) -> None:
        """Take `result` for the stream or its norm where it is no more than that times a number, a gain or a cast."""
        first = next((a for a in args if torch.is_tensor(a)), None)
        if first is None:
            return
        factors = [a for a in args[:2] if a is not first]
        is_same = func in _SAME | _CASTS or (func in _PRODUCTS and any(isinstance(a, (int, float)) for a in factors))
        is_gain = func in _PRODUCTS | _SUMS and any(
            torch.is_tensor(a) and a.numel() == self._shape[-1] for a in factors
        )
        if is_same and _among(first, self._stream):
            self._stream.append(result)
        if (is_same or is_gain) and _among(first, self._normed):
            self._normed.append(result)
        if func in _SAME:
            self._sums += [(result, a, b) for total, a, b in self._sums if total is first]
        if func in _NORMS and _among(first, self._stream):
            self._normed.append(result)

    def _sum(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        terms = args[:2]
        if kwargs or len(terms) < 2 or not all(torch.is_tensor(t) and t.shape == self._shape for t in terms):
            return func(*args, **kwargs)
        first, second = terms
        for stream, branch in ((first, second), (second, first)):
            if _among(stream, self._stream) or _among(stream, self._normed):
                return self._residual(stream, branch)
        kept = first.clone() if func is torch.Tensor.add_ else first  # `a += b` changes the first term
        result = func(*args, **kwargs)
        self._sums.append((result, kept, second))
        return result

    def _residual(self, stream: Tensor, branch: Tensor) -> Tensor:
        parts = next(((a, b) for total, a, b in self._sums if total is branch), None)
        source = stream if _among(stream, self._normed) else self._stream[0]
        if self._attended and parts is not None:  # parallel: attention and feed-forward in one sum
            first, second = sorted(parts, key=self._age)
            attn, mlp = self.edit("attn", first), self.edit("mlp", second)
            self.found += ["attn", "mlp"]
            self.added, self.inputs = {"attn": attn, "mlp": mlp}, {"attn": source, "mlp": source}
            self.middle = stream + attn
            unchanged = attn is first and mlp is second
            result = stream + branch if unchanged else self.middle + mlp  # the former rounds as the layer itself does
        else:
            name = "attn" if self._attended and "attn" not in self.found else "mlp"
            self.found.append(name)
            self.added[name], self.inputs[name] = self.edit(name, branch), source
            result = stream + self.added[name]
            if name == "mlp":
                self.middle = source
        self._attended = False
        self._stream, self._normed, self._sums = [result], [], []
        return result

    def _age(self, tensor: Tensor) -> int:
        return next((i for i, made in enumerate(self._made) if made is tensor), len(self._made))


def _among(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor is other for other in others)


def require_two(found: list[str], layer: int, architecture: str) -> None:
    """`ArgumentError` unless a layer was seen to add attention and then feed-forward, once each."""
    if found != ["attn", "mlp"]:
        seen = ", ".join(found) or "nothing"
        expected = "a layer that adds attention and feed-forward to its stream, once each"
        raise ArgumentError(
            f"architecture={architecture!r} adds {seen} to the stream in layer {layer}; {_hook(expected)}"
        )


def _hook(expected: str) -> str:
    return f"expected {expected} (the hook on the branches is missing; scores of whole layers do not need it)"
