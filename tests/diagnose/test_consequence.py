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


def test_the_last_layer_goes_last_by_the_causal_score() -> None:
    result = measure(
        Transformer(SPEC), TOKENS, scores=["causal", "pruning"], options={"most_removed": 4, "fit_share": 0.5}
    )
    scores = result.causal_layer_score.to_numpy()
    assert np.isnan(scores[-1])
    order = result.pruning_order.sel(removed_by="causal_layer_score").to_numpy().tolist()
    assert order == [*(1 + np.argsort(scores[1:4])), 4]


@pytest.mark.parametrize("n_pairs", [4, 0])
def test_few_swapped_pairs_rank_no_layers(n_pairs: int) -> None:
    spec = SPEC.with_fields(n_layers=6)
    scores = ["influence", "permutation", "pruning"]
    result = measure(Transformer(spec), TOKENS, scores=scores, options={"permutation_pairs": n_pairs})
    assert ("permutation_layer_score" in result.removed_by) == (n_pairs == 0)
    assert bool((result.permutation_layer_pairs[1:] < 2.5).any()) == (n_pairs == 4)


def test_without_a_score_that_ranks() -> None:
    with pytest.raises(UnsuitedError, match="scores='pruning' is without a score that ranks layers"):
        measure(Transformer(SPEC), TOKENS, scores=["weights", "pruning"])
