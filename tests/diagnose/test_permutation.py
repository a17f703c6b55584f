"""Permutation scores against forward passes of models whose modules are really exchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from varprop import presets
from varprop.diagnose import Batch, Replay, Session, measure
from varprop.diagnose.bootstrap import ratio, stderr
from varprop.diagnose.pairs import Pairs, draw_pairs
from varprop.diagnose.permutation import Sampled, permutation, sample
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.spec import ModelSpec

from . import zoo

ALL = {"permutation_pairs": 0, "permutation_tokens": 10**6}


def session_of(model: nn.Module, tokens: Tensor, **options: Any) -> Session:
    return Session(Replay(model), Batch.causal(tokens), options=ALL | options)


def exchanged(model: nn.Module, i: int, j: int) -> nn.Module:
    """A copy of the model with layers i and j (0..L-1) exchanged."""
    model = copy.deepcopy(model)
    first = Replay(model).layers[0]
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is first)
    layers[i], layers[j] = layers[j], layers[i]
    types = getattr(getattr(model, "config", None), "layer_types", None)
    if types is not None:  # the window and the rotary base are the layer's own, wherever it stands
        types[i], types[j] = types[j], types[i]
    return model


@torch.no_grad()
def losses_of(model: nn.Module, tokens: Tensor) -> np.ndarray:
    """Summed loss of each sequence, by the model's own pass."""
    out = model(tokens)
    logits = getattr(out, "logits", out).float()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return loss.double().reshape(len(tokens), -1).sum(dim=1).numpy()


def small_spec(n_layers: int) -> ModelSpec:
    return presets.tiny().with_fields(n_layers=n_layers, d_model=16, n_heads=2, n_kv_heads=2, d_ff=32, vocab_size=50)


def check_scores(model: nn.Module, tokens: Tensor) -> None:
    """The loss is a sum of float32 terms, known to 1e-6; with a float32 stream to 1e-5."""
    rounding = 1e-6 if next(model.parameters()).dtype == torch.float64 else 1e-5
    found = permutation(session_of(model, tokens))
    n_layers = len(Replay(model).layers)
    base = losses_of(model, tokens).sum()
    expected = np.zeros((n_layers + 1, n_layers + 1))
    for i in range(n_layers):
        for j in range(i + 1, n_layers):
            swapped = losses_of(exchanged(model, i, j), tokens).sum()
            expected[i + 1, j + 1] = expected[j + 1, i + 1] = np.log(swapped / base)
    inner = (slice(1, None), slice(1, None))
    assert np.abs(expected).max() > 20 * rounding, "the swaps must change something"
    np.testing.assert_allclose(found["permutation_log_change"][1][inner], expected[inner], rtol=0, atol=rounding)
    scores = np.abs(np.exp(expected) - 1)[inner]
    np.testing.assert_allclose(found["permutation_score"][1][inner], scores, rtol=0, atol=rounding)
    assert np.isnan(found["permutation_score"][1][0]).all()
    assert found["permutation_null"][1] < 1e-6
    upper = scores[np.triu_indices(n_layers, 1)]
    by_layer = scores.sum(axis=1) / (n_layers - 1)
    assert found["permutation_mean"][1] == pytest.approx(upper.mean(), abs=rounding)
    assert found["permutation_total"][1] == pytest.approx(upper.sum() / n_layers, abs=rounding)
    assert found["permutation_first_share"][1] == pytest.approx(scores[0].sum() / upper.sum(), rel=0.1)
    assert found["permutation_layer_score"][1][1:] == pytest.approx(by_layer, abs=rounding)
    weighted = np.mean([0.9**i * by_layer[i] for i in range(n_layers)])
    assert found["permutation_weighted"][1] == pytest.approx(weighted, abs=rounding)
    by_lag = [np.diagonal(scores, lag).mean() for lag in range(n_layers)]
    assert found["permutation_by_lag"][1] == pytest.approx(by_lag, abs=rounding)


@zoo.each_family(*zoo.FEW)
def test_scores_are_those_of_models_with_exchanged_layers(family: str) -> None:
    model = zoo.make(family, torch.float32 if family in zoo.MIXTURES else torch.float64)
    check_scores(model, zoo.tokens())


@pytest.mark.long
@zoo.each_family(*(family for family in zoo.FAMILIES if family not in zoo.FEW))
def test_scores_of_the_other_families(family: str) -> None:
    model = zoo.make(family, torch.float32 if family in zoo.MIXTURES else torch.float64)
    check_scores(model, zoo.tokens())


def test_scores_of_our_own_model() -> None:
    model = Transformer(small_spec(5), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    check_scores(model, torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(0)))


def test_standard_errors_are_those_of_the_bootstrap() -> None:
    """Over 40 sequences, of changes far from 0; linearised and bootstrap errors differ by the resampling, 4 %, and
    curvature."""
    rng = np.random.default_rng(3)
    base = 10 + rng.normal(size=40)
    swapped = base[:, None] * (1 + np.linspace(0.2, 0.7, 6)) + rng.normal(size=(40, 1)) + rng.normal(size=(40, 6))
    sampled = Sampled(draw_pairs(4, 0, rng), swapped, np.ones((40, 6), dtype=bool), base, base)

    def change(swapped: np.ndarray, base: np.ndarray) -> np.ndarray:
        return ratio(swapped - base[..., None], base[..., None])

    def total(swapped: np.ndarray, base: np.ndarray) -> np.ndarray:
        return np.abs(change(swapped, base)).sum(axis=-1) / 4

    assert sampled.stderr == pytest.approx(stderr(change, swapped, base), rel=0.2)
    error = sampled.scalars()["permutation_total_stderr"][1]
    assert error == pytest.approx(float(stderr(total, swapped, base)), rel=0.2)

    def share(swapped: np.ndarray, base: np.ndarray) -> np.ndarray:
        scores = np.abs(change(swapped, base))
        return scores[..., :3].sum(axis=-1) / scores.sum(axis=-1)  # pairs (1, 2), (1, 3), (1, 4) come first

    error = sampled.scalars()["permutation_first_share_stderr"][1]
    assert error == pytest.approx(float(stderr(share, swapped, base)), rel=0.2)
    logs = sampled.matrices()["permutation_log_change_stderr"][1][1, 2]
    direct = stderr(lambda s, b: np.log(s[..., 0] / b), swapped, base)
    assert logs == pytest.approx(float(direct), rel=0.2)


class Steps(nn.Module):
    """A residual network of which each layer adds tanh(x @ matrix) / k, or x @ matrix."""

    def __init__(self, matrices: list[Tensor], k: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.layers = nn.ModuleList(Step(matrix, k, linear) for matrix in matrices)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Step(nn.Module):
    def __init__(self, matrix: Tensor, k: int, linear: bool) -> None:
        super().__init__()
        self.matrix, self.k, self.linear = nn.Parameter(matrix), k, linear

    def forward(self, x: Tensor) -> Tensor:
        added = x @ self.matrix
        return x + (added if self.linear else torch.tanh(added) / self.k)


def scores_of(matrices: list[Tensor], k: int = 1, linear: bool = False) -> dict[str, float]:
    torch.manual_seed(1)
    model = Steps(matrices, k, linear).double()
    tokens = torch.randint(20, (2, 12), generator=torch.Generator().manual_seed(2))
    found = permutation(session_of(model, tokens))
    return {name: float(found[f"permutation_{name}"][1]) for name in ("mean", "total", "first_share")}


def test_of_finer_steps_the_mean_falls_as_one_over_depth_and_the_total_stays() -> None:
    """Layers of one function of depth, each cut into k = 3, 6 copies of 1 / k: second-order terms in 1 / k remain."""
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    coarse, fine = ([matrix for matrix in matrices for _ in range(k)] for k in (3, 6))
    first, second = scores_of(coarse, 3), scores_of(fine, 6)
    assert second["mean"] / first["mean"] == pytest.approx(11 / 23, rel=0.1)
    assert second["total"] == pytest.approx(first["total"], rel=0.1)


def test_where_only_layer_1_differs_the_mean_is_diluted_and_the_total_stays() -> None:
    """All other layers are one projection, which a second time does nothing: pairs with layer 1 have the same score at
    every depth, but for that with the last layer, and the others none."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    eye = torch.eye(6, dtype=torch.float64)
    project = -turn[:, :3] @ turn[:, :3].T
    first = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    found = {n: scores_of([first - eye, *[project] * (n - 1)], linear=True) for n in (6, 18)}
    assert found[6]["mean"] > 0.01
    assert [found[n]["first_share"] for n in found] == pytest.approx([1, 1])
    assert found[18]["mean"] / found[6]["mean"] == pytest.approx(6 / 18, rel=0.2)
    assert found[18]["total"] / found[6]["total"] == pytest.approx((17 / 18) / (5 / 6), rel=0.2)


def test_the_papers_means_as_totals() -> None:
    """Its scores over depth fall by 3.2, the totals by 1.14 (arXiv 2603.15389, its figure of scores over depth)."""
    means, depths = np.array([0.985, 0.713, 0.438, 0.306]), np.array([12, 16, 24, 32])
    assert (means * (depths - 1) / 2).round(1).tolist() == [5.4, 5.3, 5.0, 4.7]


def test_drawn_pairs_are_measured_and_the_others_are_unknown() -> None:
    model = zoo.make("llama", n_layers=6)
    tokens = zoo.tokens(3, 6)
    everything = permutation(session_of(model, tokens))
    found = permutation(session_of(model, tokens, permutation_pairs=6))
    measured = found["permutation_measured"][1]
    assert 6 <= np.triu(measured).sum() < 15
    assert (found["permutation_sequences"][1] == 3 * measured).all()
    same = np.where(measured[1:, 1:] | np.eye(6, dtype=bool), everything["permutation_score"][1][1:, 1:], np.nan)
    assert (np.diag(same) == 0).all()
    np.testing.assert_allclose(found["permutation_score"][1][1:, 1:], same, rtol=0, atol=1e-6)
    assert found["permutation_mean_stderr"][1] > 0


def test_lags_without_a_swapped_pair_are_unknown() -> None:
    found = permutation(session_of(zoo.make("llama", n_layers=8), zoo.tokens(3, 6), permutation_pairs=4))
    n_pairs = found["permutation_lag_pairs"][1]
    assert (n_pairs[1:] == 0).any()
    for name in ("permutation_by_lag", "permutation_by_lag_stderr"):
        np.testing.assert_array_equal(np.isnan(found[name][1][1:]), n_pairs[1:] == 0)
        assert found[name][1][0] == 0


def test_sequences_are_added_for_the_pairs_that_need_them() -> None:
    model = zoo.make("llama", n_layers=4)
    options = {"permutation_tokens": 24, "permutation_stderr": 0.4}
    session = session_of(model, zoo.tokens(64, 6), **options)
    found = permutation(session)
    upper = np.triu_indices(5, 1)
    score, error, n = (found[f"permutation_{name}"][1][upper][4:] for name in ("score", "score_stderr", "sequences"))
    assert set(n) <= {8, 16, 32, 64}
    assert len(set(n)) > 1
    assert ((error <= 0.4 * score) | (n == 64)).all()
    assert found["permutation_runs"][1] == n.sum()
    assert found["permutation_runs_saved"][1] == pytest.approx(1 - n.sum() / (n.max() * len(n)))
    model_losses = [losses_of(exchanged(model, 0, 1), session.batch.tokens[: n[0]]).sum()]
    base = losses_of(model, session.batch.tokens[: n[0]]).sum()
    assert score[0] == pytest.approx(abs(model_losses[0] / base - 1), abs=1e-5)


def test_errors_of_pairs_with_unlike_numbers_of_sequences() -> None:
    """A sum over pairs of which each has its own first sequences, with noise that they share; 3,000 times."""
    rng = np.random.default_rng(0)
    pairs = draw_pairs(3, 0, rng)
    n_used = np.array([4, 8, 32])
    found = []
    for _ in range(3000):
        base = 10 + 0.5 * rng.normal(size=32)
        swapped = base[:, None] * [1.2, 1.3, 1.5] + rng.normal(size=(32, 1)) + 0.5 * rng.normal(size=(32, 3))
        used = np.arange(32)[:, None] < n_used
        scalars = Sampled(pairs, swapped * used, used, base, base).scalars()
        found.append([scalars["permutation_mean"][1], scalars["permutation_mean_stderr"][1]])
    means, errors = np.array(found).T
    assert means.mean() == pytest.approx(1 / 3, abs=0.005)
    assert (errors**2).mean() == pytest.approx(means.var(), rel=0.12)


class Made:
    """In place of a session: losses of 28 pairs, drawn with changes from 2 % to 100 % and noise that pairs share."""

    n_sequences, n_layers = 256, 8
    change = np.geomspace(0.02, 1, 28)

    def __init__(self, tolerance: float, noise: float, rng: np.random.Generator) -> None:
        self.replay, self.tolerance = self, tolerance
        self.base = 10 + rng.normal(size=256)
        errors = noise * (rng.normal(size=(256, 1)) + rng.normal(size=(256, 28)))
        self.swapped = self.base[:, None] * (1 + self.change) + 10 * errors * np.sqrt(self.change)

    def option(self, name: str) -> Any:
        return {"permutation_pairs": 0, "permutation_tokens": 1, "permutation_stderr": self.tolerance}[name]

    def first_sequences(self, n_tokens: int) -> slice:
        return slice(0, n_tokens)

    def rng(self, name: str) -> torch.Generator:
        return torch.Generator()

    def each_batch(self, name: str, compute: Any, rows: slice) -> Any:
        return compute(rows)

    def of_batch(self, session: Any, rows: slice, pairs: Pairs, active: np.ndarray) -> dict[str, np.ndarray]:
        used = np.zeros((rows.stop - rows.start, 28), dtype=bool)
        used[:, active] = True
        return {"swapped": self.swapped[rows] * used, "used": used, "base": self.base[rows], "null": self.base[rows]}


@pytest.mark.parametrize("tolerance, noise", [(0.1, 0.1), (0.3, 0.3)])
def test_errors_after_sequential_sampling(tolerance: float, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 repetitions. Stopping early makes the stated errors a little small and the mean a little high."""
    rng = np.random.default_rng(0)
    found, ratios, saved = [], [], []
    for _ in range(150):
        session = Made(tolerance, noise, rng)
        monkeypatch.setattr("varprop.diagnose.permutation.of_batch", session.of_batch)
        sampled = sample(session)  # type: ignore[arg-type]
        scalars = sampled.scalars()
        found.append([scalars["permutation_mean"][1], scalars["permutation_mean_stderr"][1]])
        ratios.append((sampled.change - session.change) / sampled.stderr)
        saved.append(scalars["permutation_runs_saved"][1])
    means, errors = np.array(found).T
    off = means - Made.change.mean()
    assert 0.6 < (errors**2).mean() / (off**2).mean() < 1.2
    assert abs(off.mean()) < 0.5 * off.std()
    assert np.sqrt(np.mean(np.square(ratios))) < 1.25
    assert np.mean(saved) > 0.5


def test_a_killed_measurement_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.make("llama", n_layers=4)
    options = {"permutation_tokens": 24, "permutation_stderr": 0.4}
    session = session_of(model, zoo.tokens(64, 6), **options)
    session.parts = tmp_path
    first = permutation(session)
    monkeypatch.setattr(Replay, "layer", None)
    second = permutation(session)
    for name, (_, values) in first.items():
        np.testing.assert_array_equal(values, second[name][1], err_msg=name)


def test_measure_gives_a_valid_result_and_pairs_depend_on_the_seed() -> None:
    model, tokens = zoo.make("llama", n_layers=6), zoo.tokens(2, 6)
    options = {"permutation_pairs": 5}
    results = [measure(model, tokens, scores="permutation", seed=seed, options=options) for seed in (0, 0, 1)]
    assert results[0].permutation_measured.equals(results[1].permutation_measured)
    assert not results[0].permutation_measured.equals(results[2].permutation_measured)
    assert float(results[0].permutation_mean) > 0


def test_one_layer_has_no_pairs() -> None:
    assert permutation(session_of(zoo.make("llama", n_layers=1), zoo.tokens())) == {}


def test_too_few_pairs_are_refused() -> None:
    with pytest.raises(ArgumentError, match="permutation_pairs=2 is too few"):
        permutation(session_of(zoo.make("llama", n_layers=5), zoo.tokens(), permutation_pairs=2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@zoo.each_family(*zoo.FEW)
def test_on_a_gpu(family: str) -> None:
    """Float32 as on the CPU, to the rounding of its matrix products; bfloat16 runs and gives numbers."""
    tokens = zoo.tokens(3, 10)
    here = permutation(session_of(zoo.make(family), tokens))["permutation_log_change"][1]
    there = permutation(session_of(zoo.make(family).cuda(), tokens))["permutation_log_change"][1]
    np.testing.assert_allclose(there, here, rtol=0, atol=0.02 * np.nanmax(np.abs(here)))
    low = permutation(session_of(zoo.make(family, torch.bfloat16).cuda(), tokens))
    assert np.isfinite(low["permutation_mean"][1])
    assert low["permutation_null"][1] < 0.02


def test_a_loss_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varprop.diagnose.permutation.walk", lambda *_: torch.full((5, 3), torch.nan))
    with pytest.raises(ArgumentError, match="layers 1 and 2 swapped='NaN or infinite' is no number"):
        permutation(session_of(zoo.make("llama"), zoo.tokens()))
