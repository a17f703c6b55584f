"""varprop.testing: the strategies give valid specs of every kind, and the assertion keeps its rates."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings

from varprop import testing
from varprop.errors import ArgumentError
from varprop.spec import MaskSpec, ModelSpec
from varprop.theory.linear import retained_variance


@settings(max_examples=50, deadline=None)
@given(spec=testing.model_specs())
def test_specs_are_valid_and_small(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert spec.parameter_counts()["body"] < 500_000


@settings(max_examples=30, deadline=None)
@given(spec=testing.model_specs(placements=("pre",), mixtures=False, masks=False))
def test_options_restrict_the_specs(spec: ModelSpec) -> None:
    assert spec.norm.placement == "pre"
    assert spec.moe is None
    assert not spec.masks.any


@pytest.mark.parametrize(
    "condition",
    [
        lambda s: s.moe is not None and s.moe.n_shared_experts > 0,
        lambda s: s.attention is not None and s.kv_group_size == 4,
        lambda s: s.norm.placement == "lns",
        lambda s: s.block == "parallel",
        lambda s: s.masks.up is not None and s.masks.up.kind == "n_of_m",
        lambda s: s.attention is not None and s.attention.pattern == "window",
    ],
)
def test_every_kind_appears(condition) -> None:
    once = settings(phases=[Phase.generate], max_examples=1000, derandomize=True, database=None)
    assert condition(find(testing.model_specs(), condition, settings=once))


@settings(max_examples=50, deadline=None)
@given(mask=testing.mask_specs(), density=testing.densities(0.2), c=testing.correlations())
def test_numbers_are_in_their_domains(mask: MaskSpec, density: float, c: float) -> None:
    assert 0.2 <= density <= 1
    assert 0 <= c <= 1
    assert retained_variance(mask, 1024) > 0


def test_unknown_placement() -> None:
    with pytest.raises(ArgumentError, match="placements='before' is unknown; expected pre, post"):
        testing.model_specs(placements=("before",))


def test_without_hypothesis(monkeypatch) -> None:
    real = builtins.__import__

    def missing(name, *args):
        if name.startswith("hypothesis"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install hypothesis"):
        testing.correlations()
    testing.assert_agrees(1.0, [0.9, 1.0, 1.1])


def failures(shift: float, claimed: float, log_scale: bool = True) -> int:
    """Of 400 calls on 20 networks of 6 numbers, spread 10 %, whose mean is 1 + shift of the prediction 1."""
    rng, count = np.random.default_rng(0), 0
    for _ in range(400):
        draws = (1 + shift) * rng.normal(1.0, 0.1, (20, 6))
        try:
            testing.assert_agrees(np.ones(6), draws, claimed_error=claimed, false_fail_rate=0.05, log_scale=log_scale)
        except AssertionError:
            count += 1
    return count


@pytest.mark.parametrize("log_scale", [True, False])
def test_rates(log_scale: bool) -> None:
    """Expected at most 20 of 400 (5 standard deviations above: 42); an error far beyond the band is always found."""
    assert 2 <= failures(0.0, 0.0, log_scale) <= 42
    assert failures(0.03, 0.03, log_scale) <= 42
    assert failures(0.25, 0.03, log_scale) == 400


def test_message_names_the_element() -> None:
    draws = np.ones((5, 2, 2)) * np.array([1.0, 1.01, 0.99, 1.0, 1.0])[:, None, None]
    prediction = np.array([[1.0, 1.0], [2.0, 1.0]])
    with pytest.raises(AssertionError, match=r"prediction at \(1, 0\) 2, mean of 5 networks 1: log ratio -0.693"):
        testing.assert_agrees(prediction, draws)


def test_resolution_refuses_a_test_that_cannot_fail() -> None:
    draws = np.random.default_rng(1).normal(1.0, 0.3, 10)
    testing.assert_agrees(1.0, draws)
    with pytest.raises(AssertionError, match=r"resolution=0\.05 is not reached: 10 networks would show an error of"):
        testing.assert_agrees(1.0, draws, resolution=0.05)


@pytest.mark.parametrize(
    "prediction, networks, options, message",
    [
        (1.0, [1.0], {}, "n=1 is too few replicates; expected at least 2"),
        (1.0, [[1.0, 2.0], [1.0, 2.0]], {}, r"networks=\(2, 2\) is of another shape"),
        (-1.0, [1.0, 1.1], {}, "prediction=-1.0 is not positive"),
        (1.0, [1.0, float("nan")], {}, "networks='array' is not finite"),
        ("one", [1.0, 1.1], {}, "prediction='one' is not numeric"),
        (1.0, [1.0, 1.1], {"claimed_error": -0.1}, "claimed_error=-0.1 is negative"),
        (1.0, [1.0, 1.1], {"false_fail_rate": 2.0}, "level=2.0 is outside the domain"),
    ],
)
def test_bad_input(prediction, networks, options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        testing.assert_agrees(prediction, networks, **options)
