"""A model taken apart: what comes before its layers, the layers, and what comes after them.

Every pass through a model is three steps that can be run alone: `capture` keeps the streams and the other arguments of
every layer (`varprop.diagnose.calls` finds them), `layer` runs one of them on many streams at a time, `losses` runs
what follows the last one. No family has code of its own.

Shape suffixes: `V` variants, `B` sequences, `T` tokens, `D` d_model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varprop.diagnose.branches import Branches, Edit, require_two
from varprop.diagnose.calls import Call, find_layers, first_line, places_of_each, repeated, shared, split, stream_of
from varprop.diagnose.limits import Limits
from varprop.errors import ArgumentError, UnsuitedError, require
from varprop.nn import Transformer
from varprop.results import SITES

IGNORED = -100
"""A target that no loss is taken of."""
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""How far the loss of a replay may be from the model's own, relatively, by type."""
HIDDEN_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""The same of last hidden states, which no mean over tokens evens out: one rounding in each of 30 layers is 2 % in
bfloat16. Models in float64 have norms in float32."""


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
        self.layers: Sequence[nn.Module] = find_layers(model, self._forward, self.device)
        self._n_outputs = self._count_outputs()
        self._of_each: dict[int, list[frozenset[int]]] = {}
        """By tokens of a sequence, of every layer: `Call.of_each`."""
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
        seen, n_tokens = self._calls(batch.tokens), batch.tokens.shape[1]
        if n_tokens not in self._of_each:
            two, three = (self._calls(batch.tokens[:1].repeat(n, 1)) for n in (2, 3))
            self._of_each[n_tokens] = [places_of_each(a[1], b[1]) for a, b in zip(two, three, strict=True)]
        calls = [
            shared(dataclasses.replace(call, of_each=places))
            for (_, call), places in zip(seen, self._of_each[n_tokens], strict=True)
        ]
        return Captured(self, batch, seen[0][0], calls)

    def _calls(self, tokens: Tensor) -> list[tuple[Tensor, Call]]:
        """The stream and the call of every layer in a pass in which the layers do nothing."""
        seen: list[tuple[Tensor, Call]] = []

        def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            seen.append(split(args, kwargs))
            if len(seen) == self.n_layers:
                raise _Done
            return seen[-1][0]

        with self._bypassed(note), contextlib.suppress(_Done):
            self._forward(tokens)
        return seen

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
        call = repeated(captured.calls[index], n_variants)
        return streams.reshape(n_variants * shape[0], *shape[1:]), call

    def _called(self, index: int, stream: Tensor, call: Call) -> Tensor:
        named = {} if call.name is None else {call.name: stream}
        given = (stream, *call.args) if call.name is None else call.args
        return stream_of(self.layers[index](*given, **named, **call.kwargs))

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
        return lambda args, kwargs: streams if next(left) == self.n_layers - 1 else split(args, kwargs)[0]

    @contextlib.contextmanager
    def _bypassed(self, instead: Callable[[tuple[Any, ...], dict[str, Any]], Tensor]) -> Iterator[None]:
        """No layer runs: each gives what `instead` makes of its arguments."""

        def stub(n_outputs: int, *args: Any, **kwargs: Any) -> Any:
            stream = instead(args, kwargs)
            return (stream, *[None] * (n_outputs - 1)) if n_outputs else stream

        own = [vars(layer).get("forward") for layer in self.layers]  # a forward that someone gave this one layer
        for layer, n_outputs in zip(self.layers, self._n_outputs, strict=True):
            layer.forward = functools.partial(stub, n_outputs)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

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

        Without a head: how far the last hidden states are, |replayed - own| / |own| over all tokens and neurons. Two
        variants of the first sequences go through together, as they do in every score. Raises `ArgumentError` where it
        is more than rounding (`ROUNDING`, `HIDDEN_ROUNDING`), where no sequence has a target, the head is not
        finite, or attention has random masks.
        """
        batch = batch.rows(slice(0, 2))
        density = self._key_mask_density
        wrong = "a random mask, drawn anew in every pass: no two passes are of one model"
        require(density == 1, ArgumentError, "attention.key_mask_density", density, wrong, "1")
        if self.has_loss:
            n_targets = int(self.count(batch).sum())
            require(n_targets > 0, ArgumentError, "targets", n_targets, "too few for a loss", "one or more")
        captured = self.capture(batch)
        x = captured.start.expand(2, *captured.start.shape)
        try:
            for index in range(self.n_layers):
                x = self.layer(index, x, captured)
            if not bool(torch.isfinite(x).all()):
                _ = captured.streams  # raises, and names the first such layer
            gap, wrong = self._loss_gap(x, batch) if self.has_loss else self._hidden_gap(x, batch)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, ArgumentError):
                raise
            wrong = f"without layers that take more sequences than the pass they are of ({first_line(error)})"
            expected = "layers whose other arguments are the same for all sequences, or have one entry for each"
            raise ArgumentError(f"architecture={self.architecture!r} is {wrong}; expected {expected}") from error
        expected = "layers that depend on nothing but their arguments, and a head that reads each token alone"
        good = gap <= (ROUNDING if self.has_loss else HIDDEN_ROUNDING).get(self.dtype, 1e-4)
        require(good, ArgumentError, "architecture", self.architecture, f"replayed with {wrong}", expected)
        return gap

    @property
    def _key_mask_density(self) -> float:
        attention = self.model.spec.attention if isinstance(self.model, Transformer) else None
        return 1.0 if attention is None else attention.key_mask_density

    def _loss_gap(self, x: Tensor, batch: Batch) -> tuple[float, str]:
        """Of streams (V, B, T, D) after the last layer, and the two losses in words."""
        found = self.losses(x, batch).sum(dim=1) / self.count(batch).sum()
        logits = _at_least_float32(self._own_output(batch)).double()
        own = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        wrong, expected = "what the head gives of finite streams", "finite weights of the final norm and the head"
        require(bool(own.isfinite()), ArgumentError, "loss", own.item(), wrong, expected)
        return float((found / own - 1).abs().max()), f"a loss of {found[-1].item():.6g} instead of {own.item():.6g}"

    def _hidden_gap(self, x: Tensor, batch: Batch) -> tuple[float, str]:
        """Of streams (V, B, T, D) after the last layer, and in words."""
        own = self._own_output(batch).double()
        found = torch.stack([self.normed(variant) for variant in x]).double()
        gap = float(((found - own).flatten(1).norm(dim=1) / own.norm()).max())
        return gap, f"last hidden states that are {gap:.2g} of their size from its own"

    def _own_output(self, batch: Batch) -> Tensor:
        """Logits of the model's own pass, without a head its last hidden states."""
        out = self._forward(batch.tokens)
        return getattr(out, "logits", out) if self.has_loss else out[0]


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


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
