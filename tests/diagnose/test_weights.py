"""Weight statistics of every layer against numpy, sorting and the SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.diagnose.zoo import N_LAYERS, VOCABULARY, each_family, make, tokens
from tests.reference.specs import SPECS
from varprop.diagnose import Batch, Limits, Replay, Session, measure
from varprop.diagnose.weights import ABSOLUTE, DENSITIES, DIMENSIONS, RELATIVE, matrices, weights
from varprop.nn import Transformer

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LABELS = {
    "llama": [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_oss": [*ATTENTION, "mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "mixtral": [*ATTENTION, "mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
"""Of the matrices of a layer."""


def session(model: nn.Module, memory: float = 2.0**30) -> Session:
    return Session(Replay(model, Limits(memory)), Batch.causal(tokens()))


def expected_of(stack: np.ndarray) -> dict[str, np.ndarray | float]:
    """Statistics of the matrices (E, out, in), written out."""
    by_matrix: dict[str, list] = {name: [] for name in DIMENSIONS}
    for w in stack:
        size = np.sort(np.abs(w).ravel())[::-1]
        rms = np.sqrt(np.mean(w**2))
        largest = np.linalg.svd(w, compute_uv=False)[0]
        by_matrix["weight_zero_share"].append(np.mean(w == 0))
        by_matrix["spectral_norm"].append(largest)
        by_matrix["stable_rank"].append(np.sum(w**2) / largest**2)
        by_matrix["effective_density_participation"].append(3 * np.mean(w**2) ** 2 / np.mean(w**4))
        by_matrix["effective_density_threshold_tenth_rms"].append(np.mean(size > 0.1 * rms))
        by_matrix["weight_share_above_absolute"].append([np.mean(size > t) for t in ABSOLUTE])
        by_matrix["weight_share_above_relative"].append([np.mean(size > t * rms) for t in RELATIVE])
        kept = [np.sum(size[: max(1, round(density * size.size))] ** 2) for density in DENSITIES]
        by_matrix["magnitude_mask_retained_variance"].append(np.array(kept) / np.sum(w**2))
    found = {name: np.mean(values, axis=0) for name, values in by_matrix.items() if values}
    return found | {"weight_norm": np.sqrt(np.sum(stack**2)), "weight_rms": np.sqrt(np.mean(stack**2))}


def check(model: nn.Module, one: Session, rtol: float = 1e-5) -> None:
    found = weights(one)
    labels = found["matrix"][1].tolist()
    for number, layer in enumerate(one.replay.layers, start=1):
        own = matrices(layer)
        for name in DIMENSIONS:
            missing = [label not in own for label in labels]
            assert np.isnan(found[name][1][number, missing]).all()
        for label, w in own.items():
            expected = expected_of(w.detach().double().numpy().reshape(-1, *w.shape[-2:]))
            for name in DIMENSIONS:
                values = found[name][1][number, labels.index(label)]
                np.testing.assert_allclose(values, expected[name], rtol, 1e-12, err_msg=f"{name} of {label}")
    assert all(np.isnan(found[name][1][0]).all() for name in DIMENSIONS)


@each_family("llama", "gpt2", "deepseek_v3", "gpt_oss", "bert")
def test_equals_numpy(family: str) -> None:
    model = make(family)
    with torch.no_grad():  # some exact zeros
        for parameter in model.parameters():
            parameter[..., ::3] *= parameter[..., ::3].abs() > 0.05
    check(model, session(model))


@pytest.mark.parametrize("name", ["base", "mask_bernoulli", "mask_moe", "moe_pattern"])
def test_equals_numpy_on_our_own_models_with_masks(name: str) -> None:
    model = Transformer(SPECS[name].with_fields(vocab_size=VOCABULARY), dtype=torch.float64)
    check(model, session(model))


def test_our_own_masked_entries_are_zeros_and_labels_those_of_training() -> None:
    spec = SPECS["mask_bernoulli"].with_fields(vocab_size=VOCABULARY)
    found = weights(session(Transformer(spec)))
    assert found["matrix"][1].tolist() == ["q", "k", "v", "o", "gate", "up", "down"]
    zeros = found["weight_zero_share"][1][1:]
    assert (zeros > 0.2).all()
    assert (zeros < 0.8).all()


@each_family(*LABELS)
def test_labels(family: str) -> None:
    assert list(matrices(session(make(family)).replay.layers[0])) == LABELS[family]


def test_experts_in_parts_are_the_same() -> None:
    model = make("mixtral")
    whole, parts = weights(session(model)), weights(session(model, memory=1.0))
    for name in DIMENSIONS:
        np.testing.assert_allclose(parts[name][1], whole[name][1], rtol=1e-6, err_msg=name)


def test_is_a_result_with_labels() -> None:
    found = measure(make("deepseek_v3"), tokens(), scores=["weights"])
    assert found.weight_threshold.values.tolist() == list(ABSOLUTE)
    assert found.mask_density.values.tolist() == list(DENSITIES)
    assert found.stable_rank.sizes["layer"] == N_LAYERS + 1
    experts = found.sel(matrix="mlp.experts.down_proj")
    assert np.isnan(experts.stable_rank[1])
    assert float(experts.stable_rank[2]) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_family("llama", "mixtral", "gpt_oss")
def test_cuda_agrees_with_cpu(family: str) -> None:
    model = make(family)
    expected = weights(session(model))
    found = weights(session(model.to("cuda")))
    for name in DIMENSIONS:
        np.testing.assert_allclose(found[name][1], expected[name][1], rtol=1e-4, atol=1e-6, err_msg=name)
