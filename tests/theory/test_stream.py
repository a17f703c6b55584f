"""varprop.theory.stream: bounds, asymptote and fixed point against the iterated recursion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.errors import AssumptionError
from varprop.theory.stream import (
    aligned_asymptote,
    aligned_bounds,
    stationary_second_moment,
    stream_profile,
    stream_step,
    triangle_bound,
)

positive = st.floats(1e-3, 1e3)


@given(start=positive, steps=st.lists(st.tuples(positive, st.floats(-1, 1)), min_size=1, max_size=30))
def test_triangle_bound_holds_and_is_attained(start, steps):
    increments, correlations = np.array(steps).T
    bound = triangle_bound(start, np.sqrt(increments).sum())
    assert stream_profile(start, increments, correlations)[-1] <= bound * (1 + 1e-12)
    assert stream_profile(start, increments, 1.0)[-1] == pytest.approx(bound, rel=1e-12)


def test_step_is_the_norm_of_a_sum_of_vectors():
    """Two vectors of exact cosine r."""
    rng = np.random.default_rng(0)
    x, y = np.linalg.qr(rng.standard_normal((64, 2)))[0].T
    for r in (-1.0, -0.4, 0.0, 0.7):
        stream, branch = 3.0 * x, 2.0 * (r * x + np.sqrt(1 - r**2) * y)
        assert stream_step(9.0, 4.0, r, 0.5) == pytest.approx(float(np.sum((0.5 * stream + branch) ** 2)))


@pytest.mark.parametrize(
    "correlation,errors", [(0.3, (0.11, 0.012, 0.0012)), (0.5, (0.018, 0.011, 0.0035)), (0.8, (0.035, 0.01, 0.0025))]
)
def test_asymptote_at_16_64_256(correlation, errors):
    profile = stream_profile(0.0, np.ones(4096), correlation)
    for layer, error in zip((16, 64, 256), errors, strict=True):
        assert abs(aligned_asymptote(layer, 1.0, 1.0, correlation) / profile[layer] - 1) < error
    far = abs(aligned_asymptote(4096, 1.0, 1.0, correlation) / profile[4096] - 1)
    assert far < 3e-4  # like 1 / l: sqrt(q) is off by a constant


def test_full_correlation_is_exact():
    assert aligned_asymptote(50, 2.0, 2.0**0.5, 1.0, 3.0) == pytest.approx(
        stream_profile(3.0, np.full(50, 2.0), 1.0)[-1]
    )


@given(layer=st.integers(0, 200), increment=positive, correlation=st.floats(0.01, 1.0), start=st.floats(0, 1e3))
def test_bounds_bracket_the_recursion(layer, increment, correlation, start):
    low, high = aligned_bounds(layer, increment, correlation, start)
    last = stream_profile(start, np.full(layer, increment), correlation)[-1]
    assert low * (1 - 1e-9) <= last <= high * (1 + 1e-9)


@settings(max_examples=30)
@given(increment=positive, ratio=st.floats(1e-3, 1e3), correlation=st.floats(-0.9, -0.3))
def test_negative_correlation_settles(increment, ratio, correlation):
    limit = stationary_second_moment(increment, correlation)
    last = stream_profile(ratio * increment, np.full(400, increment), correlation)[-1]
    assert limit == pytest.approx(increment / (4 * correlation**2))
    assert last == pytest.approx(limit, rel=1e-6)


@pytest.mark.parametrize("bad", ["x", None, float("nan"), float("inf"), -1.0, True])
def test_bad_input_is_one_line(bad):
    for call in (
        lambda: stream_step(bad, 1.0),
        lambda: stream_step(1.0, bad),
        lambda: stationary_second_moment(bad, -0.5),
        lambda: aligned_bounds(3, bad, 0.5),
    ):
        with pytest.raises(AssumptionError, match=r"^\w+=.* expected [^\n]*$"):
            call()


@pytest.mark.parametrize("correlation,skip", [(0.0, 1.0), (0.5, 1.0), (-1.0, 1.0), (0.0, 1.5), (2.0, 0.5)])
def test_no_fixed_point(correlation, skip):
    with pytest.raises(AssumptionError, match="expected"):
        stationary_second_moment(1.0, correlation, skip)
