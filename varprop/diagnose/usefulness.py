"""Usefulness: how much loss it costs to put the best affine map of its input in place of a whole layer.

Shape suffixes: `B` sequences, `T` tokens, `D` d_model, `L` layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.bootstrap import stderr
from varprop.diagnose.layers import from_1
from varprop.diagnose.normal_equations import Fit, NormalEquations
from varprop.diagnose.replay import Captured
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.wavefront import Affine, Program, walk
from varprop.errors import AccuracyWarning, ArgumentError, UnsuitedError, require

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of the mean over sequences of summed losses (..., P + 1), the model last, and of counts of targets."""
CURVE = "loss_ratio_threshold"
THRESHOLDS = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0)
"""Loss ratios of `usefulness_curve`."""

FEW = 4
"""Fewer tokens for each neuron than this are too few to fit a map on."""


def usefulness(session: Session) -> Variables:
    """Usefulness of every layer and its scalar, held out and, by option, in sample.

    Layer l is replaced as a whole, residual path included, by x + x W + b, the least-squares map (`fit`) on all
    tokens of the first `fit_share` of the sequences. usefulness_loss_ratio (layer): loss with it over loss without,
    both summed over the other sequences. usefulness_loss_increase: the difference, in nats per token. usefulness:
    share of layers whose ratio is above the option usefulness_loss_ratio, the paper's 1.1; usefulness_curve: the same
    for each of `THRESHOLDS`, since one threshold resolves 1 / L. usefulness_mean_loss_ratio: mean over layers. With
    the option in_sample the same with `_in_sample` behind the name, on the sequences of the fit: arXiv 2603.15389 fits
    and evaluates on the same tokens. Held out, a map is charged for its d_model^2 numbers too: with n tokens its
    residual is about 1 / (1 - d_model / n) times that of the best map, so keep n, usefulness_fit_tokens, many times
    d_model; an `AccuracyWarning` says so below `FEW` times.
    linear_r_squared (layer): share of the variance of the update that the map gives on the sequences of the fit;
    linear_update_rank: participation ratio of the covariance of the update that it gives.
    Standard errors: over the sequences of the evaluation, the same ones with and without; the maps are taken as given.
    Of few sequences they are uncertain, and that of a share of layers is 0 where no resample changes it.
    Layers count from 1; entries of layer 0 are NaN. Raises `UnsuitedError` for a model without logits and for one
    sequence, `ArgumentError` for a share outside (0, 1).
    Source: reference formulas above. Checked by: tests/diagnose/test_usefulness.py, lstsq and the model with that layer
    really replaced.
    """
    session.replay.require_loss("usefulness")
    first, rest = split(session)
    fitted, maps = _fitted(session, first), fit(session, first)
    count = (first.stop - first.start) * session.n_tokens
    _warn_of_few(count, session.replay.d_model)
    variables: Variables = {
        "linear_r_squared": (("layer",), from_1(np.array([found.r_squared for found in fitted]))),
        "linear_update_rank": (("layer",), from_1(np.array([found.rank for found in fitted]))),
        "usefulness_fit_tokens": ((), np.asarray(count)),
        CURVE: ((CURVE,), np.array(THRESHOLDS)),
        **evaluated(session, maps, rest, ""),
    }
    if session.option("in_sample"):
        variables |= evaluated(session, maps, first, "_in_sample")
    return variables


def _warn_of_few(n_tokens: int, d_model: int) -> None:
    if n_tokens >= FEW * d_model:
        return
    if n_tokens > d_model + 1:
        residual = f"held out, their residual is about {1 / (1 - d_model / n_tokens):.2g} times that of the best maps"
    else:
        residual = "the maps are underdetermined"
    message = f"usefulness: {residual}: {n_tokens} fit tokens for {d_model} neurons"
    warnings.warn(f"{message}; use at least {FEW} times d_model", AccuracyWarning, stacklevel=3)


def split(session: Session) -> tuple[slice, slice]:
    """The sequences that maps are fitted on, the first `fit_share` of them, and the others; at least one each."""
    share, n_sequences = session.option("fit_share"), session.n_sequences
    require(0 < share < 1, ArgumentError, "fit_share", share, "outside its range", "a number between 0 and 1")
    expected = "at least 2: some to fit a map on, others to evaluate it on"
    require(n_sequences >= 2, UnsuitedError, "sequences", n_sequences, "too few for usefulness", expected)
    n_fit = min(max(1, round(share * n_sequences)), n_sequences - 1)
    return slice(0, n_fit), slice(n_fit, n_sequences)


def fit(session: Session, sequences: slice) -> list[Affine]:
    """For each layer the affine map of its input that is closest to it on all tokens of some sequences.

    It minimises sum_t |y_t - x_t - x_t W - b|^2 for the streams x before and y after the layer
    (`NormalEquations.solve`); float32 or, for a model in float64, float64. Kept in this session.
    """
    return [Affine(found.matrix, found.shift) for found in _fitted(session, sequences)]


def _fitted(session: Session, sequences: slice) -> list[Fit]:
    """Of each layer, kept in this session: they take one pass, and as much room as the layers."""
    key = f"linear-{sequences.start}-{sequences.stop}"
    return session.kept(key, lambda: session.replay.limits.retried(lambda: _solve(session, sequences)))


def _solve(session: Session, sequences: slice) -> list[Fit]:
    """One pass for as many layers as have their sums, 16 d_model^2 bytes each, in half of the memory."""
    replay = session.replay
    at_once = max(1, int(replay.limits.memory / 2 / (16 * replay.d_model**2)))
    wide = torch.promote_types(replay.dtype, torch.float32)
    found: list[Fit] = []
    for start in range(0, replay.n_layers, at_once):
        layers = range(start, min(replay.n_layers, start + at_once))
        for sums in _sums(session, sequences, layers):
            solution = sums.solve()
            found.append(replace(solution, matrix=solution.matrix.to(wide), shift=solution.shift.to(wide)))
    return found


def _sums(session: Session, sequences: slice, layers: range) -> list[NormalEquations]:
    sums = [NormalEquations.empty(session.replay.d_model, session.replay.device) for _ in layers]
    size = session.batch_size()
    for start in range(sequences.start, sequences.stop, size):
        stop = min(sequences.stop, start + size)
        streams = session.capture(slice(start, stop)).streams
        for layer, own in zip(layers, sums, strict=True):
            before = streams[layer].flatten(0, 1).double()
            own.add(before, streams[layer + 1].flatten(0, 1).double() - before)
        if session.progress is not None:
            session.progress("linear", stop - sequences.start, sequences.stop - sequences.start)
    return sums


def evaluated(
    session: Session, maps: Sequence[Affine], sequences: slice, ending: str = "", part: str = "usefulness"
) -> Variables:
    """The variables that are read off the losses on some sequences with one map for each layer.

    ending: behind their names. part: name under which the losses are kept.
    """
    replay = session.replay
    programs: list[Program] = [{layer: replacement} for layer, replacement in enumerate(maps)]

    def of_batch(captured: Captured) -> dict[str, Tensor]:
        return {"loss": walk(replay, captured, programs).mT, "count": replay.count(captured.batch)}

    arrays = session.each_batch(f"{part}{ending}", of_batch, sequences)
    threshold = session.option("usefulness_loss_ratio")
    by_layer: dict[str, Statistic] = {"usefulness_loss_ratio": loss_ratio, "usefulness_loss_increase": loss_increase}
    others: dict[str, tuple[tuple[str, ...], Statistic]] = {
        "usefulness": ((), lambda loss, _: above(loss, threshold)),
        "usefulness_mean_loss_ratio": ((), lambda loss, count: loss_ratio(loss, count).mean(axis=-1)),
        "usefulness_curve": ((CURVE,), lambda loss, _: np.stack([above(loss, t) for t in THRESHOLDS], axis=-1)),
    }
    variables: Variables = {}
    losses = arrays["loss"], arrays["count"]
    means = [values.mean(axis=0) for values in losses]
    for name, statistic in by_layer.items():
        variables[name + ending] = (("layer",), from_1(statistic(*means)))
        variables[f"{name}{ending}_stderr"] = (("layer",), from_1(stderr(statistic, *losses, seed=session.seed)))
    for name, (dims, statistic) in others.items():
        variables[name + ending] = (dims, statistic(*means))
        variables[f"{name}{ending}_stderr"] = (dims, stderr(statistic, *losses, seed=session.seed))
    return variables


def loss_ratio(loss: np.ndarray, _: np.ndarray) -> np.ndarray:
    """Summed loss (..., P + 1) of every program over that of the model, the last one: (..., P)."""
    return loss[..., :-1] / loss[..., -1:]


def loss_increase(loss: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Summed loss (..., P + 1) of every program less that of the model, the last one, per target: (..., P)."""
    return (loss[..., :-1] - loss[..., -1:]) / count[..., None]


def above(loss: np.ndarray, threshold: float) -> np.ndarray:
    """Share of programs whose loss is more than `threshold` times that of the model."""
    return (loss[..., :-1] > threshold * loss[..., -1:]).mean(axis=-1)
