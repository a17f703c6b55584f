"""Tools to test your own rules: hypothesis strategies for specs and moments, and statistical assertions.

The network is the replicate: `assert_agrees` takes one number per network and states its false-fail rate. The
strategies need hypothesis (`pip install hypothesis`); the assertions do not.

    from hypothesis import given
    from varprop import simulate, testing

    @given(spec=testing.model_specs(placements=("pre",)), c=testing.correlations())
    def test_my_rule_is_positive(spec, c):
        assert my_rule(spec, c) > 0

    def test_my_rule_against_networks():
        drawn = simulate.sample(spec, n_networks=100, n_tokens=16)
        testing.assert_agrees(my_rule(spec, 0.0), drawn.second_moment.sel(layer=1, site="mlp_out"), claimed_error=0.01)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import ArrayLike

from varprop import stats
from varprop.errors import ArgumentError, require
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, MaskSpec, ModelSpec, MoESpec, NormSpec, WeightMasks
from varprop.spec.parts import Activation, Placement

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

PLACEMENTS: tuple[str, ...] = get_args(Placement)
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError:
        raise ImportError(
            "hypothesis is missing; the strategies of varprop.testing need: pip install hypothesis"
        ) from None
    return strategies


def correlations() -> SearchStrategy[float]:
    """Token correlations in [0, 1], both ends included.

    >>> correlations().validate()
    """
    return _strategies().floats(0.0, 1.0)


def densities(smallest: float = 0.01) -> SearchStrategy[float]:
    """Densities of a mask in [smallest, 1], 1 included.

    >>> densities(0.1).validate()
    """
    return _strategies().floats(smallest, 1.0)


def mask_specs() -> SearchStrategy[MaskSpec]:
    """Weight masks of every kind and rescaling; n_of_m with groups of 4, blocks of side 4.

    >>> mask_specs().validate()
    """
    st = _strategies()
    rescale = st.sampled_from(["none", "inverse_sqrt", "inverse"])
    free = st.builds(
        MaskSpec,
        kind=st.sampled_from(["bernoulli", "magnitude", "block"]),
        density=densities(),
        rescale=rescale,
        block_size=st.just(4),
    )
    fixed = st.builds(
        MaskSpec, kind=st.just("n_of_m"), density=st.sampled_from([0.25, 0.5, 0.75, 1.0]), rescale=rescale
    )
    return st.one_of(free, fixed)


def attention_specs() -> SearchStrategy[AttentionSpec]:
    """Attention of 1, 2 or 4 heads, keys shared or not, every pattern, norm, cap, sink and key mask.

    >>> attention_specs().validate()
    """
    st = _strategies()

    @st.composite
    def draw_one(draw: Any) -> AttentionSpec:
        n_heads = draw(st.sampled_from([1, 2, 4]))
        pattern = draw(st.sampled_from(["causal", "full", "window"]))
        return AttentionSpec(
            n_heads=n_heads,
            n_kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if n_heads % n == 0])),
            rope_theta=draw(st.sampled_from([None, 1e4])),
            qk_norm=draw(st.sampled_from(["none", "head", "projection"])),
            logit_softcap=draw(st.sampled_from([None, 30.0])),
            pattern=pattern,
            window=draw(st.integers(1, 6)) if pattern == "window" else None,
            n_sink_tokens=draw(st.integers(0, 1)) if pattern == "window" else 0,
            sink_logit=draw(st.booleans()),
            key_mask_density=draw(st.sampled_from([1.0, 0.5])),
            key_mask_place=draw(st.sampled_from(["before_softmax", "after_softmax"])),
        )

    return draw_one()


def model_specs(
    placements: Sequence[str] = PLACEMENTS, *, max_layers: int = 3, mixtures: bool = True, masks: bool = True
) -> SearchStrategy[ModelSpec]:
    """Small valid specs: d_model 16 or 32, 1..max_layers layers, dense or mixture or both in turn, any attention.

    placements: norm placements to draw from; mixtures, masks: whether mixtures of experts and weight masks appear.

    >>> model_specs(placements=("pre",)).validate()
    """
    st = _strategies()
    for placement in placements:
        require(placement in PLACEMENTS, ArgumentError, "placements", placement, "unknown", ", ".join(PLACEMENTS))

    @st.composite
    def draw_one(draw: Any) -> ModelSpec:
        parts = draw(st.sampled_from(["dense", "moe", "both"])) if mixtures else "dense"
        activation, gated = draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())
        placement = draw(st.sampled_from(list(placements)))
        parallel = placement not in ("post", "mix") and draw(st.booleans())
        n_experts = draw(st.sampled_from([1, 4, 8]))
        moe = MoESpec(
            n_experts=n_experts,
            top_k=draw(st.integers(1, n_experts)),
            d_expert=8,
            n_shared_experts=draw(st.integers(0, 2)),
            normalize_gates=draw(st.booleans()),
            router=draw(st.sampled_from(["softmax", "sigmoid"])),
            activation=activation,
            gated=gated,
        )
        return ModelSpec(
            d_model=draw(st.sampled_from([16, 32])),
            n_layers=draw(st.integers(1, max_layers)),
            attention=draw(st.one_of(st.none(), attention_specs())),
            feed_forward=None if parts == "moe" else FeedForwardSpec(d_ff=48, activation=activation, gated=gated),
            moe=None if parts == "dense" else moe,
            moe_pattern=(False, True) if parts == "both" else (),
            block="parallel" if parallel else "sequential",
            norm=NormSpec(kind=draw(st.sampled_from(["rms", "layer"])), placement=placement),  # type: ignore[arg-type]
            init=InitSpec(
                rule=draw(st.sampled_from(["fixed", "fan_in", "xavier"])),
                overrides=draw(st.sampled_from([(), (("up", 0.5),)])),
            ),
            masks=draw(_uniform_masks()) if masks else WeightMasks(),
        )

    return draw_one()


def _uniform_masks() -> SearchStrategy[WeightMasks]:
    """No mask, or one mask on every matrix of a block but the router."""
    st = _strategies()
    one = mask_specs().map(lambda m: WeightMasks(q=m, k=m, v=m, o=m, gate=m, up=m, down=m))
    return st.one_of(st.just(WeightMasks()), one)


def assert_agrees(
    prediction: ArrayLike,
    networks: ArrayLike,
    *,
    claimed_error: ArrayLike = 0.0,
    false_fail_rate: float = 0.001,
    resolution: float | None = None,
    log_scale: bool = True,
) -> None:
    """`AssertionError` unless the mean over networks lies within `claimed_error` of `prediction`, element by element.

    prediction: numbers, any shape; networks: (n_networks, *shape), one replicate along the first axis; claimed_error:
    relative where `log_scale` (positive quantities: moments), absolute elsewhere (correlations). A correct prediction
    fails with probability `false_fail_rate` at most, over all elements together (t test on the band, Holm).
    resolution: also fail where an error of this size would not be found with probability 0.9: too few networks.
    Raises `ArgumentError` for shapes that do not match, numbers that are not finite, or fewer than 2 networks.
    Source: `stats.band_p_value`, `stats.holm`. Checked by: tests/test_testing.py.

    >>> draws = np.random.default_rng(0).normal(2.0, 0.1, 50)
    >>> assert_agrees(2.0, draws, resolution=0.1)
    >>> assert_agrees(2.2, draws)
    Traceback (most recent call last):
    AssertionError: prediction 2.2, mean of 50 networks 2.0129: log ratio -0.0889 ± 0.0065, claimed 0, adjusted p 1e-17
    """
    predicted, values, band = _checked(prediction, networks, claimed_error, log_scale)
    degrees = len(values) - 1
    if log_scale:
        found, exactly, band = stats.log_mean(values), stats.known_log_mean(predicted), np.log1p(band)
        deviation, stderr = stats.log_deviation(found, exactly), found.stderr
        p_values = stats.log_band_p_value(found, exactly, band, degrees)
        seen = functools.partial(stats.log_detectable_error, found, exactly)
    else:
        mean, stderr = stats.mean_and_stderr(values)
        deviation = mean - predicted
        p_values = stats.band_p_value(deviation, stderr, band, degrees)
        seen = functools.partial(stats.detectable_error, stderr)
    rejected, adjusted = stats.holm(p_values, false_fail_rate)
    if rejected.any():
        at = np.unravel_index(np.argmin(np.where(rejected, adjusted, 2.0)), adjusted.shape)
        where = f" at {tuple(int(i) for i in at)}" if predicted.ndim else ""
        kind = "log ratio" if log_scale else "difference"
        raise AssertionError(
            f"prediction{where} {predicted[at]:.6g}, mean of {len(values)} networks {values.mean(axis=0)[at]:.6g}: "
            f"{kind} {deviation[at]:.3g} ± {stderr[at]:.2g}, claimed {band[at]:.3g}, adjusted p {adjusted[at]:.1g}"
        )
    if resolution is None:
        return
    level = false_fail_rate / max(1, predicted.size)
    smallest = seen(band, degrees, level)
    if (smallest > resolution).any():
        raise AssertionError(
            f"resolution={resolution} is not reached: "
            f"{len(values)} networks would show an error of {smallest.max():.3g}"
        )


def _checked(
    prediction: ArrayLike, networks: ArrayLike, claimed_error: ArrayLike, log_scale: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays of one shape (networks with its leading axis), or `ArgumentError`."""
    arrays = {}
    for name, value in (("prediction", prediction), ("networks", networks), ("claimed_error", claimed_error)):
        try:
            array = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise ArgumentError(f"{name}={value!r} is not numeric; expected numbers") from None
        require(bool(np.isfinite(array).all()), ArgumentError, name, "array", "not finite", "finite numbers")
        arrays[name] = array
    predicted, values = arrays["prediction"], arrays["networks"]
    wrong, expected = "of another shape", f"(n_networks, *{predicted.shape})"
    require(
        values.ndim > 0 and values.shape[1:] == predicted.shape,
        ArgumentError,
        "networks",
        values.shape,
        wrong,
        expected,
    )
    if log_scale:
        require(
            bool((predicted > 0).all()),
            ArgumentError,
            "prediction",
            float(predicted.min()),
            "not positive",
            "numbers > 0",
        )
    lowest = float(arrays["claimed_error"].min())
    require(lowest >= 0, ArgumentError, "claimed_error", lowest, "negative", "numbers >= 0")
    return predicted, values, np.broadcast_to(arrays["claimed_error"], predicted.shape)
