"""The paper's first points: which layer has the published value."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from experiments import paper_step0 as experiment
from varprop import presets
from varprop.results import SITES
from varprop.simulate import same_token


def profile() -> xr.DataArray:
    """A stream that grows by 1 a layer, half of it by attention."""
    layers = np.arange(17)
    columns = {"resid_pre": layers - 1.0, "attn_out": 0.5, "resid_mid": layers - 0.5, "mlp_out": 0.5}
    values = [np.broadcast_to(columns.get(site, layers), 17) for site in SITES]
    return xr.DataArray(np.stack(values, axis=1), coords={"layer": layers, "site": list(SITES)})


def test_the_layer_with_the_published_value() -> None:
    names, layers = experiment.reproduced(profile(), 14.0, 14.0, 16)
    assert names == ["stream before the last block"]
    assert layers == [13, 14, 15]  # 12.6 to 15.4
    assert experiment.reproduced(profile(), 16.0, 16.0, 16)[0] == [
        "stream before the last block",
        "stream inside the last block",
        "stream after the last block",
    ]
    assert experiment.reproduced(profile(), 100.0, 100.0, 16) == ([], [])


def test_shallower_models_are_prefixes() -> None:
    """A dense 1B model of 12 layers has the stream of the first 12 layers of the deepest."""
    deep, shallow = presets.get("paper_dense_1b_l32"), presets.get("paper_dense_1b_l12")
    assert deep.with_fields(n_layers=12) == shallow


@pytest.mark.parametrize("model", experiment.MODELS)
def test_small_models_keep_the_gains(model: str) -> None:
    big, small = experiment.make_spec(model), experiment.make_spec(model, smoke=True)
    for name in ("attention.q", "attention.o"):
        gains = [next(r.gain for r in spec.tensor_table() if r.name.endswith(name)) for spec in (big, small)]
        assert gains[0] == pytest.approx(gains[1])


def test_same_tokens_have_the_same_embedding() -> None:
    matrix = same_token(experiment.text(200))
    assert np.linalg.eigvalsh(matrix)[0] > -1e-9
    assert np.diagonal(matrix).min() == 1
    assert 0.005 < (matrix.sum() - 200) / (200 * 199) < 0.05  # function words and full stops
