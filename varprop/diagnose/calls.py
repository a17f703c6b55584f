"""How a model calls its layers: which modules they are, and their arguments beside the stream.

The layers are found by what they do, not by name: they are the modules of one list of which each is called once in a
pass and takes as its stream what the one before it gave.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from varprop.errors import ArgumentError, require


@dataclass(frozen=True)
class Call:
    """How a layer was called: its arguments but for the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    """Of the stream's argument; None = the first one without a name."""
    of_each: frozenset[int] = frozenset()
    """Places, among the leaves of (args, kwargs), of what has one entry for each sequence."""

    @property
    def leaves(self) -> list[Any]:
        """Every single argument."""
        return pytree.tree_leaves((self.args, self.kwargs))

    def map_of_each(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with what has one entry for each sequence changed."""
        leaves, tree = pytree.tree_flatten((self.args, self.kwargs))
        changed = [change(leaf) if place in self.of_each else leaf for place, leaf in enumerate(leaves)]
        args, kwargs = pytree.tree_unflatten(changed, tree)
        return Call(args, kwargs, self.name, self.of_each)


def find_layers(model: nn.Module, forward: Callable[[Tensor], Any], device: torch.device) -> Sequence[nn.Module]:
    """The longest list of modules that are called once each, each with what the one before it gave."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    order: list[int] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with contextlib.suppress(ArgumentError):
            seen.setdefault(id(module), []).append((split(args, kwargs)[0], stream_of(output)))
            order.append(id(module))

    members = {id(member): member for members in lists for member in members}
    hooks = [member.register_forward_hook(watch, with_kwargs=True) for member in members.values()]
    name = type(model).__name__
    try:
        with torch.no_grad():
            forward(torch.arange(6, device=device).reshape(2, 3) % 5)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        wrong = f"without a pass on token ids alone ({first_line(error)})"
        raise ArgumentError(f"architecture={name!r} is {wrong}; expected a decoder or an encoder") from error
    finally:
        for hook in hooks:
            hook.remove()

    def is_chain(layers: Sequence[nn.Module]) -> bool:
        calls = [seen.get(id(layer), []) for layer in layers]
        if any(len(call) != 1 for call in calls):
            return False
        streams = [call[0] for call in calls]
        if any(x.ndim != 3 or x.shape != y.shape or x.shape[:2] != (2, 3) for x, y in streams):
            return False
        return all(_same(a[1], b[0]) for a, b in itertools.pairwise(streams))

    chains = [list(layers) for layers in lists if is_chain(list(layers))]
    missing = "without a list of layers, each taking as its stream (B, T, D) what the one before it gave"
    require(bool(chains), ArgumentError, "architecture", name, missing, "a decoder or an encoder whose layers chain")
    return max(chains, key=len)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two streams are equal, NaN too: broken weights are found later, by layer."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The stream of a layer's arguments, and the others."""
    if args and torch.is_tensor(args[0]):
        return args[0], Call(args[1:], kwargs, None)
    if torch.is_tensor(kwargs.get("hidden_states")):
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], Call(args, others, "hidden_states")
    given = ", ".join(kwargs) or "nothing"
    raise ArgumentError(f"layer arguments={given!r} hold no stream; expected it first, or as hidden_states")


def stream_of(output: Any) -> Tensor:
    """The stream that a layer gives: its output or the first entry of it."""
    stream = output[0] if isinstance(output, (tuple, list)) and output else output
    if not torch.is_tensor(stream):
        raise ArgumentError(f"layer output={type(output).__name__} is no stream; expected a tensor, or a tuple of it")
    return stream


def places_of_each(two: Call, three: Call) -> frozenset[int]:
    """Places of the leaves that have one entry for each sequence: of calls of two and of three sequences.

    A shape alone does not say it: MPT's bias has as many entries as there are heads, and there may be as many
    sequences.
    """

    def sizes(call: Call) -> list[int]:
        return [leaf.shape[0] if torch.is_tensor(leaf) and leaf.ndim > 0 else 0 for leaf in call.leaves]

    pairs = zip(sizes(two), sizes(three), strict=True)
    return frozenset(place for place, pair in enumerate(pairs) if pair == (2, 3))


def shared(call: Call) -> Call:
    """The call with what is the same for all sequences kept once, so that it serves any number of them."""
    return call.map_of_each(lambda x: x[:1] if torch.equal(x, x[:1].expand_as(x)) else x)


def repeated(call: Call, n_variants: int) -> Call:
    """The call for `n_variants` streams of each sequence."""
    return call.map_of_each(lambda x: x if len(x) == 1 else x.repeat(n_variants, *[1] * (x.ndim - 1)))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
