"""Pruning by the scores that were measured before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varprop import presets
from varprop.diagnose import measure
from varprop.errors import UnsuitedError
from varprop.nn import Transformer

SPEC = presets.tiny().with_fields(d_model=16, n_layers=4, n_heads=2, d_ff=32, vocab_size=50)
TOKENS = torch.randint(0, 50, (6, 12), generator=torch.Generator().manual_seed(0))


def test_orders_are_those_of_the_scores() -> None:
    result = measure(Transformer(SPEC), TOKENS, scores=["influence", "causal", "usefulness", "ablation", "pruning"])
    order = result.pruning_order.sel(removed_by="block_influence").to_numpy()
    assert order.tolist() == (1 + np.argsort(result.block_influence.to_numpy()[1:]))[:2].tolist()
    order = result.pruning_order.sel(removed_by="linear_r_squared").to_numpy()
    assert order.tolist() == (1 + np.argsort(-result.linear_r_squared.to_numpy()[1:]))[:2].tolist()
    order = result.pruning_order.sel(removed_by="ablation_loss_ratio").to_numpy()
    skipped = result.ablation_loss_ratio.sel(intervention="skip").to_numpy()[1:]
    assert order.tolist() == (1 + np.argsort(skipped))[:2].tolist()
    assert {"skip", "linear"} == set(result.removal.values.tolist())
    assert "permutation_layer_score" not in result.removed_by


def test_without_a_score_that_ranks() -> None:
    with pytest.raises(UnsuitedError, match="scores='pruning' is without a score that ranks layers"):
        measure(Transformer(SPEC), TOKENS, scores=["weights", "pruning"])
