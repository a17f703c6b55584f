"""Statistics of single queries against loops, and of all against those of single ones."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varprop.measure import ATTENTION_THRESHOLDS, QUERY_STATISTICS, attention_statistics, query_statistics
from varprop.nn.init import make_generator


def rows(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=make_generator(seed), dtype=torch.float64)).softmax(dim=-1)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.0, 30.0), st.floats(0.01, 1.0))
def test_definitions(seed: int, n_keys: int, scale: float, mass: float) -> None:
    p = rows(seed, 2, 3, n_keys, scale=scale) * mass
    n_visible = torch.tensor([n_keys, n_keys + 1, n_keys + 5])
    found = dict(zip(QUERY_STATISTICS, query_statistics(p, n_visible).movedim(-1, 0), strict=True))
    for place in np.ndindex(2, 3):
        row, n = p[place].tolist(), int(n_visible[place[1]])
        square = sum(x * x for x in row)
        expected = {
            "concentration": square,
            "entropy": -sum(x * np.log(x) for x in row if x > 0),
            "sink_mass": row[0],
            "first_4_mass": sum(row[:4]),
            "total_mass": sum(row),
            "effective_density": sum(row) ** 2 / (n * square),
        }
        for t in ATTENTION_THRESHOLDS:
            expected[f"mass_above_{t:g}"] = sum(x for x in row if x > t)
            expected[f"key_share_above_{t:g}"] = sum(x > t for x in row) / n
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][place], value, rtol=1e-11, atol=1e-14, err_msg=name)


def test_their_mean_is_that_of_all() -> None:
    p = rows(0, 2, 6, 6)
    whole = attention_statistics(lambda queries: p[:, queries], 6, 12)
    mean = query_statistics(p, 6).mean(dim=1)
    for name, values in (("concentration", whole.concentration), ("entropy", whole.entropy)):
        np.testing.assert_allclose(mean[:, QUERY_STATISTICS.index(name)], values, rtol=1e-12)
    np.testing.assert_allclose(mean[:, QUERY_STATISTICS.index("sink_mass")], whole.first_key_mass, rtol=1e-12)


def test_no_mass_at_all_has_no_density() -> None:
    found = query_statistics(torch.zeros(1, 4), 4)[0]
    assert found.tolist() == [0.0] * len(QUERY_STATISTICS)
