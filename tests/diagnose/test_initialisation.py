"""Closed forms beside measurements: random networks have what is expected of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from varprop import presets
from varprop.diagnose import measure
from varprop.diagnose.initialisation import SUFFIX, initialisation, repeated_share
from varprop.diagnose.replay import Batch, Replay
from varprop.diagnose.session import Session
from varprop.errors import ArgumentError
from varprop.nn import Transformer

SPEC = presets.tiny().with_fields(d_model=128, n_layers=4, n_heads=4, d_ff=256, vocab_size=300)


@pytest.fixture(scope="module")
def result() -> xr.Dataset:
    tokens = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    names = ["causal", "initialisation"]
    return measure(Transformer(SPEC, seed=1), tokens, scores=names)


def test_a_random_network_has_what_is_expected(result: xr.Dataset) -> None:
    """One network of d_model 128: its causal effects scatter by some percent around the closed form."""
    values, expected = result.causal_effect.to_numpy()[1:, 1:], result[f"causal_effect{SUFFIX}"].to_numpy()[1:, 1:]
    pairs = np.triu_indices(4, 1)
    assert np.abs(values[pairs] / expected[pairs] - 1).max() < 0.12
    assert abs(result.causal_score.item() / result[f"causal_score{SUFFIX}"].item() - 1) < 0.06
    rows = result[f"causal_layer_score{SUFFIX}"].to_numpy()
    assert np.isnan(rows[[0, -1]]).all()
    assert np.allclose(rows[1:-1], [expected[s, s + 1 :].mean() for s in range(3)])


def test_cosines_of_streams(result: xr.Dataset) -> None:
    """Against the streams themselves."""
    replay = Replay(Transformer(SPEC, seed=1))
    tokens = torch.randint(0, 300, (4, 24), generator=torch.Generator().manual_seed(0))
    streams = [s.flatten(0, 1) for s in replay.capture(Batch.causal(tokens)).streams]
    angle = result[f"angular_distance{SUFFIX}"].to_numpy()
    influence = result[f"block_influence{SUFFIX}"].to_numpy()
    for k, x in enumerate(streams):
        for m, y in enumerate(streams):
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            assert abs(float(cosine.clamp(-1, 1).arccos().mean()) / np.pi - angle[k, m]) < 0.015
            if m == k + 1:
                assert abs(1 - float(cosine.mean()) - influence[m]) < 0.02


def test_repeated_tokens() -> None:
    assert repeated_share(np.array([[1, 2, 3]])) == 0
    assert repeated_share(np.array([[7, 7, 7], [7, 7, 7]])) == 1
    assert repeated_share(np.array([[7]])) == 0


def test_a_model_without_a_spec() -> None:
    class Other(Transformer):
        pass

    model = Other(SPEC)
    session = Session(Replay(model), Batch.causal(torch.zeros(1, 4, dtype=torch.long)))
    with pytest.raises(ArgumentError, match="architecture='Other' has no spec"):
        initialisation(session)
