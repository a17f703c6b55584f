"""What a ranking of layers is worth: the loss when the layers that it calls least useful are removed.

Letters: `K` most layers removed, `O` orders of removal, `R` kinds of removal, `P` sets of removed layers, `B`
sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.bootstrap import stderr
from varprop.diagnose.replay import Captured
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.usefulness import with_targets
from varprop.diagnose.wavefront import Op, Program, Skip, walk
from varprop.errors import ArgumentError, require

ORDERS = ("removed_by", "removal")
N_RANDOM = 3
"""Random orders beside the rankings."""


def pruning(
    session: Session,
    rankings: Mapping[str, np.ndarray],
    linear: Sequence[Op] | None = None,
    *,
    evaluate: slice | None = None,
) -> Variables:
    """The loss when the 1, ..., K least useful layers by each ranking are removed, and how the rankings compare.

    rankings: name -> usefulness of layers 0..L (entry 0 is not read), of which the smallest is removed first; equal
    ones in the order of the layers. linear: what stands for each layer 1..L where it is made linear; None = layers
    are only skipped. evaluate: sequences of the losses, all if None; give the ones that the linear maps were not
    fitted on. K: the option `most_removed`, or half of the layers.

    pruning_loss (removed_by, removal, n_removed): nats per token; removed_by names a ranking, one of three random
    orders, or `greedy`; removal is `skip`, where a layer adds nothing, or `linear`. The greedy order takes, one after
    the other, the layer whose skipping raises the loss least given those that are gone, on the first `pruning_tokens`
    tokens before `evaluate` (of it, where it begins with the first sequence: the order has then seen what it is
    judged on). The same order serves both kinds of removal. pruning_base_loss: of the model. pruning_order
    (removed_by, n_removed): the layer, 1..L, that goes at each step. pruning_mean_increase (removed_by, removal):
    mean over 1..K removed layers of the loss less the model's; pruning_behind_best: the same less that of the best
    order, and pruning_rank: its place among the orders, 1 = best. The best is picked on the sequences that it is
    compared on, so it looks better than it is, and behind_best is too large by as much; with its error it is no test of
    one order against the best. Every standard error is of the difference stated, over the sequences with targets, the
    same ones for both terms; pruning_loss_stderr is that of pruning_loss - pruning_base_loss. It takes the orders as
    given: with the ranking's own noise they would vary. Raises `ArgumentError` for a model without logits, rankings of
    other shapes or with NaN. Source: definitions above. Checked by: tests/diagnose/test_pruning.py, forward passes of
    models without those layers.
    """
    replay, n_layers = session.replay, session.replay.n_layers
    replay.require_loss("pruning")
    most = session.option("most_removed") or max(1, n_layers // 2)
    require(1 <= most <= n_layers, ArgumentError, "most_removed", most, "out of range", f"0 to {n_layers}")
    rows = slice(*(evaluate or slice(None)).indices(session.n_sequences)[:2])
    orders = {name: _ascending(name, ranking, n_layers)[:most] for name, ranking in rankings.items()}
    generator = session.rng("pruning")
    for number in range(1, N_RANDOM + 1):
        orders[f"random_{number}"] = torch.randperm(n_layers, generator=generator).tolist()[:most]
    orders["greedy"] = greedy_order(session, most, rows.start)
    removals: dict[str, Sequence[Op]] = {"skip": [Skip()] * n_layers}
    if linear is not None:
        require(len(linear) == n_layers, ArgumentError, "linear", len(linear), "not one for each layer", str(n_layers))
        removals["linear"] = linear
    losses, base, count = _losses(session, list(orders.values()), list(removals.values()), rows)
    return _variables(orders, list(removals), losses, base, count, session.seed)


def greedy_order(session: Session, most: int, before: int) -> list[int]:
    """Places (0..L-1) in the order in which skipping them raises the loss least, one after the other; one walk each.

    It is chosen on the first `pruning_tokens` tokens, and none from sequence `before` on unless that is the first.
    """
    rows = session.first_sequences(session.option("pruning_tokens"))
    rows = slice(0, min(rows.stop, before) if before > 0 else rows.stop)
    order: list[int] = []
    for step in range(most):
        left = [place for place in range(session.replay.n_layers) if place not in order]
        programs: list[Program] = [dict.fromkeys([*order, place], Skip()) for place in left]

        def of_batch(captured: Captured, programs: list[Program] = programs) -> dict[str, Tensor]:
            return {"loss": walk(session.replay, captured, programs)[:-1].T}

        loss = session.each_batch(f"pruning-greedy-{step}", of_batch, rows)["loss"].sum(axis=0)
        order.append(left[int(loss.argmin())])
    return order


def _ascending(name: str, ranking: np.ndarray, n_layers: int) -> list[int]:
    """Places (0..L-1), the least useful first."""
    ranking = np.asarray(ranking, dtype=float)
    good = ranking.shape == (n_layers + 1,) and bool(np.isfinite(ranking[1:]).all())
    expected = f"finite numbers of layers 0 to {n_layers}, of which the first is not read"
    require(good, ArgumentError, f"rankings[{name!r}]", ranking.tolist(), "no ranking of the layers", expected)
    return np.argsort(ranking[1:], kind="stable").tolist()


def _losses(
    session: Session, orders: Sequence[Sequence[int]], removals: Sequence[Sequence[Op]], rows: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed losses of each sequence (S, O, R, K), those of the model (S), and the targets (S), from one walk a batch.

    Orders that have removed the same set share its program.
    """
    programs: list[Program] = []
    numbers: dict[tuple[int, frozenset[int]], int] = {}
    which = np.zeros((len(orders), len(removals), len(orders[0])), dtype=int)
    for index in np.ndindex(which.shape):
        order, removal, n_removed = index
        gone = frozenset(orders[order][: n_removed + 1])
        if (removal, gone) not in numbers:
            numbers[removal, gone] = len(programs)
            programs.append({place: removals[removal][place] for place in sorted(gone)})
        which[index] = numbers[removal, gone]

    def of_batch(captured: Captured) -> dict[str, Tensor]:
        return {"loss": walk(session.replay, captured, programs).T, "count": session.replay.count(captured.batch)}

    digest = hashlib.sha256(repr([(removal, sorted(gone)) for removal, gone in numbers]).encode()).hexdigest()[:8]
    arrays = with_targets(session.each_batch(f"pruning-{digest}", of_batch, rows))
    return arrays["loss"][:, which], arrays["loss"][:, -1], arrays["count"]


def _variables(
    orders: Mapping[str, Sequence[int]],
    removals: Sequence[str],
    losses: np.ndarray,
    base: np.ndarray,
    count: np.ndarray,
    seed: int,
) -> Variables:
    def increase(losses: np.ndarray, base: np.ndarray, count: np.ndarray) -> np.ndarray:
        """(..., O, R, K), with or without a leading axis of resamples."""
        return (losses - base[..., None, None, None]) / count[..., None, None, None]

    def mean_increase(*means: np.ndarray) -> np.ndarray:
        return increase(*means).mean(axis=-1)

    sums = losses, base, count
    means = losses.mean(axis=0), base.mean(axis=0), count.mean(axis=0)
    found = mean_increase(*means)
    best = found.argmin(axis=0)

    def behind_best(*means: np.ndarray) -> np.ndarray:
        each = mean_increase(*means)
        return each - np.stack([each[..., order, [kind]] for kind, order in enumerate(best)], axis=-1)

    base_loss = base.mean() / count.mean()
    variables: Variables = {
        "removed_by": (("removed_by",), np.array(list(orders))),
        "removal": (("removal",), np.array(removals)),
        "n_removed": (("n_removed",), np.arange(1, losses.shape[-1] + 1)),
        "pruning_order": (("removed_by", "n_removed"), np.array(list(orders.values())) + 1),
        "pruning_base_loss": ((), base_loss),
        "pruning_base_loss_stderr": ((), stderr(lambda base, count: base / count, base, count, seed=seed)),
        "pruning_loss": ((*ORDERS, "n_removed"), base_loss + increase(*means)),
        "pruning_loss_stderr": ((*ORDERS, "n_removed"), stderr(increase, *sums, seed=seed)),
        "pruning_rank": (ORDERS, found.argsort(axis=0, kind="stable").argsort(axis=0) + 1),
    }
    for name, statistic in (("mean_increase", mean_increase), ("behind_best", behind_best)):
        variables[f"pruning_{name}"] = (ORDERS, statistic(*means))
        variables[f"pruning_{name}_stderr"] = (ORDERS, stderr(statistic, *sums, seed=seed))
    return variables
