"""Permutation scores: how much the loss changes when two layers change places.

A swap puts module j in place i and module i in place j, each called with its own other arguments, so that a layer takes
its attention window and its rotary base with it. The released code swaps parameters instead; what is no parameter (a
window, a scale by depth) then stays in its place. The two are the same where all layers are built alike.

Letters: `P` swapped pairs, `B` sequences of a batch, `S` all sequences, `L` layers, `G` groups of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from varprop.diagnose.layers import PAIRS, from_1
from varprop.diagnose.pairs import Array, Pairs, draw_pairs
from varprop.diagnose.replay import Captured
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.wavefront import Program, Run, walk
from varprop.errors import ArgumentError, require

FEWEST_SEQUENCES = 8
"""That a standard error is first taken from, where it decides whether more are added."""
DECAY = 0.9
"""Of the weight of a layer, for each layer before it, in the paper's weighted mean."""


def permutation(session: Session) -> Variables:
    """The permutation scores of pairs of layers, their means, and a total that is fair to depth.

    l_ij is the loss of the model with layers i and j swapped, summed over the targets of some sequences, and l that of
    the model on the same sequences. permutation_score (i, j) = |l_ij - l| / l, symmetric (arXiv 2603.15389: a high
    score is a pair that may *not* be swapped); permutation_log_change = log(l_ij / l), signed. permutation_measured:
    whether the pair was swapped; the others are NaN, and 0 on the diagonal, where nothing changes.
    permutation_sequences: on how many sequences. permutation_null: the score of layer 1 in place of layer 1 by the same
    route, what rounding alone does.

    permutation_mean: mean over all pairs, the paper's. permutation_weighted: mean over layers i = 1..L of 0.9^(i-1)
    times permutation_layer_score, the mean of the pairs that hold i (the released code's list has the factor
    0.9^(i-1) in it). permutation_by_lag (lag): mean of the pairs of distance j - i, 0 at distance 0.
    permutation_layer_pairs and permutation_lag_pairs: of how many swapped pairs these are means; a mean of none is NaN.

    permutation_total = sum over pairs i < j of P_ij, over L: what it costs, to first order, to swap every layer once
    with a partner drawn from all layers, itself included. The mean is this times 2 / (L - 1), so it falls as 1 / L in
    two cases in which nothing that the network does has changed with its depth, while the total stays:
    (a) only pairs with layer 1 (or with a fixed number of layers) matter: L - 1 of the L (L - 1) / 2 pairs, each of
    score p, give the mean 2 p / L and the total p (1 - 1 / L);
    (b) the same function of depth is cut into finer steps: each layer is replaced by k copies that add 1 / k of what it
    added. A swap changes the loss by g_i (f_j - f_i)(x_i) + g_j (f_i - f_j)(x_j) to first order, 1 / k of what it was;
    of k^2 times as many pairs; the sum over L' = k L layers is that of L layers times k, and the total the same.
    Where every layer differs from every other by the same p at any depth the mean is p and the total grows as L: like a
    count of layers that are used, of which the mean is the share. permutation_first_share: share of the sum that the
    pairs with layer 1 have; 2 / L if they are like the others.

    Which pairs: option `permutation_pairs`, all or drawn (`varprop.diagnose.pairs`). Standard errors are over
    sequences, and over pairs for what is a sum over drawn ones. That of a score is the signed change's (linearised),
    so it does not shrink where the score touches 0; there the score, an absolute value, is larger in the mean than
    without noise. Which sequences: the first `permutation_tokens`; with `permutation_stderr` > 0 the pairs whose
    standard error is more than this part of their score get as many again, until all are used. permutation_runs:
    sequences run with a swap; permutation_runs_saved: share of the runs that are saved beside giving every pair as
    many as the neediest one.

    Empty for a model of one layer. Raises `ArgumentError` for a model without logits, a loss that is not finite.
    Source: reference formulas above; total derived here. Checked by: tests/diagnose/test_permutation.py, forward passes
    of models whose modules are exchanged.
    """
    session.replay.require_loss("permutation")
    if session.replay.n_layers == 1:
        return {}
    found = sample(session)
    return found.matrices() | found.groups() | found.scalars()


@dataclass(frozen=True)
class Sampled:
    """Summed losses of sequences: swapped (S, P), where a pair was `used` on the sequence; base and null (S)."""

    pairs: Pairs
    swapped: Array
    used: NDArray[np.bool_]
    base: Array
    null: Array

    @property
    def n_used(self) -> NDArray[np.int64]:
        """Sequences of each pair, (P)."""
        return self.used.sum(axis=0)

    @property
    def change(self) -> Array:
        """(l_ij - l) / l of each pair, (P)."""
        base = (self.used * self.base[:, None]).sum(axis=0)
        return (self.used * self.swapped).sum(axis=0) / base - 1

    @property
    def influence(self) -> Array:
        """How far each sequence moves `change`, (S, P), scaled so that the sum of squares over S is its variance.

        psi_sp = (d_sp - R_p l_s) / (n_p mean l) sqrt(n_p / (n_p - 1)) with d the loss's change, R its ratio: the
        linearised ratio of means. NaN with one sequence.
        """
        n, base = self.n_used, self.base[:, None]
        mean = (self.used * base).sum(axis=0) / n
        moved = self.used * (self.swapped - base - self.change * base)
        return moved / (n * mean) * np.sqrt(n / np.where(n > 1, n - 1.0, np.nan))

    @property
    def stderr(self) -> Array:
        """Of `change`, (P)."""
        return np.sqrt((self.influence**2).sum(axis=0))

    def matrices(self) -> Variables:
        """Of the swapped pairs."""
        log_error = self.stderr / (1 + self.change)
        return {
            "permutation_score": (PAIRS, self._matrix(np.abs(self.change))),
            "permutation_score_stderr": (PAIRS, self._matrix(self.stderr)),
            "permutation_log_change": (PAIRS, self._matrix(np.log1p(self.change))),
            "permutation_log_change_stderr": (PAIRS, self._matrix(log_error)),
            "permutation_measured": (PAIRS, self._matrix(np.ones(len(self.n_used), dtype=bool))),
            "permutation_sequences": (PAIRS, self._matrix(self.n_used)),
        }

    def groups(self) -> Variables:
        """Means over the pairs of a layer, and over those of a distance."""
        n_layers = self.pairs.n_layers
        lags = np.arange(n_layers)
        of_layer = np.stack([self.pairs.holds(layer) for layer in range(1, n_layers + 1)])
        of_lag = self.pairs.lag == lags[:, None]
        scores, influence = np.abs(self.change), self.influence * np.sign(self.change)
        by_layer = self.pairs.group_means(of_layer, np.full(n_layers, n_layers - 1.0), scores, influence)
        by_lag = self.pairs.group_means(of_lag, (n_layers - lags).astype(float), scores, influence)
        for values in by_lag:
            values[0] = 0.0  # a layer in its own place
        return {
            "permutation_layer_score": (("layer",), from_1(by_layer[0])),
            "permutation_layer_score_stderr": (("layer",), from_1(by_layer[1])),
            "permutation_layer_pairs": (("layer",), np.insert(of_layer.sum(axis=1), 0, 0)),
            "permutation_by_lag": (("lag",), by_lag[0]),
            "permutation_by_lag_stderr": (("lag",), by_lag[1]),
            "permutation_lag_pairs": (("lag",), of_lag.sum(axis=1)),
        }

    def scalars(self) -> Variables:
        """Over all pairs of the model."""
        pairs, n_layers = self.pairs, self.pairs.n_layers
        scores, influence = np.abs(self.change), self.influence * np.sign(self.change)
        one, with_first = np.ones(len(scores)), pairs.holds(1).astype(np.float64)
        decayed = (DECAY ** (pairs.first - 1) + DECAY ** (pairs.second - 1)) / (n_layers * (n_layers - 1))
        total, _ = pairs.estimate(one, scores, influence)
        scale = 1 / total if total > 0 else 0.0
        share, _ = pairs.estimate(scale * with_first, scores, influence)
        _, share_error = pairs.estimate(scale * (with_first - share), scores, influence)
        variables: Variables = {
            "permutation_first_share": ((), share),
            "permutation_first_share_stderr": ((), share_error),
        }
        coefficients = {"mean": one / pairs.n_all, "weighted": decayed, "total": one / n_layers}
        for name, coefficient in coefficients.items():
            value, error = pairs.estimate(coefficient, scores, influence)
            variables |= {f"permutation_{name}": ((), value), f"permutation_{name}_stderr": ((), error)}
        return variables | {
            "permutation_null": ((), abs(self.null.sum() / self.base.sum() - 1)),
            "permutation_runs": ((), int(self.n_used.sum())),
            "permutation_runs_saved": ((), 1 - self.n_used.mean() / self.n_used.max()),
        }

    def _matrix(self, values: np.ndarray) -> np.ndarray:
        """One number of each pair as a symmetric matrix over layers 0..L.

        Where there is none NaN, or 0 of counts and truth values; 0 for a layer with itself.
        """
        n_layers = self.pairs.n_layers
        nothing = np.nan if values.dtype.kind == "f" else 0
        matrix = np.full((n_layers + 1, n_layers + 1), nothing, dtype=values.dtype)
        np.fill_diagonal(matrix[1:, 1:], 0)
        matrix[self.pairs.first, self.pairs.second] = matrix[self.pairs.second, self.pairs.first] = values
        return matrix


def sample(session: Session) -> Sampled:
    """The losses of the swapped pairs, on as many sequences as the options ask for.

    With `permutation_stderr` > 0 the sequences are doubled, from 8 or more, for the pairs that are not known well
    enough yet, so that a pair is looked at a few times only. Still a pair stops sooner with a lucky error or a high
    score. In the simulation of test_errors_after_sequential_sampling, 400 times, with 8 sequences to begin with, the
    stated standard error of the mean was 0.82 to 0.94 of the true one, and the mean too high by 0.03 to 0.35 of it.
    """
    tolerance = session.option("permutation_stderr")
    seed = int(torch.randint(2**62, (), generator=session.rng("permutation")))
    rng = np.random.default_rng(seed)
    pairs = draw_pairs(session.replay.n_layers, session.option("permutation_pairs"), rng)
    start, stop = 0, session.first_sequences(session.option("permutation_tokens")).stop
    if tolerance > 0:
        stop = min(session.n_sequences, max(stop, FEWEST_SEQUENCES))
    active = np.arange(len(pairs.first))
    parts: list[dict[str, np.ndarray]] = []
    while True:
        arrays = session.each_batch(
            "permutation",
            lambda captured, active=active: of_batch(session, captured, pairs, active),
            slice(start, stop),
        )
        parts.append(arrays)
        found = Sampled(pairs, **{name: np.concatenate([part[name] for part in parts]) for name in arrays})
        start, stop = stop, min(2 * stop, session.n_sequences)
        active = active[(found.stderr > tolerance * np.abs(found.change))[active]]
        if tolerance == 0 or start == stop or len(active) == 0:
            return found


def of_batch(
    session: Session, captured: Captured, pairs: Pairs, active: Sequence[int] | np.ndarray
) -> dict[str, Tensor]:
    """The fields of `Sampled` of a batch, with the `active` pairs swapped and zeros for the others."""
    swaps: list[Program] = []
    for pair in active:
        i, j = int(pairs.first[pair]) - 1, int(pairs.second[pair]) - 1
        swaps.append({i: Run(j), j: Run(i)})
    losses = walk(session.replay, captured, [*swaps, {0: Run(0)}])
    for pair, good in zip(active, losses[: len(swaps)].isfinite().all(dim=1).tolist(), strict=True):
        name = f"loss with layers {pairs.first[pair]} and {pairs.second[pair]} swapped"
        require(good, ArgumentError, name, "NaN or infinite", "no number", "a type of wider range, such as bfloat16")
    swapped = losses.new_zeros(captured.n_sequences, len(pairs.first))
    which = torch.as_tensor(np.asarray(active), device=swapped.device)
    swapped[:, which] = losses[: len(swaps)].T
    used = torch.zeros_like(swapped, dtype=torch.bool)
    used[:, which] = True
    return {"swapped": swapped, "used": used, "base": losses[-1], "null": losses[-2]}
