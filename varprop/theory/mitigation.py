"""When does sparsity mitigate: the effect of each mechanism on variance, block share, Jacobian and token correlation.

Two regimes, as ratios to the same model without the mechanism, all at the last layer:

- at initialisation: `predict` of the changed spec, with full attention and no positions (exchangeable tokens);
- a coherent (trained) stream q_l = q_0 + f a l + g b l^2 (coherent.py): the mechanism multiplies the noise a of the
  block outputs by f and their common component b by g.

Two measures of how much the last block does, and they disagree: the share v_L / q_L falls with every common reduction
of the block outputs, the share of log variance ln(q_L / q_{L-1}) / ln(q_L / q_0) rises. In a coherent stream the share
v_L / q_L rises with the noise, and with a falling common component only below `break_even_common_factor`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.coherent import break_even_common_factor, coherent_second_moment, coherent_share, log_share
from varprop.theory.depth import predict
from varprop.theory.domain import check_number
from varprop.theory.jacobian import block_jacobian
from varprop.theory.mechanisms import MECHANISMS, Context, Profile, Stream, attention_of


@dataclass(frozen=True)
class Change:
    """Ratios to the baseline at the last layer: 1 is no effect; token_correlation is a difference, 0 is no effect.

    first_increment: v_1, what the first block adds at the given token correlation, without feedback through depth;
    increment: v_L, of the last block; second_moment: q_L; share: v_L / q_L; log_share: of the
    last block in ln(q_L / q_0); jacobian, token_mean_jacobian: ||J - I||^2 of the last block, every source token for
    one output token, and the paper's token mean (None: not covered by the theory).
    """

    first_increment: float
    increment: float
    second_moment: float
    share: float
    log_share: float
    jacobian: float | None
    token_mean_jacobian: float | None
    token_correlation: float


@dataclass(frozen=True)
class Effect:
    """What one mechanism does at one strength.

    at_init, coherent: see the module; noise_factor, common_factor: f and g; break_even: the common factor below which
    the coherent share rises, given f (-infinity: none does); condition: when the sign flips, in words.
    """

    mechanism: str
    strength: float
    description: str
    at_init: Change
    coherent: Change
    noise_factor: float
    common_factor: float
    break_even: float
    condition: str


def mitigation(
    mechanism: str,
    spec: ModelSpec,
    strength: float | None = None,
    *,
    n_tokens: int = 64,
    token_correlation: float = 0.0,
    branch_correlation: float = 0.5,
    stream: Stream | None = None,
) -> Effect:
    """Effect of one mechanism on a Pre-LN model, at initialisation and for a coherent stream, against the dense one.

    mechanism: one of `MECHANISMS`; spec: the baseline, dense (for `moe`: with a feed-forward part; MoE is compared at
    equal active width top_k * d_expert = d_ff); strength: see the mechanism's description, None = its default;
    n_tokens, token_correlation: of the prediction; full attention without positions is taken in place of the spec's.
    stream: the coherent stream; None: the spec's own mean increment v at initialisation split at `branch_correlation`
    r, b = r^2 v and a = (1 - r^2) v (r = 0.5 gives the published log-log slope near 1.8 at 16 layers).

    Factors f and g. Output masks: (rho, rho^2), exact for masks independent of the weights; magnitude masks (e, e^2),
    leading order in small common entries; masks on all matrices: (F, F^2), F the ratio of v at initialisation, exact
    for linear branches; key masks and context: noise by the ratio at initialisation, common by the square of the mean
    row sum (flat logits); MoE: noise by S_2, common by (E sum of gates)^2 for a component that all experts share;
    GQA and decay: both by F. Branch factors are those of the first block (at the given token correlation), weighted by
    the shares of the branches in what all blocks add. Coherent Jacobians assume v_J proportional to the branch power.
    The correlation r of a coherent stream is the limit of deep layers (`coherent_correlation`); its token correlation
    takes noise as independent and the common component as the same between tokens.

    At initialisation: `predict`, with the error that it states; no Jacobian of key-masked attention.
    Raises `AssumptionError` outside the domain. Source: signs proved in proofs/prove_mitigation.py.
    Checked by: tests/theory/test_mitigation.py.

    >>> from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
    >>> parts = {"attention": AttentionSpec(n_heads=4), "feed_forward": FeedForwardSpec(d_ff=64)}
    >>> spec = ModelSpec(d_model=64, n_layers=4, **parts)
    >>> effect = mitigation("weight_mask", spec, 0.5, n_tokens=8)
    >>> effect.at_init.share < 1, effect.noise_factor, effect.common_factor
    (True, 0.5, 0.25)
    """
    _check(mechanism, spec, n_tokens, token_correlation, branch_correlation)
    rule = MECHANISMS[mechanism]
    baseline = _exchangeable(spec)
    if strength is None:
        strength = float(attention_of(spec).n_heads) if rule.default is None else rule.default
    check_number("strength", strength, 0, above=True)
    changed = rule.change(baseline, strength)
    c = float(token_correlation)
    before = _profile(baseline, n_tokens, c)
    after = _profile(changed, rule.tokens(n_tokens, strength), c)
    stream = _stream(baseline, before, branch_correlation, c) if stream is None else stream
    context = Context(baseline, float(strength), before, after, stream, n_tokens)
    f, g = rule.factors(context)
    at = stream.n_layers, stream.noise, stream.common, stream.start
    return Effect(
        mechanism,
        float(strength),
        rule.description,
        _initial_change(before, after),
        _coherent_change(stream, f, g),
        f,
        g,
        float(break_even_common_factor(*at, f)),
        rule.condition(context, f),
    )


def mitigation_table(
    spec: ModelSpec,
    *,
    strengths: Mapping[str, float] | None = None,
    n_tokens: int = 64,
    token_correlation: float = 0.0,
    branch_correlation: float = 0.5,
    stream: Stream | None = None,
) -> list[Effect]:
    """`mitigation` of every mechanism that the spec has a place for; arguments as there, strengths by mechanism."""
    given = strengths or {}
    unknown = [name for name in given if name not in MECHANISMS]
    require(not unknown, AssumptionError, "strengths", unknown, "unknown", "names among " + ", ".join(MECHANISMS))
    needs_attention = ("key_mask_before_softmax", "key_mask_after_softmax", "long_context", "gqa")
    names = [name for name in MECHANISMS if spec.attention is not None or name not in needs_attention]
    names = [name for name in names if spec.feed_forward is not None or not name.startswith("moe")]
    return [
        mitigation(
            name,
            spec,
            given.get(name),
            n_tokens=n_tokens,
            token_correlation=token_correlation,
            branch_correlation=branch_correlation,
            stream=stream,
        )
        for name in names
    ]


COLUMNS = {
    "first_increment": "v_1",
    "increment": "v_L",
    "second_moment": "q_L",
    "share": "share v/q",
    "log_share": "log share",
    "jacobian": "‖J-I‖²",
    "token_mean_jacobian": "‖J-I‖², token mean",
}
COHERENT = ["increment", "second_moment", "share", "log_share"]
"""Columns of a coherent stream: all layers add alike, and the Jacobian follows the share by assumption."""


def as_markdown(effects: Sequence[Effect]) -> str:
    """Two tables of changes in percent, initial and coherent; the token correlation as a difference."""
    initial = [_cells(effect.at_init, list(COLUMNS)) for effect in effects]
    coherent = [
        [
            *_cells(effect.coherent, COHERENT),
            f"{effect.noise_factor:.3g}, {effect.common_factor:.3g}",
            effect.condition,
        ]
        for effect in effects
    ]
    names = [f"{effect.mechanism.replace('_', ' ')} {effect.strength:g}" for effect in effects]
    first = _table(["at initialisation", *COLUMNS.values(), "token correlation"], names, initial)
    head = [
        "coherent stream",
        *(COLUMNS[name] for name in COHERENT),
        "token correlation",
        "f, g",
        "when the sign flips",
    ]
    return f"{first}\n\n{_table(head, names, coherent)}"


def _cells(change: Change, columns: Sequence[str]) -> list[str]:
    return [*(_percent(getattr(change, name)) for name in columns), f"{change.token_correlation:+.3f}"]


def _table(head: Sequence[str], names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines.extend("| " + " | ".join((name, *row)) + " |" for name, row in zip(names, rows, strict=True))
    return "\n".join(lines)


def _percent(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return "0" if abs(ratio - 1) < 5e-4 else f"{100 * (ratio - 1):+.3g} %"


def _check(mechanism: str, spec: ModelSpec, n_tokens: int, token_correlation: float, branch_correlation: float) -> None:
    expected = "one of " + ", ".join(MECHANISMS)
    known = isinstance(mechanism, str) and mechanism in MECHANISMS
    require(known, AssumptionError, "mechanism", mechanism, "unknown", expected)
    require(isinstance(spec, ModelSpec), AssumptionError, "spec", spec, "no model description", "a ModelSpec")
    check_number("n_tokens", n_tokens, 2, integer=True)
    check_number("token_correlation", token_correlation, 0, 1)
    check_number("branch_correlation", branch_correlation, 0, 1)
    require(
        spec.norm.placement == "pre", AssumptionError, "norm.placement", spec.norm.placement, "not covered", "'pre'"
    )


def _exchangeable(spec: ModelSpec) -> ModelSpec:
    """The spec without mechanisms of attention: full, one key/value head a query head, no positions, masks or sinks."""
    if spec.attention is None:
        return spec
    plain = {
        **{"pattern": "full", "rope_theta": None, "window": None, "n_sink_tokens": 0, "sink_logit": False},
        **{"n_kv_heads": None, "key_mask_density": 1.0},
    }
    return replace(spec, attention=replace(spec.attention, **plain), window_pattern=())


def _stream(spec: ModelSpec, profile: Profile, branch_correlation: float, token_correlation: float) -> Stream:
    increment = (profile.attention_total + profile.mlp_total) / spec.n_layers
    common = branch_correlation**2 * increment
    return Stream(increment - common, common, profile.start, spec.n_layers, token_correlation)


@functools.lru_cache(maxsize=64)
def _profile(spec: ModelSpec, n_tokens: int, token_correlation: float) -> Profile:
    result = predict(spec, n_tokens=n_tokens, token_correlation=token_correlation)
    site = {name: result.second_moment.sel(site=name).values for name in result.site.values.tolist()}
    correlation = {name: result.token_correlation.sel(site=name).values for name in ("resid_pre", "resid_mid")}
    attention, mlp, post = site["attn_out"][1:], site["mlp_out"][1:], site["resid_post"]
    try:
        jacobian = block_jacobian(
            spec,
            spec.n_layers,
            n_tokens=n_tokens,
            second_moment=float(site["resid_pre"][-1]),
            token_correlation=float(np.clip(correlation["resid_pre"][-1], 0, 1)),
            middle_second_moment=float(site["resid_mid"][-1]),
            middle_token_correlation=float(np.clip(correlation["resid_mid"][-1], 0, 1)),
        )
    except AssumptionError:  # key masks: no formula
        jacobian = None
    return Profile(
        start=float(post[0]),
        before=float(post[-2]),
        last=float(post[-1]),
        attention_first=float(attention[0]),
        mlp_first=float(mlp[0]),
        increment=float(attention[-1] + mlp[-1]),
        attention_total=float(attention.sum()),
        mlp_total=float(mlp.sum()),
        token_correlation=float(result.token_correlation.sel(site="resid_post").values[-1]),
        jacobian=None if jacobian is None else dict(jacobian),
    )


def _initial_change(before: Profile, after: Profile) -> Change:
    def jacobian(name: str) -> float | None:
        if before.jacobian is None or after.jacobian is None:
            return None
        return after.jacobian[name] / before.jacobian[name]

    def log(profile: Profile) -> float:
        return float(log_share(profile.before, profile.last, profile.start, profile.last))

    return Change(
        first_increment=(after.attention_first + after.mlp_first) / (before.attention_first + before.mlp_first),
        increment=after.increment / before.increment,
        second_moment=after.last / before.last,
        share=after.increment / after.last * before.last / before.increment,
        log_share=log(after) / log(before),
        jacobian=jacobian("all_sources"),
        token_mean_jacobian=jacobian("token_mean"),
        token_correlation=after.token_correlation - before.token_correlation,
    )


def _coherent_change(stream: Stream, f: float, g: float) -> Change:
    at = stream.noise, stream.common, stream.start

    def second_moment(layer: int, *factors: float) -> float:
        return float(coherent_second_moment(layer, *at, *factors))

    def log(*factors: float) -> float:
        last = second_moment(depth, *factors)
        return float(log_share(second_moment(depth - 1, *factors), last, stream.start, last))

    def correlation(common_factor: float, total: float) -> float:
        return (stream.start * stream.token_correlation + common_factor * stream.common * depth**2) / total

    depth = stream.n_layers
    before, after = second_moment(depth), second_moment(depth, f, g)
    share = float(coherent_share(depth, *at, f, g) / coherent_share(depth, *at))
    power = (f * stream.noise + g * stream.common) / (stream.noise + stream.common)
    return Change(
        first_increment=power,
        increment=power,
        second_moment=after / before,
        share=share,
        log_share=log(f, g) / log(1.0, 1.0),
        jacobian=share,
        token_mean_jacobian=None,
        token_correlation=correlation(g, after) - correlation(1.0, before),
    )
