"""The causal matrix: how much each later layer's contribution changes when a layer is skipped.

Shape suffixes: `V` variants, `B` sequences, `T` tokens, `D` d_model, `L` layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.bootstrap import ratio, stderr
from varprop.diagnose.layers import PAIRS, from_1
from varprop.diagnose.replay import Captured
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.wavefront import Program, Run, Skip, walk
from varprop.errors import ArgumentError


def causal(session: Session) -> Variables:
    """The causal matrix of a model and its scalars, with standard errors over sequences.

    delta_l(t) is what layer l adds to token t, delta'_l the same where layer s < l is skipped.
    causal_effect (s, l) = sum_t |delta'_l - delta_l| / sum_t |delta_l| over all tokens of all sequences: the ratio of
    means of arXiv 2603.15389; 0 for l <= s. causal_effect_max = max_t |delta'_l - delta_l| / |delta_l|: the maximum of
    ratios of arXiv 2505.13898. causal_effect_null: the former where the skipped layer is put back, from the same walk:
    what rounding alone does. causal_layer_score (s): mean of row s over l > s, NaN for the last layer, which has none
    behind it; causal_score: mean over all pairs s < l, and causal_score_mean_row the mean over the L - 1 rows of their
    means: the paper gives a number for a model without saying which mean it is. Layers count from 1; entries of layer
    0 are NaN.
    Source: reference formulas above. Checked by: tests/diagnose/test_causal.py, loops over the model's own layers.
    """
    arrays = session.each_batch("causal", lambda captured: _of_batch(session, captured))
    n_layers = session.replay.n_layers
    change, size, null = arrays["change"], arrays["size"], arrays["null"]
    matrix = ratio(change.mean(axis=0), size.mean(axis=0)[None])
    later = np.triu(np.ones((n_layers, n_layers), dtype=bool), 1)

    def effect(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        return ratio(change, size[..., None, :])

    def rows(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        return effect(change, size).sum(axis=-1)[..., :-1] / later.sum(axis=-1)[:-1]

    def score(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        return effect(change, size).sum(axis=(-2, -1)) / later.sum()

    def mean_row(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        return rows(change, size).mean(axis=-1)

    variables: Variables = {
        "causal_effect": (PAIRS, from_1(matrix, 2)),
        "causal_effect_stderr": (PAIRS, from_1(stderr(effect, change, size, seed=session.seed), 2)),
        "causal_effect_max": (PAIRS, from_1(arrays["largest"].max(axis=0), 2)),
        "causal_effect_null": ((), effect(null, size).max()),
    }
    if n_layers > 1:
        by_layer = [
            np.append(f, np.nan)
            for f in (rows(change.mean(0), size.mean(0)), stderr(rows, change, size, seed=session.seed))
        ]
        variables |= {
            "causal_layer_score": (("layer",), from_1(by_layer[0])),
            "causal_layer_score_stderr": (("layer",), from_1(by_layer[1])),
        }
        for name, scalar in (("causal_score", score), ("causal_score_mean_row", mean_row)):
            variables[name] = ((), scalar(change.mean(0), size.mean(0)))
            variables[f"{name}_stderr"] = ((), stderr(scalar, change, size, seed=session.seed))
    return variables


def _of_batch(session: Session, captured: Captured) -> dict[str, Tensor]:
    """Per sequence: sums over tokens of |delta' - delta| (B, L, L), of |delta| (B, L), the largest ratio (B, L, L)."""
    replay, n_layers = session.replay, session.replay.n_layers
    shape = captured.n_sequences, n_layers, n_layers
    change = torch.zeros(shape, dtype=torch.float64, device=replay.device)
    largest, size = torch.zeros_like(change), torch.zeros_like(change[:, 0])
    null = torch.zeros_like(size)

    def observe(place: int, numbers: Sequence[int], before: Tensor, after: Tensor, contribution: Tensor) -> None:
        base = _norms(contribution)
        size[:, place] = base.double().sum(dim=-1)
        gaps = _norms((after - before) - contribution)  # (V, B, T)
        sums = gaps.double().sum(dim=-1)
        ratios = torch.where(base > 0, gaps / base, 0.0).amax(dim=-1).double()
        for i, number in enumerate(numbers):
            if 0 <= number < n_layers:
                change[:, number, place], largest[:, number, place] = sums[i], ratios[i]
            elif number == n_layers:
                null[:, place] = sums[i]

    skips: list[Program] = [{layer: Skip()} for layer in range(n_layers)]
    walk(replay, captured, [*skips, {0: Run(0)}], observe=observe, losses=False)
    if not bool(torch.isfinite(size).all() & torch.isfinite(change).all()):
        _ = captured.streams  # raises where the model itself is not finite
        kind, expected = str(replay.dtype).removeprefix("torch."), "smaller ones, or float64"
        raise ArgumentError(f"activations={kind!r} are too large: norms of changes overflow; expected {expected}")
    return {"change": change, "size": size, "largest": largest, "null": null}


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
