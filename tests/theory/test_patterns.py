"""varprop.theory.patterns and key_mask: what queries see, limits and domains. The formulas are proved in proofs/."""

from __future__ import annotations

import numpy as np
import pytest

from varprop import presets
from varprop.errors import AssumptionError
from varprop.theory.key_mask import kept_inverse, kept_inverse_square
from varprop.theory.patterns import (
    allowed_keys,
    causal_uniform_participation,
    document_uniform_participation,
    qk_norm_logit_variance,
    rotary_kernel,
    softcap_slope,
    window_uniform_participation,
)


def test_allowed_keys():
    spec = presets.tiny().with_fields(pattern="window", window=2, n_sink_tokens=1)
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    np.testing.assert_array_equal(allowed_keys(spec, 1, 4), np.array(expected, dtype=bool))
    patterned = presets.tiny().with_fields(pattern="window", window_pattern=(1, 0))
    assert allowed_keys(patterned, 1, 4).sum() == 4
    assert allowed_keys(patterned, 2, 4).sum() == 10


def test_documents_hide_each_other():
    full = presets.tiny().with_fields(pattern="full")
    seen = allowed_keys(full, 1, 4, documents=np.array([0, 1, 1, 0]))
    np.testing.assert_array_equal(seen.sum(axis=1), 2)
    spec = presets.tiny().with_fields(pattern="window", window=2, n_sink_tokens=1)
    assert allowed_keys(spec, 1, 4, documents=[5, 5, 7, 7]).sum() == 6
    with pytest.raises(AssumptionError, match=r"documents=\[0\] is not a document index; expected 4 integers"):
        allowed_keys(full, 1, 4, documents=[0])


def test_uniform_means_are_those_of_the_visible_keys():
    for window, spec in ((9, presets.tiny()), (3, presets.tiny().with_fields(pattern="window", window=3))):
        counts = allowed_keys(spec, 1, 9).sum(axis=1)
        assert window_uniform_participation(9, window) == pytest.approx((1 / counts).mean())
    counts = allowed_keys(presets.tiny(), 1, 9, documents=[0] * 4 + [1] * 5).sum(axis=1)
    assert document_uniform_participation([4, 5]) == pytest.approx((1 / counts).mean())
    assert causal_uniform_participation(10**7) == pytest.approx(np.log(1e7) / 1e7, rel=0.05)


def test_extremes():
    assert kept_inverse(10**7, 1e-12) == pytest.approx(1, rel=1e-5)
    assert kept_inverse(10**7, 0.5) == pytest.approx(2e-7)
    np.testing.assert_allclose(kept_inverse_square(5, 1e-300), 1)
    np.testing.assert_allclose(kept_inverse_square(5, 1.0), 1 / np.arange(1, 6) ** 2)
    assert softcap_slope(1.0, 1e9) == pytest.approx(1)
    assert qk_norm_logit_variance(1e-30, 1.0, 1e-6, 64) == pytest.approx(1e-24, rel=1e-5)
    far = rotary_kernel(np.array([-5, 5, 10**7]), 1e4, 0.5, 64)
    assert far[0] == far[1]
    assert (np.abs(far) <= 1).all()


@pytest.mark.parametrize("bad", ["a", None, 0, 1.5, True, float("nan"), -3])
def test_counts_are_checked(bad):
    for rule in (
        causal_uniform_participation,
        lambda n: window_uniform_participation(n, 2),
        lambda n: window_uniform_participation(4, n),
        lambda n: document_uniform_participation([2, n]),
        lambda n: kept_inverse_square(n, 0.5),
    ):
        with pytest.raises(AssumptionError, match="is outside the domain; expected an integer >= 1"):
            rule(bad)
    with pytest.raises(AssumptionError, match="empty"):
        document_uniform_participation([])


@pytest.mark.parametrize("bad", ["a", None, 0, True, float("nan"), float("inf"), -3, 1.5])
def test_densities_and_caps_are_checked(bad):
    for rule in (lambda x: kept_inverse(4, x), lambda x: kept_inverse_square(4, x)):
        with pytest.raises(AssumptionError, match=r"density=.* expected a number in \(0, 1\]"):
            rule(bad)
    if bad != 1.5:
        with pytest.raises(AssumptionError, match="cap="):
            softcap_slope(1.0, bad)
