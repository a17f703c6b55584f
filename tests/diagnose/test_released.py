"""The released definitions, against the streams that transformers itself records and maps installed as they were."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varprop import results
from varprop.diagnose import RELEASED, released
from varprop.diagnose.causal import causal
from varprop.diagnose.measure import measure
from varprop.diagnose.replay import Batch, Replay
from varprop.diagnose.session import Session
from varprop.diagnose.usefulness import usefulness

from . import zoo

ROUNDING = 1e-5
"""Of float64 models whose norms are computed in float32."""


def session(model: nn.Module, n_sequences: int = 4, n_tokens: int = 10, **options: Any) -> Session:
    rows = zoo.tokens(n_sequences, n_tokens)
    return Session(Replay(model), Batch.causal(rows), options=options)


def recorded(model: nn.Module, rows: Tensor) -> list[np.ndarray]:
    """The streams that transformers records in a pass."""
    with torch.no_grad():
        return [x.numpy() for x in model(input_ids=rows, output_hidden_states=True, use_cache=False).hidden_states]


def without(model: nn.Module, layer: int) -> nn.Module:
    model = copy.deepcopy(model)
    del zoo.layers_of(model)[layer]
    return model


@zoo.each_family("llama", "olmo2", "gpt_neox")
def test_causal_is_what_comes_of_the_recorded_streams(family: str) -> None:
    model = zoo.make(family, torch.float64, n_layers=5)
    given = session(model)
    found = released.causal(given)["causal_effect"][1][1:, 1:]
    base = recorded(model, given.batch.tokens)
    expected = np.zeros((5, 5))
    for s in range(5):
        skipped = recorded(without(model, s), given.batch.tokens)
        assert len(skipped) == 5  # the skipped layer leaves no entry
        for l in range(s + 1, 4):  # noqa: E741
            own = base[l + 1] - base[l]
            changed = skipped[l + 1] - skipped[l]
            expected[s, l] = np.linalg.norm(changed - own, axis=-1).mean() / np.linalg.norm(own, axis=-1).mean()
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    assert (found[:, -1] == 0).all()
    assert np.isnan(released.causal(given)["causal_layer_score"][1][[0, 5]]).all()
    assert found[2, 3] > 0
    assert (found[2, :3] == 0).all()


@zoo.each_family("llama", "olmoe", "bert")
def test_causal_without_defects_is_the_corrected_one(family: str) -> None:
    given = session(zoo.make(family, torch.float64))
    found, corrected = released.causal(given, ()), causal(given)
    for name, (_, values) in found.items():
        np.testing.assert_allclose(values, corrected[name][1], rtol=0, atol=ROUNDING, err_msg=name)


def test_mixtures_are_aligned() -> None:
    given = session(zoo.make("olmoe", torch.float64))
    assert released.defects_of(given) == ("transposed", "in_sample")
    np.testing.assert_allclose(
        released.causal(given)["causal_effect"][1], causal(given)["causal_effect"][1], rtol=0, atol=ROUNDING
    )


def test_each_causal_defect_alone() -> None:
    """The norm alone changes the last column only; the shift alone leaves it at 0 and compares other layers."""
    given = session(zoo.make("llama", torch.float64, n_layers=4))
    plain, norm, shift = (
        released.causal(given, some)["causal_effect"][1][1:, 1:] for some in ((), ("final_norm",), ("row_shift",))
    )
    np.testing.assert_allclose(norm[:, :-1], plain[:, :-1], rtol=0, atol=ROUNDING)
    assert (np.abs(norm - plain)[:-1, -1] > 0.01).all()
    assert (shift[:, -1] == 0).all()
    assert (np.abs(shift - plain)[np.triu_indices(4, 1)] > 0.01).all()


class AffineLayer(nn.Module):
    """A layer that is exactly affine, far from a symmetric one."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(zoo.WIDTH, zoo.WIDTH, generator=generator).double() / zoo.WIDTH**0.5)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states @ self.matrix + 0.01


def test_the_transposed_map_of_an_affine_layer_is_wrong() -> None:
    model = zoo.make("llama", torch.float64)
    layer = AffineLayer(torch.Generator().manual_seed(0))
    zoo.layers_of(model)[1] = layer
    given = session(model, n_sequences=8, n_tokens=16)
    right, wrong = (
        released.usefulness(given, some)["usefulness_loss_ratio"][1][2]
        for some in (("in_sample",), ("in_sample", "transposed"))
    )
    assert right == pytest.approx(1, abs=1e-9)
    assert abs(wrong - 1) > 1e-3
    x = given.capture(slice(0, 8)).streams[1].reshape(-1, zoo.WIDTH)
    fitted, y = np.linalg.lstsq(np.c_[x, np.ones(len(x))], layer(x).detach().numpy(), rcond=None)[0], layer(x).detach()
    errors = [
        float(np.linalg.norm(x.numpy() @ w + fitted[-1] - y.numpy()) / np.linalg.norm(y.numpy() - fitted[-1]))
        for w in (fitted[:-1], fitted[:-1].T)
    ]
    assert errors[0] < 1e-12
    assert errors[1] > 1


@zoo.each_family("llama", "olmoe")
def test_usefulness_installs_what_lstsq_gives_as_the_weight_of_a_linear_module(family: str) -> None:
    model = zoo.make(family, torch.float64)
    given = session(model, n_sequences=8, n_tokens=16)
    rows, targets = given.batch.tokens, given.batch.targets
    streams = given.capture(slice(0, 8)).streams
    if family == "llama":
        streams[-1] = torch.from_numpy(recorded(model, rows)[-1])
    base = zoo.loss_per_sequence(zoo.logits(model, rows), targets).sum()
    expected = []
    for layer in range(zoo.N_LAYERS):
        x, y = (streams[i].reshape(-1, zoo.WIDTH).numpy() for i in (layer, layer + 1))
        fitted = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
        linear = nn.Linear(zoo.WIDTH, zoo.WIDTH, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(fitted[:-1]))
            linear.bias.copy_(torch.from_numpy(fitted[-1]))
        changes = {zoo.layers_of(model)[layer]: lambda x, y, linear=linear: linear(x)}
        changed = zoo.logits(model, rows, changes)
        expected.append(float(zoo.loss_per_sequence(changed, targets).sum() / base))
    found = released.usefulness(given)
    np.testing.assert_allclose(found["usefulness_loss_ratio"][1][1:], expected, rtol=1e-5)
    assert found["usefulness"][1] == np.mean(np.array(expected) > 1.1)


def test_usefulness_without_defects_is_the_corrected_one() -> None:
    given = session(zoo.make("llama", torch.float64), n_sequences=8, n_tokens=16)
    found, corrected = released.usefulness(given, ()), usefulness(given)
    assert set(found) <= set(corrected)
    for name, (_, values) in found.items():
        np.testing.assert_array_equal(values, corrected[name][1], err_msg=name)


@zoo.each_family("llama", "olmoe")
def test_the_jacobian_of_the_last_layer_goes_through_the_norm(family: str) -> None:
    model = zoo.make(family, torch.float64)
    given = session(model, n_sequences=2, n_tokens=5)
    found = released.jacobian(given)
    captured = given.capture(slice(0, 2))
    norm = model.get_submodule("model.norm") if family == "llama" else nn.Identity()
    for layer in range(zoo.N_LAYERS):
        is_last = layer == zoo.N_LAYERS - 1

        def after(x: Tensor, layer: int = layer, is_last: bool = is_last) -> Tensor:
            y = given.replay.layer(layer, x[None], captured)[0]
            return norm(y) if is_last else y

        whole = torch.autograd.functional.jacobian(after, captured.streams[layer])  # (B, T, D, B, T, D)
        mean = torch.einsum("btibsj->ij", whole).numpy() / (2 * 5)
        gap = mean - np.eye(zoo.WIDTH)
        off = mean - np.diag(np.diag(mean))
        expected = {
            "jacobian_norm": np.linalg.norm(gap) / zoo.WIDTH,
            "jacobian_frobenius_norm": np.linalg.norm(mean),
            "jacobian_spectral_norm": np.linalg.svd(mean, compute_uv=False)[0],
            "jacobian_diagonal_mean": np.trace(mean) / zoo.WIDTH,
            "jacobian_diagonal_std": np.diag(mean).std(),
            "jacobian_off_diagonal_norm": np.sqrt((off**2).sum() / (zoo.WIDTH**2 - zoo.WIDTH)),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][1][layer + 1], value, rtol=ROUNDING, err_msg=f"{name} {layer}")


def test_elementwise_is_the_jacobian_over_the_micro_batch() -> None:
    model = zoo.make("llama", torch.float64)
    rowwise, divided = (
        released.jacobian(session(model, 2, 5, elementwise_micro_batch=micro_batch)) for micro_batch in (0, 2)
    )
    for name in ("frobenius_norm", "spectral_norm", "diagonal_mean", "diagonal_std", "off_diagonal_norm"):
        whole, half = (found[f"jacobian_{name}"][1][1:] for found in (rowwise, divided))
        np.testing.assert_allclose(half, whole / 2, rtol=1e-6, err_msg=name)
    assert not np.allclose(rowwise["jacobian_norm"][1][1:], divided["jacobian_norm"][1][1:], rtol=0.05)


def test_permutation_lists_layer_means_with_their_weight() -> None:
    found = released.permutation(session(zoo.make("llama"), permutation_pairs=1))
    scores = found["permutation_score"][1][1:, 1:]
    means = [np.delete(scores[i], i).mean() for i in range(zoo.N_LAYERS)]
    np.testing.assert_allclose(found["permutation_layer_score"][1][1:], means * 0.9 ** np.arange(3), rtol=1e-6)
    assert found["permutation_measured"][1][1:, 1:][np.triu_indices(3, 1)].all()
    np.testing.assert_allclose(found["permutation_weighted"][1], np.mean(means * 0.9 ** np.arange(3)), rtol=1e-6)


def test_similarity_is_of_the_recorded_streams() -> None:
    model = zoo.make("llama", torch.float64)
    given = session(model)
    means = np.array([x.reshape(-1, zoo.WIDTH).mean(axis=0) for x in recorded(model, given.batch.tokens)])
    expected = means @ means.T / np.outer(np.linalg.norm(means, axis=1), np.linalg.norm(means, axis=1))
    np.testing.assert_allclose(released.similarity(given)["layer_similarity"][1], expected, rtol=0, atol=ROUNDING)


def test_the_load_of_experts_is_always_zero() -> None:
    load = released.experts(session(zoo.make("olmoe")))["expert_load"][1]
    assert load.shape == (zoo.N_LAYERS + 1, 4)
    assert (load[1:] == 0).all()
    assert released.experts(session(zoo.make("llama"))) == {}


def test_defects_one_at_a_time() -> None:
    given = session(zoo.make("llama", torch.float64), n_sequences=8)
    found = released.defects(given)
    labels = list(found["defect"][1])
    assert labels == ["none", *released.DEFECTS, "all"]
    numbers = {
        "causal_score_by_defect": (released.causal, "causal_score", {"row_shift", "final_norm"}),
        "usefulness_mean_loss_ratio_by_defect": (
            released.usefulness,
            "usefulness_mean_loss_ratio",
            {"final_norm", "transposed", "in_sample"},
        ),
        "jacobian_norm_by_defect": (released.jacobian, "jacobian_norm", {"final_norm", "elementwise"}),
    }
    for name, (score, part, concerned) in numbers.items():
        values = np.nan_to_num(found[name][1])
        for label, value in zip(labels[1:-1], values[1:-1], strict=True):
            assert np.array_equal(value, values[0]) == (label not in concerned), (name, label)
        np.testing.assert_array_equal(values[-1], np.nan_to_num(score(given)[part][1]))


def test_measure_gives_the_released_definition(tmp_path: Any) -> None:
    model, rows = zoo.make("llama"), zoo.tokens(4, 8)
    found = measure(model, rows, scores="all", definition="released", parts=tmp_path / "parts")
    assert found.attrs["definition"] == "released"
    assert list(found.defect.values) == ["none", *released.DEFECTS, "all"]
    results.save(found, tmp_path / "released.nc")
    assert float(results.load(tmp_path / "released.nc").causal_score) == float(found.causal_score)
    assert set(RELEASED) == {*("experts", "similarity", "causal", "usefulness", "jacobian", "permutation", "defects")}
