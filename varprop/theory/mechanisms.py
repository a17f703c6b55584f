"""The mechanisms of mitigation.py: what each changes in a spec, its factors (f, g) on noise and common component of the
block outputs, and when the sign of its effect on the block share flips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from varprop.errors import AssumptionError, require
from varprop.spec import AttentionSpec, MaskSpec, ModelSpec, MoESpec, WeightMasks, layer_table
from varprop.theory.coherent import (
    break_even_common_factor,
    break_even_density,
    critical_correlation,
    optimal_density,
)
from varprop.theory.domain import check_number
from varprop.theory.gates import gate_first_moment
from varprop.theory.linear import effective_gain, magnitude_retained_variance


@dataclass(frozen=True)
class Stream:
    """A coherent stream: noise a, common b, start q_0 (coherent.py), its depth, and the embeddings' correlation."""

    noise: float
    common: float
    start: float
    n_layers: int
    token_correlation: float = 0.0

    def __post_init__(self) -> None:
        check_number("noise", self.noise, 0)
        check_number("common", self.common, 0)
        check_number("noise + common", self.noise + self.common, 0, above=True)
        check_number("start", self.start, 0, above=True)
        check_number("n_layers", self.n_layers, 1, integer=True)
        check_number("token_correlation", self.token_correlation, 0, 1)


@dataclass(frozen=True)
class Profile:
    """Second moments at the first and last layer and per-branch sums over the layers, of one prediction."""

    start: float
    before: float
    last: float
    attention_first: float
    mlp_first: float
    increment: float
    attention_total: float
    mlp_total: float
    token_correlation: float
    jacobian: dict[str, float] | None


@dataclass(frozen=True)
class Context:
    """Everything that factors and conditions may depend on."""

    spec: ModelSpec
    strength: float
    base: Profile
    changed: Profile
    stream: Stream
    n_tokens: int

    @property
    def attention_share(self) -> float:
        """Share of the attention in what the blocks add at initialisation."""
        return self.base.attention_total / (self.base.attention_total + self.base.mlp_total)

    def mixed(self, attention: float, mlp: float) -> float:
        """A factor on attention and one on the feed-forward part, weighted by their shares."""
        return self.attention_share * attention + (1 - self.attention_share) * mlp


Factors = Callable[[Context], tuple[float, float]]


@dataclass(frozen=True)
class Mechanism:
    default: float | None
    description: str
    change: Callable[[ModelSpec, float], ModelSpec]
    factors: Factors
    condition: Callable[[Context, float], str]
    tokens: Callable[[int, float], int] = lambda n_tokens, strength: n_tokens


# What each mechanism changes in the spec ------------------------------------------------------------------------------


def _density(strength: float) -> None:
    check_number("strength", strength, 0, 1, above=True)


def _masked(spec: ModelSpec, density: float, kind: str, matrices: Sequence[str]) -> ModelSpec:
    _density(density)
    require(not spec.masks.any, AssumptionError, "masks", "given", "not dense", "a spec without masks")
    mask = MaskSpec(kind=kind, density=float(density))  # type: ignore[arg-type]
    return replace(spec, masks=WeightMasks(**dict.fromkeys(matrices, mask)))


def _key_masked(spec: ModelSpec, density: float, place: str) -> ModelSpec:
    _density(density)
    part = attention_of(spec)
    return replace(spec, attention=replace(part, key_mask_density=float(density), key_mask_place=place))


def attention_of(spec: ModelSpec) -> AttentionSpec:
    """The attention part; raises `AssumptionError` without one."""
    require(spec.attention is not None, AssumptionError, "attention", None, "absent", "a spec with attention")
    assert spec.attention is not None
    return spec.attention


def _grouped(spec: ModelSpec, group: float) -> ModelSpec:
    part = attention_of(spec)
    good = float(group).is_integer() and group >= 1 and part.n_heads % int(group) == 0
    require(good, AssumptionError, "strength", group, "no group size", f"a divisor of n_heads={part.n_heads}")
    return replace(spec, attention=replace(part, n_kv_heads=part.n_heads // int(group)))


def _longer(spec: ModelSpec, factor: float) -> ModelSpec:
    check_number("strength", factor, 1)
    attention_of(spec)
    return spec


def _mixture(spec: ModelSpec, ratio: float, normalize: bool) -> ModelSpec:
    """Experts of equal active width: top_k * d_expert = d_ff, n_experts = ratio * top_k."""
    part = spec.feed_forward
    require(
        part is not None and spec.moe is None,
        AssumptionError,
        "feed_forward",
        part,
        "not dense",
        "a dense feed-forward",
    )
    assert part is not None
    check_number("strength", ratio, 1)
    require(float(ratio).is_integer(), AssumptionError, "strength", ratio, "not whole", "n_experts / top_k, an integer")
    top_k = math.gcd(8, part.d_ff)
    moe = MoESpec(
        n_experts=int(ratio) * top_k,
        top_k=top_k,
        d_expert=part.d_ff // top_k,
        normalize_gates=normalize,
        activation=part.activation,
        gated=part.gated,
    )
    return replace(spec, feed_forward=None, moe=moe)


def _decayed(spec: ModelSpec, factor: float) -> ModelSpec:
    """Every block matrix at `factor` times its variance; embeddings as they are."""
    _density(factor)
    init, root = spec.init, math.sqrt(factor)
    embedding = spec.tensor_table()[0].init_std
    outside = ("embed", "unembed")
    overrides = tuple((name, std if name in outside else std * root) for name, std in init.overrides)
    scaled = replace(init, std=init.std * root, gain=init.gain * root, embedding_std=embedding, overrides=overrides)
    return replace(spec, init=scaled)


# What they do to noise and common component, and when the sign flips --------------------------------------------------


def _branch_ratios(context: Context) -> tuple[float, float]:
    """Factors on attention and feed-forward part in the first block, so at the given token correlation."""

    def ratio(after: float, before: float) -> float:
        return after / before if before > 0 else 1.0

    base, changed = context.base, context.changed
    return ratio(changed.attention_first, base.attention_first), ratio(changed.mlp_first, base.mlp_first)


def _ratio(context: Context) -> float:
    """Factor on what the blocks add, at the given token correlation."""
    return context.mixed(*_branch_ratios(context))


def _gate_sum(context: Context) -> float:
    """E sum of the active gates: the factor on a component that all experts share."""
    spec = _mixture(context.spec, context.strength, False)
    assert spec.moe is not None
    std = effective_gain(layer_table(spec, 1)["moe.router"]) ** 0.5
    return gate_first_moment(spec.moe.n_experts, spec.moe.top_k, std, normalize=False)


def _mask_condition(context: Context, noise_factor: float) -> str:
    stream = context.stream
    at = stream.n_layers, stream.noise, stream.common, stream.start
    best, even = optimal_density(*at), break_even_density(*at)
    if not even < 1:
        return f"never at layer {stream.n_layers} of this stream: too small a common component or too shallow"
    least = critical_correlation(stream.n_layers, stream.noise + stream.common, stream.start)
    return (
        f"share rises for factors f in ({even:.3g}, 1), most at f = {best:.3g}, if g = f^2 (mask independent of the "
        f"weights) and r > {least:.2g}; never at r = 0 while every layer adds the same"
    )


def _magnitude_condition(context: Context, noise_factor: float) -> str:
    return f"as the weight mask with f = e(density) = {noise_factor:.3g}"


def _even_condition(context: Context, noise_factor: float) -> str:
    at = context.stream
    even = break_even_common_factor(at.n_layers, at.noise, at.common, at.start, noise_factor)
    if not even > 0:
        return "never for this f: no g >= 0 raises the share"
    return f"share rises where the common factor g < {even:.3g}, at this f"


def _mixture_condition(context: Context, noise_factor: float) -> str:
    return (
        f"{_even_condition(context, noise_factor)}; at initialisation the weaker experts leave the share to attention"
    )


def _always(text: str) -> Callable[[Context, float], str]:
    return lambda context, noise_factor: text


def _output_mask(context: Context) -> tuple[float, float]:
    return context.strength, context.strength**2


def _magnitude(context: Context) -> tuple[float, float]:
    kept = float(magnitude_retained_variance(context.strength)) if context.strength < 1 else 1.0
    return kept, kept**2


def _square(context: Context) -> tuple[float, float]:
    return _ratio(context), _ratio(context) ** 2


def _same(context: Context) -> tuple[float, float]:
    return _ratio(context), _ratio(context)


def _rows_kept(context: Context) -> tuple[float, float]:
    return _ratio(context), 1.0


def _rows_thinned(context: Context) -> tuple[float, float]:
    row_sum = context.strength + (1 - context.strength) / context.n_tokens  # the own key is always kept
    return _ratio(context), context.mixed(row_sum, 1.0) ** 2


def _routed(context: Context) -> tuple[float, float]:
    return _ratio(context), context.mixed(1.0, _gate_sum(context)) ** 2


MECHANISMS: dict[str, Mechanism] = {
    "weight_mask": Mechanism(
        0.5,
        "Bernoulli mask on the output matrices (o, down), strength = density",
        lambda spec, x: _masked(spec, x, "bernoulli", ("o", "down")),
        _output_mask,
        _mask_condition,
    ),
    "weight_mask_all": Mechanism(
        0.5,
        "Bernoulli mask on every block matrix, strength = density",
        lambda spec, x: _masked(spec, x, "bernoulli", ("q", "k", "v", "o", "gate", "up", "down")),
        _square,
        _mask_condition,
    ),
    "magnitude_mask": Mechanism(
        0.5,
        "largest entries of the output matrices (o, down), strength = density",
        lambda spec, x: _masked(spec, x, "magnitude", ("o", "down")),
        _magnitude,
        _magnitude_condition,
    ),
    "key_mask_before_softmax": Mechanism(
        0.5,
        "keys dropped at random before the softmax, strength = density",
        lambda spec, x: _key_masked(spec, x, "before_softmax"),
        _rows_kept,
        _always(
            "adds noise (attention's, up to 1/density, at fixed token correlation), and so raises the share; at "
            "initialisation v_L and q_L can fall, where tokens correlate less"
        ),
    ),
    "key_mask_after_softmax": Mechanism(
        0.5,
        "weights dropped at random after the softmax, strength = density",
        lambda spec, x: _key_masked(spec, x, "after_softmax"),
        _rows_thinned,
        _even_condition,
    ),
    "long_context": Mechanism(
        8.0,
        "context longer by the factor strength",
        _longer,
        _rows_kept,
        _always("share never rises: attention averages over more keys, only the noise falls"),
        lambda n_tokens, x: round(n_tokens * x),
    ),
    "gqa": Mechanism(
        None,
        "strength query heads per key/value head",
        _grouped,
        _same,
        _always(
            "no effect at equal gains (Xavier's rule raises them); factor 1 + eta (g-1) kappa for output maps of a "
            "group aligned by eta: falls for eta < 0"
        ),
    ),
    "moe": Mechanism(
        8.0,
        "experts of equal active width, softmax gates not normalised, strength = n_experts / top_k",
        lambda spec, x: _mixture(spec, x, False),
        _routed,
        _mixture_condition,
    ),
    "moe_normalised": Mechanism(
        8.0,
        "experts of equal active width, gates normalised, strength = n_experts / top_k",
        lambda spec, x: _mixture(spec, x, True),
        lambda context: (_routed(context)[0], 1.0),
        _always("share never rises while the experts have their common component in common (g = 1)"),
    ),
    "weight_decay": Mechanism(
        0.5,
        "variance of every block weight times strength (AdamW equilibrium: decay times 1 / strength)",
        _decayed,
        _same,
        _always("share never rises: noise and common component fall alike (f = g)"),
    ),
}
