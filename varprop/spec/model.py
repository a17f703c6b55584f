"""`ModelSpec`: what a model is. It knows nothing of torch, files, training or sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from varprop.errors import SpecError, require
from varprop.spec import serialise, tensors
from varprop.spec.parts import (
    AttentionSpec,
    Block,
    FeedForwardSpec,
    InitSpec,
    MoESpec,
    NormSpec,
    ResidualSpec,
    WeightMasks,
    _one_of,
    _positive,
    _positive_integer,
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder (or encoder) stack of `n_layers` blocks on a stream of width `d_model`.

    attention, feed_forward, moe: the parts of a block; None = absent. With both `feed_forward` and `moe`,
    `moe_pattern` (cycled over the layers) says which layers are MoE. `window_pattern` (cycled; 0 = no window)
    overrides `attention.window` per layer. block: attention then feed-forward, or both in parallel from the stream.
    embedding_scale multiplies the embedding output. Layers are numbered 1..n_layers; 0 is the embedding.

    >>> spec = ModelSpec(d_model=64, n_layers=2, attention=AttentionSpec(n_heads=4),
    ...                  feed_forward=FeedForwardSpec(d_ff=128))
    >>> spec.head_dim, spec.kv_group_size
    (16, 1)
    >>> ModelSpec.from_json(spec.to_json()) == spec
    True
    >>> spec.with_fields(n_kv_heads=2).kv_group_size
    2
    """

    d_model: int
    n_layers: int
    vocab_size: int = 8192
    tied_embeddings: bool = True
    embedding_scale: float = 1.0
    attention: AttentionSpec | None = None
    feed_forward: FeedForwardSpec | None = None
    moe: MoESpec | None = None
    block: Block = "sequential"
    window_pattern: tuple[int, ...] = ()
    moe_pattern: tuple[bool, ...] = ()
    norm: NormSpec = field(default_factory=NormSpec)
    residual: ResidualSpec = field(default_factory=ResidualSpec)
    init: InitSpec = field(default_factory=InitSpec)
    masks: WeightMasks = field(default_factory=WeightMasks)

    def __post_init__(self) -> None:
        _positive_integer("d_model", self.d_model)
        _positive_integer("n_layers", self.n_layers)
        _positive_integer("vocab_size", self.vocab_size)
        _positive("embedding_scale", self.embedding_scale)
        require(
            isinstance(self.tied_embeddings, bool),
            SpecError,
            "tied_embeddings",
            self.tied_embeddings,
            "not a boolean",
            "true or false",
        )
        _one_of("block", self.block, Block)
        smallest = 2 if self.norm.kind == "layer" else 1
        wrong, domain = "too small for a layer norm", f"at least {smallest}"
        require(self.d_model >= smallest, SpecError, "d_model", self.d_model, wrong, domain)
        self._check_attention()
        self._check_feed_forward()
        self._check_masks()
        require(
            self.block == "sequential" or self.norm.placement not in ("post", "mix"),
            SpecError,
            "block",
            self.block,
            f"given with norm.placement={self.norm.placement!r}",
            "block='sequential' where a norm follows the sum",
        )
        require(
            self.residual.rule != "deepnorm" or self.norm.placement == "post",
            SpecError,
            "residual.rule",
            "deepnorm",
            f"given with norm.placement={self.norm.placement!r}",
            "norm.placement='post'",
        )

    def _check_attention(self) -> None:
        attention = self.attention
        if attention is None:
            require(not self.window_pattern, SpecError, "window_pattern", self.window_pattern, "given", "attention")
            return
        if attention.head_dim is None:
            require(
                self.d_model % attention.n_heads == 0,
                SpecError,
                "n_heads",
                attention.n_heads,
                f"not a divisor of d_model={self.d_model}",
                "a divisor of d_model, or an explicit head_dim",
            )
        elif attention.head_dim * attention.n_heads == self.d_model:  # one canonical form
            object.__setattr__(self, "attention", serialise.replace(attention, head_dim=None))
        rotated = self.head_dim * attention.rope_fraction
        require(
            attention.rope_theta is None or (rotated % 2 == 0 and rotated > 0),
            SpecError,
            "rope_fraction",
            attention.rope_fraction,
            f"{rotated:g} rotated dimensions",
            f"an even whole number of the {self.head_dim} dimensions of a head (rope_theta=null for no positions)",
        )
        for window in self.window_pattern:
            _positive_integer("window_pattern", window, minimum=0)
        require(
            attention.pattern != "window" or attention.window is not None or bool(self.window_pattern),
            SpecError,
            "window",
            None,
            "missing",
            "a window or a window_pattern with pattern='window'",
        )
        require(
            not self.window_pattern or attention.pattern == "window",
            SpecError,
            "window_pattern",
            self.window_pattern,
            f"given with pattern={attention.pattern!r}",
            "pattern='window'",
        )

    def _check_feed_forward(self) -> None:
        for flag in self.moe_pattern:
            require(isinstance(flag, bool), SpecError, "moe_pattern", flag, "not a boolean", "booleans")
        both = self.feed_forward is not None and self.moe is not None
        require(
            bool(self.moe_pattern) == both,
            SpecError,
            "moe_pattern",
            self.moe_pattern,
            "missing" if both else "given without both feed_forward and moe",
            "a pattern exactly when both feed_forward and moe are given",
        )
        require(
            self.attention is not None or self.feed_forward is not None or self.moe is not None,
            SpecError,
            "attention",
            None,
            "a block with no part",
            "attention, feed_forward or moe",
        )

    def _check_masks(self) -> None:
        if not self.masks.any:
            return
        one_of_each = {self.is_moe(layer): layer for layer in range(1, self.n_layers + 1)}.values()
        for row in (row for layer in one_of_each for row in tensors.layer_table(self, layer).values()):
            if row.mask is not None and row.mask.kind == "n_of_m":
                require(
                    row.fan_in % row.mask.group == 0,
                    SpecError,
                    f"masks.{row.matrix}.group",
                    row.mask.group,
                    f"not a divisor of the {row.fan_in} inputs of {row.name}",
                    "a divisor of the inputs",
                )

    # What the fields resolve to ------------------------------------------------------------------------------------

    def _attention(self) -> AttentionSpec:
        if self.attention is None:
            raise SpecError("attention=None is absent; expected a spec with attention")
        return self.attention

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self._attention().n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads."""
        return self._attention().n_kv_heads or self.n_heads

    @property
    def kv_group_size(self) -> int:
        """Query heads per key/value head (the paper's G)."""
        return self.n_heads // self.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self._attention().head_dim or self.d_model // self.n_heads

    def window(self, layer: int) -> int | None:
        """Attention window of layer 1..n_layers; None = every earlier position."""
        if self.window_pattern:
            return self.window_pattern[(layer - 1) % len(self.window_pattern)] or None
        return self._attention().window

    def is_moe(self, layer: int) -> bool:
        """Whether layer 1..n_layers has a mixture of experts."""
        if self.moe_pattern:
            return self.moe_pattern[(layer - 1) % len(self.moe_pattern)]
        return self.moe is not None

    def kind(self, layer: int) -> tuple[bool, int | None, str]:
        """What may differ from layer to layer: whether it is a mixture, its window and its norm placement."""
        return self.is_moe(layer), self.window(layer) if self.attention else None, self.norm_placement(layer)

    def norm_placement(self, layer: int) -> str:
        """Placement of layer 1..n_layers: `mix` resolved to `post` or `pre` (Mix-LN, arXiv 2412.13795)."""
        if self.norm.placement != "mix":
            return self.norm.placement
        return "post" if layer <= round(self.norm.post_fraction * self.n_layers) else "pre"

    @property
    def branch_scale(self) -> float:
        """Factor on what a branch adds to the stream."""
        rules = {
            "one": 1.0,
            "inverse_sqrt_2L": (2 * self.n_layers) ** -0.5,
            "inverse_sqrt_L": self.n_layers**-0.5,
            "inverse_L": 1 / self.n_layers,
            "deepnorm": 1.0,
        }
        return rules[self.residual.rule] * self.residual.branch_multiplier

    @property
    def skip_scale(self) -> float:
        """Factor on the stream itself."""
        deepnorm = (2 * self.n_layers) ** 0.25 if self.residual.rule == "deepnorm" else 1.0
        return deepnorm * self.residual.skip_multiplier

    # Text forms ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dictionary of every field."""
        return serialise.to_dict(self)

    def to_json(self) -> str:
        """The canonical JSON: every field, keys sorted, no white space."""
        return serialise.canonical_json(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSpec:
        """A spec from a nested dictionary; unknown or ill-typed fields raise `SpecError`."""
        return serialise.from_dict(cls, data)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """A spec from JSON; broken JSON raises `SpecError`."""
        return serialise.from_dict(cls, serialise.parse_json(text))

    @property
    def spec_id(self) -> str:
        """First 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def with_fields(self, changes: Mapping[str, Any] | None = None, /, **fields: Any) -> ModelSpec:
        """A changed copy. Names are dotted paths (`moe.top_k`) or field names that occur once (`n_kv_heads`).

        `density` stands for the same Bernoulli mask on every matrix of a block except the router.
        """
        return serialise.with_fields(self, {**(changes or {}), **fields})

    def tensor_table(self) -> tuple[tensors.TensorRow, ...]:
        """Every parameter tensor: shape, count, initial standard deviation. The initialiser reads this table."""
        return tensors.tensor_table(self)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters `total`, `active` per token, `body` (total without embeddings), `active_body`."""
        return tensors.parameter_counts(self.tensor_table())

    def describe(self) -> str:
        """The tensor table and parameter counts as text; equal layers are shown once."""
        return tensors.describe(self)
