"""The spot check: what bfloat16 moves, against two measurements by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from varprop import results
from varprop.diagnose import Batch, measure
from varprop.diagnose.open import open_model
from varprop.diagnose.precision import precision_gap, spot_check

from .checkpoints import save_model

ABOUT = {"source": "checkpoint", "spec_json": "", "spec_id": "", "n_tokens": 8}


def test_the_gaps_are_those_of_two_measurements_of_the_first_sequences(tmp_path: Path) -> None:
    save_model(tmp_path)
    batch = Batch.causal(torch.arange(48).reshape(3, 16) % 50)
    gaps = spot_check(tmp_path, batch, device="cpu", scores=["causal"])
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, _ = open_model(tmp_path, device="cpu", dtype=dtype)  # type: ignore[arg-type]
        found[dtype] = measure(model, batch.rows(slice(0, 2)), scores=["causal"]).causal_score.item()
    gap = found["bfloat16"] / found["float32"] - 1
    assert gaps.causal_score_precision_gap.item() == pytest.approx(gap, rel=1e-9)
    assert 0 < abs(gap) < 0.05
    assert set(gaps) == {f"causal_{name}_precision_gap" for name in ("score", "score_mean_row", "layer_score")}


def test_signs_zeros_and_what_is_left_out() -> None:
    a, b = np.array([np.nan, -2.0, 0.0, 0.0]), np.array([np.nan, -1.0, 0.0, 3.0])
    others = {"n_used": ((), 3), "x_stderr": ((), 1.0), "x_null": ((), 1.0), "x_matrix": (("sequence",), np.ones(3))}
    first, second = (results.new({"x": (("layer",), values), **others}, **ABOUT) for values in (a, b))
    gaps = precision_gap(first, second)
    assert list(gaps) == ["x_precision_gap"]
    np.testing.assert_array_equal(gaps.x_precision_gap, [np.nan, 0.5, 0.0, 1.0])
    results.validate(first.assign(gaps.data_vars))
