"""Blocks of networks: short memory, types of the matrices, what is observed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from varprop import presets
from varprop.errors import ReducedBatchWarning
from varprop.nn.attention import attention_probabilities
from varprop.simulate import block as blocks
from varprop.simulate import sample
from varprop.spec import ModelSpec

from ..reference.specs import BASE, SPECS

SMALL = presets.tiny().with_fields(n_layers=3, d_model=32, d_ff=48, density=0.5)


def _short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Make every block of more than `most` networks run out of memory in its second layer; return the sizes tried."""
    tried: list[int] = []

    def forward(x: torch.Tensor, weights: Any, spec: ModelSpec, layer: int, *rest: Any) -> torch.Tensor:
        if layer == 2:
            tried.append(x.shape[0])
            if x.shape[0] > most:
                raise torch.OutOfMemoryError("out of memory, tried to allocate 1 EiB")
        return original(x, weights, spec, layer, *rest)

    original = blocks.block_forward
    monkeypatch.setattr(blocks, "block_forward", forward)
    return tried


@pytest.mark.parametrize("spec", [SMALL, SPECS["mask_moe"], SPECS["key_mask_before"]], ids=["dense", "moe", "key_mask"])
def test_out_of_memory_halves_the_block_and_says_so(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut blocks have the same numbers; float32 sums may be ordered otherwise, so equality is to 1e-5."""
    undisturbed = sample(spec, n_networks=11, n_tokens=6)
    tried = _short_of_memory(monkeypatch, most=2)
    with pytest.warns(ReducedBatchWarning, match="8 networks at a time; going on with") as warned:
        cut = sample(spec, n_networks=11, n_tokens=6)
    assert len(warned) == 2  # to halves and to quarters; the second block starts with quarters
    assert tried == [8, 4, *[2] * 8]
    assert set(cut.data_vars) == set(undisturbed.data_vars)
    for name, values in undisturbed.data_vars.items():
        np.testing.assert_allclose(cut[name], values, rtol=1e-5, atol=1e-6)


def test_out_of_memory_for_a_single_network_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    _short_of_memory(monkeypatch, most=0)
    with pytest.warns(ReducedBatchWarning), pytest.raises(MemoryError, match="one network at a time"):
        sample(SMALL, n_networks=2, n_tokens=6)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.02), ("float16", 0.003)])
def test_short_types_are_the_same_networks_to_their_rounding(dtype: str, tolerance: float) -> None:
    """2^-9 and 2^-12 a rounding; signs of errors differ, so a mean of squares over 192 numbers errs less than one."""
    full, short = (sample(SMALL, n_networks=4, n_tokens=6, dtype=name) for name in ("float32", dtype))
    np.testing.assert_allclose(short.second_moment, full.second_moment, rtol=tolerance)
    assert short.attrs["dtype"] == dtype
    assert short.second_moment.dtype == np.float64


def test_attention_statistics_are_those_of_the_probabilities() -> None:
    """Zero query weights: uniform attention over t keys at position t. Concentration H_T / T, entropy log T! / T."""
    spec = BASE.with_fields({"init.overrides": [("q", 1e-12)]})
    dataset = sample(spec, n_networks=2, n_tokens=5, dtype="float64")
    harmonic, log_factorial = sum(1 / t for t in range(1, 6)), float(np.log(120.0))
    np.testing.assert_allclose(dataset.attention_concentration[:, 1:], harmonic / 5, rtol=1e-9)
    np.testing.assert_allclose(dataset.attention_entropy[:, 1:], log_factorial / 5, rtol=1e-6)
    assert dataset.attention_concentration[:, 0].isnull().all()
    assert attention_probabilities(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), None, 1.0).sum() == 2.0


def test_gate_statistics_of_equal_gates() -> None:
    """A zero router: every gate is 1/E; the k experts of a token add k / E^2, and the ties go to the same experts."""
    spec = SPECS["moe"].with_fields({"init.overrides": [("router", 1e-12)]})
    assert spec.moe is not None
    k, n_experts = spec.moe.top_k, spec.moe.n_experts
    dataset = sample(spec, n_networks=2, n_tokens=5, dtype="float64")
    np.testing.assert_allclose(dataset.gate_second_moment[:, 1:], k / n_experts**2, rtol=1e-9)
    load = dataset.expert_load_concentration[:, 1:]
    assert ((load >= 1 / n_experts - 1e-12) & (load <= 1 / k + 1e-12)).all()


def test_a_layer_without_a_mixture_counts_as_one_expert() -> None:
    dataset = sample(SPECS["moe_pattern"].with_fields(vocab_size=50), n_networks=2, n_tokens=5)
    moe = [SPECS["moe_pattern"].is_moe(layer) for layer in dataset.layer.values[1:]]
    assert set(moe) == {True, False}
    for name in ("gate_second_moment", "expert_load_concentration"):
        np.testing.assert_array_equal((dataset[name][0, 1:] == 1.0).values, np.logical_not(moe))


def test_parts_that_a_spec_lacks_have_no_statistics() -> None:
    assert "attention_entropy" not in sample(SPECS["feed_forward_only"], n_networks=1, n_tokens=2)
    assert "gate_second_moment" not in sample(BASE, n_networks=1, n_tokens=2)


def test_fourth_moment_of_gaussian_tokens() -> None:
    """3 q^2 at the embedding: 400 networks of 8 x 16 numbers, 5 standard errors (false-fail rate 6e-7; seed fixed)."""
    start = sample(BASE, n_networks=400, n_tokens=8).sel(layer=0, site="resid_post")
    scale = BASE.tensor_table()[0].init_std ** 4
    values = start.fourth_moment.values / scale
    assert abs(values.mean() - 3) < 5 * values.std(ddof=1) / 20
