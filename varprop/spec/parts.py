"""The parts of a `ModelSpec`: frozen, validated on construction, standard library only.

Every field is a plain number, string, boolean, tuple or another part, so that a spec is hashable and has exactly one
JSON form. `None` means "the usual choice", which the docstring of the field names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from varprop.errors import SpecError, require

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu", "identity"]
Block = Literal["sequential", "parallel"]
DepthRule = Literal["one", "inverse_sqrt_2L", "inverse_sqrt_L", "inverse_L", "deepnorm"]
MaskKind = Literal["bernoulli", "magnitude", "n_of_m", "block"]
Matrix = Literal["q", "k", "v", "o", "gate", "up", "down", "router"]
Placement = Literal["pre", "post", "peri", "reordered", "mix", "lns"]
MATRICES: tuple[str, ...] = get_args(Matrix)


LARGEST_INTEGER = 10**9
"""No dimension of a model comes near it; beyond it an integer is a slip."""


def _positive_integer(name: str, value: Any, minimum: int = 1) -> None:
    domain = f"an integer in {minimum}..{LARGEST_INTEGER}"
    require(isinstance(value, int) and not isinstance(value, bool), SpecError, name, value, "not an integer", domain)
    require(value >= minimum, SpecError, name, value, "too small", domain)
    require(value <= LARGEST_INTEGER, SpecError, name, value, "too large", domain)


def _flag(name: str, value: Any) -> None:
    require(isinstance(value, bool), SpecError, name, value, "not a boolean", "true or false")


def _in_interval(name: str, value: Any, low: float, high: float, domain: str) -> None:
    """Require low < value <= high and finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(number and low < value <= high, SpecError, name, value, "outside the domain", domain)


def _positive(name: str, value: Any) -> None:
    """Scales beyond these bounds are slips, and their powers would leave the floating-point range."""
    _in_interval(name, value, 0.99e-12, 1e12, "a number in 1e-12..1e12")


def _one_of(name: str, value: Any, choices: Any) -> None:
    allowed = get_args(choices)
    require(value in allowed, SpecError, name, value, "unknown", "one of " + ", ".join(allowed))


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """A fixed 0/1 mask on one weight matrix, drawn once per network.

    kind: `bernoulli` keeps each entry independently with probability `density`; `magnitude` keeps the largest
    `density` of the entries by absolute value; `n_of_m` keeps the `density * group` largest of every `group`
    consecutive inputs of a neuron; `block` keeps square blocks of side `block_size` independently.
    rescale: the factor on kept entries: 1, 1/sqrt(density) or 1/density.
    """

    kind: MaskKind = "bernoulli"
    density: float
    rescale: Literal["none", "inverse_sqrt", "inverse"] = "none"
    group: int = 4
    block_size: int = 16

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, MaskKind)
        _in_interval("density", self.density, 0.99e-12, 1.0, "a number in (0, 1], not below 1e-12")
        _one_of("rescale", self.rescale, Literal["none", "inverse_sqrt", "inverse"])
        _positive_integer("group", self.group)
        _positive_integer("block_size", self.block_size)
        if self.kind == "n_of_m":
            kept = self.density * self.group
            require(
                abs(kept - round(kept)) < 1e-9 and round(kept) >= 1,
                SpecError,
                "density",
                self.density,
                f"not a multiple of 1/{self.group}",
                f"n/{self.group} with n an integer in 1..{self.group}",
            )

    @property
    def factor(self) -> float:
        """The factor by which kept entries are multiplied."""
        return {"none": 1.0, "inverse_sqrt": self.density**-0.5, "inverse": 1.0 / self.density}[self.rescale]


@dataclass(frozen=True, kw_only=True)
class WeightMasks:
    """One mask per kind of matrix; None is dense. `gate up down` apply to the dense, expert and shared feed-forward."""

    q: MaskSpec | None = None
    k: MaskSpec | None = None
    v: MaskSpec | None = None
    o: MaskSpec | None = None
    gate: MaskSpec | None = None
    up: MaskSpec | None = None
    down: MaskSpec | None = None
    router: MaskSpec | None = None

    def __post_init__(self) -> None:
        for name in MATRICES:
            mask = getattr(self, name)
            right = mask is None or isinstance(mask, MaskSpec)
            require(right, SpecError, f"masks.{name}", mask, f"a {type(mask).__name__}", "a MaskSpec or None")

    @classmethod
    def uniform(cls, density: float, kind: MaskKind = "bernoulli", **options: Any) -> WeightMasks:
        """The same mask on every matrix of a block except the router; density 1 is dense."""
        mask = MaskSpec(kind=kind, density=density, **options)
        return cls() if density == 1.0 else cls(q=mask, k=mask, v=mask, o=mask, gate=mask, up=mask, down=mask)

    def of(self, matrix: str) -> MaskSpec | None:
        """The mask of a matrix kind, or None where it is dense or takes no mask (embeddings)."""
        return getattr(self, matrix, None)

    @property
    def any(self) -> bool:
        """Whether some matrix is masked."""
        return any(getattr(self, f.name) is not None for f in fields(self))


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Multi-head softmax attention.

    n_kv_heads: key/value heads; None = n_heads. head_dim: None = d_model / n_heads.
    rope_theta: base of the rotary embedding, None = no positions. rope_fraction: share of head_dim that is rotated.
    qk_norm: RMS norm on queries and keys, per `head` (Qwen3) or over the whole `projection` (OLMo2).
    logit_scale: None = 1/sqrt(head_dim). logit_softcap: cap * tanh(logit / cap), None = off.
    pattern: `causal`, `window` (causal, the last `window` keys, itself included) or `full`.
    n_sink_tokens: first positions that a window always sees. sink_logit: one extra learned logit per head (initially
    0) that takes probability and gives nothing.
    key_mask_density: each key is kept with this probability for each query and head, itself always;
    key_mask_place: before the softmax (renormalised) or after it (not renormalised).
    """

    n_heads: int
    n_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float | None = 10_000.0
    rope_fraction: float = 1.0
    qk_norm: Literal["none", "head", "projection"] = "none"
    logit_scale: float | None = None
    logit_softcap: float | None = None
    pattern: Literal["causal", "window", "full"] = "causal"
    window: int | None = None
    n_sink_tokens: int = 0
    sink_logit: bool = False
    key_mask_density: float = 1.0
    key_mask_place: Literal["before_softmax", "after_softmax"] = "before_softmax"
    qkv_bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        _positive_integer("n_heads", self.n_heads)
        if self.n_kv_heads is not None:
            _positive_integer("n_kv_heads", self.n_kv_heads)
            require(
                self.n_heads % self.n_kv_heads == 0,
                SpecError,
                "n_kv_heads",
                self.n_kv_heads,
                f"not a divisor of n_heads={self.n_heads}",
                "a divisor of n_heads",
            )
            if self.n_kv_heads == self.n_heads:  # one canonical form for multi-head attention
                object.__setattr__(self, "n_kv_heads", None)
        if self.head_dim is not None:
            _positive_integer("head_dim", self.head_dim)
        for name in ("rope_theta", "logit_scale", "logit_softcap"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        _in_interval("rope_fraction", self.rope_fraction, 0.0, 1.0, "a number in (0, 1]")
        _one_of("qk_norm", self.qk_norm, Literal["none", "head", "projection"])
        _one_of("pattern", self.pattern, Literal["causal", "window", "full"])
        if self.window is not None:
            _positive_integer("window", self.window)
        require(
            self.window is None or self.pattern == "window",
            SpecError,
            "window",
            self.window,
            f"given with pattern={self.pattern!r}",
            "pattern='window'",
        )
        _positive_integer("n_sink_tokens", self.n_sink_tokens, minimum=0)
        _in_interval("key_mask_density", self.key_mask_density, 0.0, 1.0, "a number in (0, 1]")
        _one_of("key_mask_place", self.key_mask_place, Literal["before_softmax", "after_softmax"])
        for name in ("sink_logit", "qkv_bias", "output_bias"):
            _flag(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """`down(phi(up x))`, or gated `down(phi(gate x) * up x)`. `gelu` is the erf form, `gelu_tanh` its approximation."""

    d_ff: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _positive_integer("d_ff", self.d_ff)
        _flag("gated", self.gated)
        _flag("bias", self.bias)
        _one_of("activation", self.activation, Activation)


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A mixture of experts in place of the feed-forward.

    router: `softmax` over all experts or elementwise `sigmoid`. gate_order: scores first and then the top k of them,
    or the top k logits first and scores over those. normalize_gates: gates divided by their sum over the top k.
    gate_multiplier: constant on the routed sum (DeepSeek's routed_scaling_factor). router_bias: a per-expert bias used
    for selection only (initially 0). routing: each token takes its top k experts, or each expert its top tokens.
    n_shared_experts: experts of width d_expert that every token uses, evaluated as one network of their total width.
    shared_mixing: `sum` = shared + routed; `mean` = (shared + top_k * routed) / (top_k + 1). shared_gate: the shared
    output is multiplied by the sigmoid of a learned projection (Qwen2-MoE).
    """

    n_experts: int
    top_k: int
    d_expert: int
    n_shared_experts: int = 0
    normalize_gates: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    gate_order: Literal["score_then_top_k", "top_k_then_score"] = "score_then_top_k"
    gate_multiplier: float = 1.0
    router_bias: bool = False
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    shared_mixing: Literal["sum", "mean"] = "sum"
    shared_gate: bool = False
    activation: Activation = "silu"
    gated: bool = True

    def __post_init__(self) -> None:
        _positive_integer("n_experts", self.n_experts)
        _positive_integer("top_k", self.top_k)
        require(
            self.top_k <= self.n_experts,
            SpecError,
            "top_k",
            self.top_k,
            f"larger than n_experts={self.n_experts}",
            "1 <= top_k <= n_experts",
        )
        _positive_integer("d_expert", self.d_expert)
        _positive_integer("n_shared_experts", self.n_shared_experts, minimum=0)
        _one_of("router", self.router, Literal["softmax", "sigmoid"])
        _one_of("gate_order", self.gate_order, Literal["score_then_top_k", "top_k_then_score"])
        _positive("gate_multiplier", self.gate_multiplier)
        _one_of("routing", self.routing, Literal["token_choice", "expert_choice"])
        _one_of("shared_mixing", self.shared_mixing, Literal["sum", "mean"])
        for name in ("normalize_gates", "router_bias", "shared_gate", "gated"):
            _flag(name, getattr(self, name))
        _one_of("activation", self.activation, Activation)
        require(
            self.n_shared_experts > 0 or not self.shared_gate,
            SpecError,
            "shared_gate",
            self.shared_gate,
            "given without shared experts",
            "n_shared_experts >= 1",
        )


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """The normalisation and where it stands.

    placement: `pre` x + f(N x); `post` N(x + f x); `peri` x + N(f(N x)); `reordered` x + N(f x) (OLMo2);
    `mix` the first `post_fraction` of the layers post, the rest pre (Mix-LN); `lns` x + f(N(x) / sqrt(layer)).
    gain, bias: whether the norm has them (initially 1 and 0). final: whether a norm stands before the unembedding.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    placement: Placement = "pre"
    post_fraction: float = 0.25
    gain: bool = True
    bias: bool = False
    final: bool = True

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, Literal["rms", "layer"])
        _in_interval("eps", self.eps, -1e-300, 1.0, "a number in [0, 1]")
        _one_of("placement", self.placement, Placement)
        _in_interval("post_fraction", self.post_fraction, 0.0, 1.0, "a number in (0, 1]")
        for name in ("gain", "bias", "final"):
            _flag(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """Multipliers of a residual sum `skip * x + branch * f`; the depth rule sets both, the two factors multiply them.

    `one` 1 and 1; `inverse_sqrt_2L` branch 1/sqrt(2 L); `inverse_sqrt_L` branch 1/sqrt(L); `inverse_L` branch 1/L;
    `deepnorm` skip (2 L)^(1/4), with the initial gain (8 L)^(-1/4) on v, o and the feed-forward (arXiv 2203.00555).
    """

    rule: DepthRule = "one"
    branch_multiplier: float = 1.0
    skip_multiplier: float = 1.0

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, DepthRule)
        _positive("branch_multiplier", self.branch_multiplier)
        _positive("skip_multiplier", self.skip_multiplier)


@dataclass(frozen=True, kw_only=True)
class InitSpec:
    """Standard deviation of the entries of every matrix before masking; entries are Gaussian with mean zero.

    rule: `fixed` = std; `fan_in` = gain / sqrt(fan_in); `xavier` = gain * sqrt(2 / (fan_in + fan_out)).
    output_scaling: extra factor on the matrices that write to the stream (o, down).
    embedding_std: None = std for the rule `fixed`, else 1.
    overrides: std by matrix name (`embed unembed q k v o gate up down router shared_gate`), over everything else.
    """

    rule: Literal["fixed", "fan_in", "xavier"] = "fan_in"
    std: float = 0.02
    gain: float = 1.0
    output_scaling: Literal["one", "inverse_sqrt_2L"] = "one"
    embedding_std: float | None = None
    overrides: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        _one_of("rule", self.rule, Literal["fixed", "fan_in", "xavier"])
        _positive("std", self.std)
        _positive("gain", self.gain)
        _one_of("output_scaling", self.output_scaling, Literal["one", "inverse_sqrt_2L"])
        if self.embedding_std is not None:
            _positive("embedding_std", self.embedding_std)
        names = ("embed", "unembed", "shared_gate", *MATRICES)
        try:
            pairs = tuple(sorted(dict(self.overrides).items()))
        except (TypeError, ValueError):
            raise SpecError(
                f"overrides={self.overrides!r} is no mapping; expected matrix name: standard deviation"
            ) from None
        for name, std in pairs:
            require(name in names, SpecError, "overrides", name, "an unknown matrix", "one of " + ", ".join(names))
            _positive(f"overrides.{name}", std)
        object.__setattr__(self, "overrides", pairs)
