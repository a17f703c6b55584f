"""A model taken apart: what comes before its layers, the layers, and what comes after them.

The layers are found by what they do, not by name: they are the modules of one list of which each is called once in a
pass and takes as its stream what the one before it gave. Every pass through a model is then three steps that can be
run alone: `capture` keeps the streams and the other arguments of every layer, `layer` runs one of them on many streams
at a time, `losses` runs what follows the last one. No family has code of its own.

Shape suffixes: `V` variants, `B` sequences, `T` tokens, `D` d_model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from varprop.diagnose.branches import Branches, Edit, require_two
from varprop.diagnose.limits import Limits
from varprop.errors import ArgumentError, UnsuitedError, require
from varprop.nn import Transformer
from varprop.results import SITES

IGNORED = -100
"""A target that no loss is taken of."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""How far the loss of a replay may be from the model's own, relatively, by type."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length. tokens, targets: (B, T) int64; a target is `IGNORED` where no loss is taken."""

    tokens: Tensor
    targets: Tensor

    def rows(self, which: slice) -> Batch:
        """Some of the sequences."""
        return Batch(self.tokens[which], self.targets[which])

    @classmethod
    def causal(cls, tokens: Tensor) -> Batch:
        """Each token is the target of the one before it.

        >>> Batch.causal(torch.tensor([[5, 6, 7]])).targets
        tensor([[   6,    7, -100]])
        """
        return cls(tokens, functional.pad(tokens[:, 1:], (0, 1), value=IGNORED))


@dataclass(frozen=True)
class Call:
    """How a layer was called: its arguments but for the stream."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str | None
    """Of the stream's argument; None = the first one without a name."""


@dataclass(frozen=True)
class Captured:
    """What comes before the layers, run once. start: the stream (B, T, D) before the first; calls: of every layer."""

    replay: Replay
    batch: Batch
    start: Tensor
    calls: list[Call]

    @functools.cached_property
    def streams(self) -> list[Tensor]:
        """The stream before each layer and after the last, (B, T, D) each: an ordinary pass, made when first asked for.

        Raises `ArgumentError` naming the first layer whose stream is not finite.
        """
        with torch.no_grad():
            found = [self.start]
            for index in range(self.replay.n_layers):
                found.append(self.replay.layer(index, found[-1][None], self)[0])
            finite = torch.stack([torch.isfinite(stream).all() for stream in found]).tolist()
        if not all(finite):
            layer = finite.index(False)
            where = "after the embedding" if layer == 0 else f"after layer {layer}"
            require(False, ArgumentError, "activations", "NaN or infinite", f"first {where}", "finite activations")
        return found

    @property
    def n_sequences(self) -> int:
        """B."""
        return self.batch.tokens.shape[0]

    @property
    def n_tokens(self) -> int:
        """T."""
        return self.batch.tokens.shape[1]


class _Done(Exception):  # noqa: N818
    """Ends a pass after the last layer."""


class Replay:
    """The parts of `model`, a module that takes token ids (B, T) and gives logits (B, T, vocab_size).

    model: of Hugging Face's transformers, or a `varprop.nn.Transformer`. It is put into evaluation mode and its
    weights need no gradients from then on. limits: memory and chunks. Raises `ArgumentError` where the layers cannot be
    found or run alone.
    """

    def __init__(self, model: nn.Module, limits: Limits | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        for module in model.modules():  # a cache would be one more thing that a layer depends on
            config: Any = getattr(module, "config", None)
            if hasattr(config, "use_cache"):
                config.use_cache = False
        embedding = next(iter(model.parameters()))
        self.device = embedding.device
        self.layers: Sequence[nn.Module] = _find_layers(model, self._forward, self.device)
        self._n_outputs = self._count_outputs()
        probe = self.capture(Batch.causal(torch.arange(8, device=self.device).reshape(2, 4) % 7))
        self.d_model, self.dtype = probe.start.shape[-1], probe.start.dtype
        with torch.inference_mode():
            out = self._forward(probe.batch.tokens)
        logits = getattr(out, "logits", out)
        self.vocab_size = logits.shape[-1] if torch.is_tensor(logits) else 0
        self.limits = limits or Limits.of(self.device)

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def architecture(self) -> str:
        """Name of the model's class."""
        return type(self.model).__name__

    @property
    def has_loss(self) -> bool:
        """Whether the model ends in logits."""
        return self.vocab_size > 0

    def require_loss(self, what: str) -> None:
        """`UnsuitedError` for a model without logits; `what` is the score that needs them."""
        expected = "a model with a language-model head"
        require(self.has_loss, UnsuitedError, "architecture", self.architecture, f"without logits ({what})", expected)

    def _forward(self, tokens: Tensor) -> Any:
        name = "input_ids" if "input_ids" in inspect.signature(self.model.forward).parameters else None
        return self.model(**{name: tokens}) if name else self.model(tokens)

    @torch.no_grad()
    def capture(self, batch: Batch) -> Captured:
        """The stream before the first layer and the calls of all, from a pass in which the layers do nothing."""
        seen: list[tuple[Tensor, Call]] = []

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            stream, call = _split(args, kwargs)
            seen.append((stream, _shared(call, len(batch.tokens))))
            if len(seen) == self.n_layers:
                raise _Done
            return stream

        with self._bypassed(note), contextlib.suppress(_Done):
            self._forward(batch.tokens)
        return Captured(self, batch, seen[0][0], [call for _, call in seen])

    def layer(self, index: int, streams: Tensor, captured: Captured, edit: Edit | None = None) -> Tensor:
        """The streams (V, B, T, D) after layer `index` (0..L-1), each variant by itself.

        captured: the pass that the sequences are of, for the other arguments. edit: sees what each branch adds,
        (V B, T, D), and gives what is added instead; `ArgumentError` where the branches cannot be told apart. Runs with
        or without gradients, as is set where it is called.
        """
        if edit is not None:
            return self.branches(index, streams, captured, edit)[0]
        flat, call = self._prepared(index, streams, captured)
        return self._called(index, flat, call).reshape(streams.shape)

    def branches(self, index: int, streams: Tensor, captured: Captured, edit: Edit) -> tuple[Tensor, Branches]:
        """As `layer`, and what its branches add to which stream: `added` and `inputs`, each (V B, T, D)."""
        flat, call = self._prepared(index, streams, captured)
        with Branches(flat, edit) as branches:
            out = self._called(index, flat, call)
        require_two(branches.found, index + 1, self.architecture)
        return out.reshape(streams.shape), branches

    def _prepared(self, index: int, streams: Tensor, captured: Captured) -> tuple[Tensor, Call]:
        """The streams (V B, T, D) and the layer's other arguments for them."""
        n_variants, *shape = streams.shape
        call = _repeated(captured.calls[index], shape[0], n_variants)
        return streams.reshape(n_variants * shape[0], *shape[1:]), call

    def _called(self, index: int, stream: Tensor, call: Call) -> Tensor:
        named = {} if call.name is None else {call.name: stream}
        given = (stream, *call.args) if call.name is None else call.args
        return _stream_of(self.layers[index](*given, **named, **call.kwargs))

    @torch.no_grad()
    def sites(self, index: int, stream: Tensor, captured: Captured) -> dict[str, Tensor]:
        """What stands at every one of `results.SITES` in layer `index` (0..L-1) of `stream`, (B, T, D) each.

        `attn_out`, `mlp_out`: what is added to the stream. `resid_mid`: what feed-forward is added to, in parallel
        layers the stream plus attention. `ArgumentError` where the branches cannot be told apart.
        """
        after, branches = self.branches(index, stream[None], captured, lambda _, added: added)
        assert branches.middle is not None
        found = {f"{name}_out": added for name, added in branches.added.items()}
        found |= {"resid_pre": stream, "resid_mid": branches.middle, "resid_post": after[0]}
        return {site: found[site] for site in SITES}

    @functools.cached_property
    def call_bytes(self) -> int:
        """About how many bytes a layer holds for each token: eight streams and one output of each matrix."""
        widths = [sum(p.numel() for p in layer.parameters() if p.ndim == 2) // self.d_model for layer in self.layers]
        return (8 * self.d_model + max(widths)) * torch.finfo(self.dtype).bits // 8

    @torch.no_grad()
    def losses(self, streams: Tensor, batch: Batch) -> Tensor:
        """Sum over the targets of a sequence of the loss in nats, (V, B) float64, of streams (V, B, T, D) after the
        last layer."""
        n_variants, n_sequences, n_tokens, d_model = streams.shape
        kept = (batch.targets != IGNORED).expand(n_variants, n_sequences, n_tokens).reshape(-1)
        which = torch.arange(n_variants * n_sequences, device=self.device).repeat_interleave(n_tokens)[kept]
        rows = streams.reshape(-1, d_model)
        places = kept.nonzero()[:, 0]
        targets = batch.targets.expand(n_variants, n_sequences, n_tokens).reshape(-1)[places]
        total = torch.zeros(n_variants * n_sequences, dtype=torch.float64, device=self.device)
        most = self.limits.head_tokens(self.vocab_size)
        for part, shape in head_pieces(len(places), n_tokens, most):
            logits = _at_least_float32(self.logits(rows[places[part]].reshape(*shape, d_model)).flatten(0, 1))
            total.index_add_(0, which[part], functional.cross_entropy(logits, targets[part], reduction="none").double())
        return total.reshape(n_variants, n_sequences)

    def logits(self, streams: Tensor) -> Tensor:
        """Logits (B, n, vocab_size) of streams (B, n, D) after the last layer; each token by itself, so n is free. Runs
        with or without gradients, as is set where it is called."""
        with self._bypassed(self._inject(streams)):
            out = self._forward(torch.zeros(streams.shape[:2], dtype=torch.long, device=self.device))
        return getattr(out, "logits", out)

    def normed(self, streams: Tensor) -> Tensor:
        """The final norm of streams (B, n, D) after the last layer, with or without gradients; as it is without one."""
        if isinstance(self.model, Transformer):
            return self.model.normalise(streams)
        body: Any = getattr(self.model, "base_model", self.model)
        with self._bypassed(self._inject(streams)):
            return body(input_ids=torch.zeros(streams.shape[:2], dtype=torch.long, device=self.device))[0]

    def _inject(self, streams: Tensor) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
        """For `_bypassed`: `streams` after the last layer."""
        left = iter(range(self.n_layers))
        return lambda args, kwargs: streams if next(left) == self.n_layers - 1 else _split(args, kwargs)[0]

    @contextlib.contextmanager
    def _bypassed(self, instead: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """No layer runs: each gives what `instead` makes of its arguments."""

        def stub(n_outputs: int, *args: Any, **kwargs: Any) -> Any:
            stream = instead(args, kwargs)
            return (stream, *[None] * (n_outputs - 1)) if n_outputs else stream

        for layer, n_outputs in zip(self.layers, self._n_outputs, strict=True):
            layer.forward = functools.partial(stub, n_outputs)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def _count_outputs(self) -> list[int]:
        """Of each layer, the length of the tuple whose first entry is the stream; 0 = it gives the stream alone."""
        found: list[int] = []
        watch = lambda _, __, output: found.append(len(output) if isinstance(output, tuple) else 0)  # noqa: E731
        hooks = [layer.register_forward_hook(watch) for layer in self.layers]
        try:
            with torch.no_grad():
                self._forward(torch.zeros(1, 2, dtype=torch.long, device=self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def count(self, batch: Batch) -> Tensor:
        """Targets of each sequence, (B) float64."""
        return (batch.targets != IGNORED).sum(dim=1).double()

    @torch.no_grad()
    def check(self, batch: Batch) -> float:
        """How far the loss by `capture`, `layer` and `losses` is from that of the model's own pass, relatively.

        Two variants of the first sequences go through together, as they do in every score. Raises `ArgumentError` where
        it is more than rounding (`ROUNDING`), or where the loss that the model itself states for its labels differs.
        """
        self.require_loss("replay")
        batch = batch.rows(slice(0, 2))
        captured = self.capture(batch)
        x = captured.start.expand(2, *captured.start.shape)
        try:
            for index in range(self.n_layers):
                x = self.layer(index, x, captured)
            found = self.losses(x, batch).sum(dim=1) / self.count(batch).sum()
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            wrong = f"without layers that take more sequences than the pass they are of ({_first_line(error)})"
            expected = "layers whose other arguments are the same for all sequences, or have one entry for each"
            raise ArgumentError(f"architecture={self.architecture!r} is {wrong}; expected {expected}") from error
        if not bool(torch.isfinite(x).all()):
            _ = captured.streams  # raises, and names the first such layer
        own = self._own_loss(batch)
        gap = float((found / own - 1).abs().max())
        wrong = f"replayed with a loss of {found[-1].item():.6g} instead of {own.item():.6g}"
        expected = "layers that depend on nothing but their arguments, and a head that reads each token alone"
        good = gap <= ROUNDING.get(self.dtype, 1e-4)
        require(good, ArgumentError, "architecture", self.architecture, wrong, expected)
        return gap

    def _own_loss(self, batch: Batch) -> Tensor:
        """Mean over the targets, from the model's own pass."""
        out = self._forward(batch.tokens)
        logits = _at_least_float32(getattr(out, "logits", out)).double()
        return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


def head_pieces(n: int, n_tokens: int, most: int) -> Iterator[tuple[slice, tuple[int, int]]]:
    """`n` tokens in pieces of at most `most`, each as rows of a length that the model has positions for.

    >>> [shape for _, shape in head_pieces(7, 3, 6)], [part.stop for part, _ in head_pieces(3, 3, 2)]
    ([(2, 3), (1, 1)], [2, 3])
    """
    start = 0
    while start < n:
        length = min(n_tokens, most, n - start)
        n_rows = max(1, min(most, n - start) // length)
        yield slice(start, start + n_rows * length), (n_rows, length)
        start += n_rows * length


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _find_layers(model: nn.Module, forward: Callable[[Tensor], Any], device: torch.device) -> Sequence[nn.Module]:
    """The longest list of modules that are called once each, each with what the one before it gave."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
    order: list[int] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        with contextlib.suppress(ArgumentError):
            seen.setdefault(id(module), []).append((_split(args, kwargs)[0], _stream_of(output)))
            order.append(id(module))

    members = {id(member): member for members in lists for member in members}
    hooks = [member.register_forward_hook(watch, with_kwargs=True) for member in members.values()]
    name = type(model).__name__
    try:
        with torch.no_grad():
            forward(torch.arange(6, device=device).reshape(2, 3) % 5)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        wrong = f"without a pass on token ids alone ({_first_line(error)})"
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


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The stream of a layer's arguments, and the others."""
    if args and torch.is_tensor(args[0]):
        return args[0], Call(args[1:], kwargs, None)
    if torch.is_tensor(kwargs.get("hidden_states")):
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        return kwargs["hidden_states"], Call(args, others, "hidden_states")
    given = ", ".join(kwargs) or "nothing"
    raise ArgumentError(f"layer arguments={given!r} hold no stream; expected it first, or as hidden_states")


def _stream_of(output: Any) -> Tensor:
    """The stream that a layer gives: its output or the first entry of it."""
    stream = output[0] if isinstance(output, (tuple, list)) and output else output
    if not torch.is_tensor(stream):
        raise ArgumentError(f"layer output={type(output).__name__} is no stream; expected a tensor, or a tuple of it")
    return stream


def _shared(call: Call, n_sequences: int) -> Call:
    """The call with what is the same for all sequences kept once, so that it serves any number of them."""

    def once(value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim < 2 or value.shape[0] != n_sequences or n_sequences == 1:
            return value
        return value[:1] if torch.equal(value, value[:1].expand_as(value)) else value

    return Call(pytree.tree_map(once, call.args), pytree.tree_map(once, call.kwargs), call.name)


def _repeated(call: Call, n_sequences: int, n_variants: int) -> Call:
    """The call for `n_variants` streams of each sequence."""

    def again(value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim < 2 or value.shape[0] != n_sequences or n_sequences == 1:
            return value
        return value.repeat(n_variants, *[1] * (value.ndim - 1))

    if n_variants == 1:
        return call
    return Call(pytree.tree_map(again, call.args), pytree.tree_map(again, call.kwargs), call.name)
