"""The causal matrix at initialisation: limits, and random networks measured by `diagnose`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varprop.diagnose import measure
from varprop.errors import AssumptionError
from varprop.nn import Transformer
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, ModelSpec, MoESpec
from varprop.stats import mean_and_stderr
from varprop.theory.skipped import skipped_layer_effect

BASE = ModelSpec(
    d_model=128, n_layers=4, vocab_size=256, attention=AttentionSpec(n_heads=4), feed_forward=FeedForwardSpec(d_ff=256)
)
SPECS = {
    "causal": BASE,
    "feed-forward": BASE.with_fields(attention=None, activation="relu", gated=False),
    "parallel": BASE.with_fields(block="parallel"),
    "small weights": BASE.with_fields(init=InitSpec(rule="fixed")),
    "mixture": BASE.with_fields(feed_forward=None, moe=MoESpec(n_experts=4, top_k=2, d_expert=128)),
    "peri": BASE.with_fields(placement="peri"),
    "skip": BASE.with_fields(skip_multiplier=0.8),
}
MARGIN = 0.04
"""O(1 / d_model) of the prediction at d_model 128, and the drawn heads; an error of 8 % would be seen."""
N_NETWORKS = 10
LATER = np.triu_indices(BASE.n_layers, 1)


def measured(spec: ModelSpec, n_tokens: int) -> np.ndarray:
    """The matrix of each network, (networks, L, L)."""
    found = []
    for seed in range(N_NETWORKS):
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randperm(spec.vocab_size, generator=generator)[:n_tokens] for _ in range(4)]
        result = measure(Transformer(spec, seed=seed), torch.stack(draws), scores=["causal"])
        found.append(result.causal_effect.to_numpy()[1:, 1:])
    return np.array(found)


@pytest.mark.parametrize("name", SPECS)
def test_random_networks(name: str) -> None:
    """The mean over networks is within the margin and 4 standard errors: 6 pairs fail together in under 0.1 %."""
    spec, n_tokens = SPECS[name], 16
    values, errors = mean_and_stderr(measured(spec, n_tokens))
    predicted = skipped_layer_effect(spec, n_tokens=n_tokens)
    assert (np.abs(values - predicted)[LATER] <= MARGIN * predicted[LATER] + 4 * errors[LATER]).all()
    assert (errors[LATER] < 0.01 * predicted[LATER] + 0.02).all()
    assert (np.tril(predicted) == 0).all()


def test_a_layer_that_adds_nothing_is_not_missed() -> None:
    """Without its output matrices a layer can be skipped; what is left is the square root of the kernels' rounding."""
    tiny = BASE.with_fields(init=InitSpec(overrides=(("o", 1e-9), ("down", 1e-9))))
    assert skipped_layer_effect(tiny, n_tokens=8)[LATER].max() < 1e-4


def test_many_layers_of_a_wide_stream_matter_less() -> None:
    """Each later layer is a smaller part of the stream: skipping it does less to the one that follows."""
    effect = skipped_layer_effect(BASE.with_fields(attention=None, n_layers=12), n_tokens=1)
    assert (np.diff(np.diag(effect, 1)) < 0).all()


def test_outside_the_domain() -> None:
    with pytest.raises(AssumptionError, match=r"norm\.placement='post' is a norm after the residual sum"):
        skipped_layer_effect(BASE.with_fields(placement="post"), n_tokens=8)
    for n_tokens in (0, 257, 2.5):
        with pytest.raises(AssumptionError, match=r"n_tokens=.* is outside the domain"):
            skipped_layer_effect(BASE, n_tokens=n_tokens)  # type: ignore[arg-type]
