"""Pruning by every score that was measured: which of them says best what can go."""

from __future__ import annotations

import numpy as np

from varprop.diagnose.pruning import pruning
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.usefulness import fit, split
from varprop.errors import UnsuitedError, require

RANKINGS = (
    *("block_influence", "relative_update", "causal_layer_score", "usefulness_loss_ratio", "linear_r_squared"),
    *("jacobian_norm", "permutation_layer_score", "ablation_loss_ratio"),
)
"""Scores of layers that rank them; the smallest goes first, of linear_r_squared the largest."""


def consequence(session: Session) -> Variables:
    """`pruning` by each of `RANKINGS` that was measured before, layers skipped and made linear.

    Evaluated on the sequences that the linear maps were not fitted on; the rankings have seen some of them or all.
    ablation_loss_ratio ranks by the intervention `skip`. causal_layer_score says nothing of the last layer, which goes
    last. permutation_layer_score is left out where fewer than half of the pairs of a layer were swapped: the layers
    would be ranked by which pairs were drawn. Raises `UnsuitedError` where no such score was measured.
    Checked by: tests/diagnose/test_consequence.py.
    """
    found = session.found
    rankings = {name: np.asarray(found[name][1], dtype=float) for name in RANKINGS if name in found}
    if "ablation_loss_ratio" in rankings:
        names = list(found["intervention"][1])
        rankings["ablation_loss_ratio"] = rankings["ablation_loss_ratio"][:, names.index("skip")]
    if "causal_layer_score" in rankings:
        scores = rankings["causal_layer_score"]
        rankings["causal_layer_score"] = np.append(scores[:-1], np.nanmax(scores))  # of equal ones the last goes last
    if "permutation_layer_score" in rankings:
        n_pairs = np.asarray(found["permutation_layer_pairs"][1])[1:]
        if (2 * n_pairs < len(n_pairs) - 1).any():
            del rankings["permutation_layer_score"]
    if "linear_r_squared" in rankings:
        rankings["linear_r_squared"] = -rankings["linear_r_squared"]
    expected = "one of them before it: influence, causal, usefulness, jacobian, permutation, ablation"
    require(bool(rankings), UnsuitedError, "scores", "pruning", "without a score that ranks layers", expected)
    first, rest = split(session)
    return pruning(session, rankings, fit(session, first), evaluate=rest)
