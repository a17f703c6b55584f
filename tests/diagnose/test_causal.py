"""The causal matrix against loops over the tokens of ordinary passes in which a layer gives back what it was given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varprop.diagnose.causal import causal
from varprop.diagnose.limits import Limits
from varprop.diagnose.replay import Batch, Replay
from varprop.diagnose.session import Session
from varprop.errors import ArgumentError

from . import zoo

ROUNDING = 2e-5
"""Of float64 models whose norms are computed in float32."""


def session(model: nn.Module, rows: Tensor) -> Session:
    return Session(Replay(model), Batch.causal(rows))


def contributions(model: nn.Module, rows: Tensor, skipped: int | None = None) -> list[np.ndarray]:
    """What each layer adds to the stream in one ordinary pass, (B, T, D) each."""
    found: dict[int, np.ndarray] = {}
    layers = zoo.layers_of(model)

    def change(index: int, x: Tensor, y: Tensor) -> Tensor:
        y = x if index == skipped else y
        found[index] = (y - x).detach().double().numpy()
        return y

    zoo.logits(model, rows, {layer: lambda x, y, i=i: change(i, x, y) for i, layer in enumerate(layers)})
    return [found[i] for i in range(len(layers))]


def by_loops(model: nn.Module, rows: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of means and maximum of ratios, (L, L) each."""
    base = contributions(model, rows)
    n_layers = len(base)
    mean, largest = np.zeros((n_layers, n_layers)), np.zeros((n_layers, n_layers))
    for source in range(n_layers):
        changed = contributions(model, rows, source)
        for target in range(source + 1, n_layers):
            changes, sizes, ratios = [], [], []
            for own, other in zip(
                base[target].reshape(-1, zoo.WIDTH), changed[target].reshape(-1, zoo.WIDTH), strict=True
            ):
                changes.append(math.sqrt(sum((o - b) ** 2 for o, b in zip(other, own, strict=True))))
                sizes.append(math.sqrt(sum(b**2 for b in own)))
                ratios.append(changes[-1] / sizes[-1])
            mean[source, target] = sum(changes) / sum(sizes)
            largest[source, target] = max(ratios)
    return mean, largest


def agrees_with_loops(family: str) -> None:
    model, rows = zoo.make(family, torch.float64), zoo.tokens(2, 6)
    found = causal(session(model, rows))
    mean, largest = by_loops(model, rows)
    np.testing.assert_allclose(found["causal_effect"][1][1:, 1:], mean, rtol=ROUNDING, atol=ROUNDING)
    np.testing.assert_allclose(found["causal_effect_max"][1][1:, 1:], largest, rtol=1e-4, atol=ROUNDING)
    assert np.isnan(found["causal_effect"][1][0]).all()
    assert np.isnan(found["causal_effect"][1][:, 0]).all()
    assert float(found["causal_effect_null"][1]) < ROUNDING
    assert (mean[np.triu_indices(3, 1)] > 0.01).all()


@zoo.each_family(*zoo.FEW)
def test_matrix(family: str) -> None:
    agrees_with_loops(family)


@pytest.mark.long
@zoo.each_family(*(name for name in zoo.FAMILIES if name not in zoo.FEW))
def test_matrix_in_every_family(family: str) -> None:
    agrees_with_loops(family)


def test_scalars_are_means_of_the_matrix() -> None:
    found = causal(session(zoo.make("llama", n_layers=5), zoo.tokens()))
    matrix = found["causal_effect"][1][1:, 1:]
    rows = [matrix[s, s + 1 :].mean() for s in range(4)]
    np.testing.assert_allclose(found["causal_layer_score"][1][1:], [*rows, np.nan])
    np.testing.assert_allclose(found["causal_score"][1], matrix[np.triu_indices(5, 1)].mean())
    np.testing.assert_allclose(found["causal_score_mean_row"][1], np.mean(rows))


def test_batches_and_memory_change_nothing() -> None:
    model, rows = zoo.make("gemma3", torch.float64), zoo.tokens(5, 8)
    whole = causal(session(model, rows))
    few = session(model, rows)
    few.replay.limits = Limits(4 * 2 * 4 * 8 * zoo.WIDTH * 8)  # two sequences of a pass
    assert few.batch_size() < 5
    for name, (_, values) in causal(few).items():
        np.testing.assert_allclose(values, whole[name][1], rtol=1e-4, atol=ROUNDING, err_msg=name)


def test_standard_error_is_that_over_sequences() -> None:
    """Of the same sequence four times it is zero; of many sequences it is what the matrix varies by, about 1 in 4."""
    model = zoo.make("llama")
    same = causal(session(model, zoo.tokens(1, 8).repeat(4, 1)))
    np.testing.assert_allclose(same["causal_score_stderr"][1], 0, atol=1e-6)
    draws = [causal(session(model, zoo.tokens(16, 6, seed=seed))) for seed in range(24)]
    spread = np.std([draw["causal_score"][1] for draw in draws], ddof=1)
    claimed = np.sqrt(np.mean([np.square(draw["causal_score_stderr"][1]) for draw in draws]))
    assert 0.5 < claimed / spread < 2  # 24 draws: the spread is known to 15 %, a factor of 2 is 4.6 of it


def test_one_layer_has_no_scalars() -> None:
    found = causal(session(zoo.make("llama", n_layers=1), zoo.tokens()))
    assert "causal_score" not in found
    assert found["causal_effect"][1].shape == (2, 2)


def test_our_own_models() -> None:
    model = zoo.make_own("parallel")
    rows = zoo.tokens(2, 6) % model.spec.vocab_size
    found = causal(session(model, rows))
    width, zoo_width = model.spec.d_model, zoo.WIDTH
    assert width != zoo_width
    base = contributions(model, rows)
    changed = contributions(model, rows, 0)
    for target in (1, 2):
        own, other = base[target].reshape(-1, width), changed[target].reshape(-1, width)
        expected = np.linalg.norm(other - own, axis=1).sum() / np.linalg.norm(own, axis=1).sum()
        np.testing.assert_allclose(found["causal_effect"][1][1, target + 1], expected, rtol=1e-10)


def test_norms_that_overflow_are_said() -> None:
    """Streams of 1e20 are finite in float32, their squares are not."""
    model = zoo.make("llama")
    with torch.no_grad():
        zoo.layers_of(model)[1].mlp.down_proj.weight.mul_(1e20)
    with pytest.raises(ArgumentError, match="activations='float32' are too large: norms of changes overflow"):
        causal(session(model, zoo.tokens()))
    assert np.isfinite(causal(session(model.double(), zoo.tokens()))["causal_score"][1])
