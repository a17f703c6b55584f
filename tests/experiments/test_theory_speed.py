"""The speed benchmark runs in small, and its plain loops compute what `predict` computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.benchmarks import theory_speed as benchmark
from varprop.theory import predict


def test_the_plain_loops_are_the_same_recursion() -> None:
    """Independent quadratures, infinite width: two layers with correlated tokens in the second."""
    wide = benchmark.exchangeable_spec(2, benchmark.WIDE)
    expected = predict(wide, n_tokens=16).second_moment[-1, -1].item()
    assert benchmark.plain_exchangeable(2, 16) == pytest.approx(expected, rel=1e-4)
    alone = predict(wide.with_fields(attention=None), n_tokens=16).second_moment[-1, -1].item()
    assert benchmark.plain_feed_forward(2) == pytest.approx(alone, rel=1e-6)


def test_the_plain_gram_loop() -> None:
    """Heads are drawn on both sides: 2 % is over four standard errors of either."""
    expected = predict(benchmark.gram_spec(2, 2**12).with_fields(head_dim=64), n_tokens=12)
    assert benchmark.plain_gram(2, 12, n_heads=32) == pytest.approx(expected.second_moment[-1, -1].item(), rel=0.02)


@pytest.mark.long
def test_smoke(tmp_path: Path) -> None:
    assert benchmark.main(["--smoke", "--out", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["job"][:3] for row in rows] == ["(a)", "(a)", "(b)", "(c)", "(d)", "(e)"]
    for row in rows:
        assert row.get("seconds", 1.0) > 0
        assert abs(row.get("differs", 0.0)) < 0.05
