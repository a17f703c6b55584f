"""Moments of the stream and of what each branch adds to it, before the final norm.

Shape suffixes: `S` sequences, `B` those of one pass, `T` tokens, `D` d_model, `L` layers, `K` contributions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.bootstrap import Array, mean_itself, ratio, with_stderr
from varprop.diagnose.layers import PAIRS
from varprop.diagnose.replay import Captured
from varprop.diagnose.session import Arrays, Session, Variables
from varprop.diagnose.sites import branches_apart, each_layer, few_rows
from varprop.measure import (
    BRANCH_STREAM,
    QUANTILES,
    TokenMoments,
    branch_correlation,
    largest_energy_share,
    max_to_median,
    outlier_share,
    overlap_sums,
    sink_positions,
    token_correlation,
    token_moments,
    token_quantiles,
)
from varprop.results import BRANCHES, SITES

AT_SITES = ("layer", "site")
OF_BRANCHES = ("layer", "branch")
PRE, POST = SITES.index("resid_pre"), SITES.index("resid_post")
OF_SEQUENCES = ("token_correlation", "outlier_share_z3", "token_outlier_share_z3", "outlier_energy_share_top10")
"""What is measured of each sequence and site at once."""


def moments(session: Session) -> Variables:
    """Moments of every layer and site, named and defined as in training, with standard errors over sequences.

    Sites are `results.SITES`; at layer 0 there is `resid_post` alone, and NaN elsewhere.
    second_moment, variance: means over all tokens; token_correlation: of each sequence, averaged; branch_correlation
    (layer, branch): of each sequence, between a branch and the stream it is added to (`measure.BRANCH_STREAM`),
    averaged. Each with <name>_stderr.
    Sinks are judged on the streams of all sequences (`measure.sink_positions`), sink_count of them, the S first
    positions included. second_moment_quantile, variance_quantile (levels `measure.QUANTILES`), skewness_median,
    excess_kurtosis_median: over the tokens that are no sinks (all, if there are no others).
    second_moment_without_sinks, variance_without_sinks: means over the same tokens, with stderr. sink_second_moment,
    sink_variance: means over the sinks.
    Outliers, of each sequence, averaged, with stderr. outlier_share_z3: share of its T D entries with |x - mean| > 3
    standard deviations, mean and deviation over the same entries; token_outlier_share_z3: the same over the neurons of
    each token, averaged over tokens. outlier_energy_share_top10: share of the sum of squares that the 10 largest of T D
    entries have. massive_activation_ratio (layer): max |x| / median |x| over the T D entries of the stream.
    position_second_moment (layer, position): of the stream at the first positions (option `positions`), with stderr.
    branch_overlap, block_overlap: as `varprop.train.probe` defines them: mean over tokens of f_k . f_l / D.
    loss (sequence): nats per target of each sequence, n_targets (sequence): how many it has, 0 giving loss 0;
    loss_mean: nats per target of all sequences, with stderr. Of models with logits only.
    Where attention and feed-forward cannot be told apart a `BranchesWarning` says so, the sites of branches and
    `resid_mid` are NaN in every layer, and branch_correlation and the overlaps are absent.
    All but the losses exact to rounding in float64 of streams in the model's type.
    Checked by: tests/diagnose/test_moments.py, float64 numpy definitions and `varprop.train.probe`.
    """
    seed, branches = session.seed, branches_apart(session)
    size = session.batch_size(kept=2)  # for the overlaps what both branches add
    arrays = session.each_batch("moments", lambda captured: _of_batch(session, captured, branches), batch_size=size)
    _mark_absent(arrays, branches)
    by_token = np.moveaxis(arrays["by_token"], 0, -2)  # (moments, L + 1, sites, S, T)
    values = dict(zip(TokenMoments._fields, by_token, strict=True))
    per_sequence = {name: np.moveaxis(values[name].mean(axis=-1), -1, 0) for name in ("second_moment", "variance")}
    variables: Variables = {}
    for name, of_sequences in per_sequence.items():
        variables |= with_stderr(name, AT_SITES, mean_itself, of_sequences, seed=seed)
    variables |= with_stderr("token_correlation", AT_SITES, mean_itself, arrays["token_correlation"], seed=seed)
    if branches:
        correlations = arrays["branch_correlation"]
        variables |= with_stderr("branch_correlation", OF_BRANCHES, mean_itself, correlations, seed=seed)
    variables |= _of_tokens(values, seed)
    for name in OF_SEQUENCES[1:]:
        variables |= with_stderr(name, AT_SITES, mean_itself, arrays[name], seed=seed)
    ratios = arrays["massive_activation_ratio"]
    variables |= with_stderr("massive_activation_ratio", ("layer",), mean_itself, ratios, seed=seed)
    first = values["second_moment"][:, POST, :, : session.option("positions")]  # (L + 1, S, positions)
    first, dims = np.moveaxis(first, 1, 0), ("layer", "position")
    variables |= with_stderr("position_second_moment", dims, mean_itself, first, seed=seed)
    if branches:
        variables |= _overlaps(arrays["overlap"].mean(axis=0))
    if session.replay.has_loss:
        variables |= _losses(arrays, seed)
    return variables


@torch.no_grad()
def _of_batch(session: Session, captured: Captured, branches: bool) -> dict[str, Tensor]:
    """Of every token (B, moments, L + 1, sites, T), of every sequence (B, L + 1, ...), (B, K, K), (B).

    Zeros where there is no such site.
    """
    replay = session.replay
    n_sequences, n_tokens, n_layers = captured.n_sequences, captured.n_tokens, replay.n_layers
    places = n_sequences, n_layers + 1
    nothing = torch.zeros((), dtype=torch.float64, device=replay.device)
    by_token = nothing.repeat(n_sequences, len(TokenMoments._fields), n_layers + 1, len(SITES), n_tokens)
    found = {name: nothing.repeat(*places, len(SITES)) for name in OF_SEQUENCES}
    found["branch_correlation"] = nothing.repeat(*places, len(BRANCHES))
    found["massive_activation_ratio"] = nothing.repeat(*places)
    contributions: list[Tensor] = []
    stream = captured.start
    for layer, sites in each_layer(replay, captured, branches):
        contributions += [x for site, x in sites.items() if layer == 0 or site in BRANCH_STREAM]
        for rows in few_rows(replay, captured):
            wide = {site: x[rows].double() for site, x in sites.items()}
            found["massive_activation_ratio"][rows, layer] = max_to_median(wide["resid_post"].flatten(-2))
            for site, x in wide.items():
                if site != "resid_pre":  # the stream after the layer before, measured there
                    here = layer, SITES.index(site)
                    by_token[rows, :, *here] = torch.stack(token_moments(x), dim=1)
                    for name, value in _of_sequences(x).items():
                        found[name][rows, *here] = value
                if site in BRANCH_STREAM:
                    branch = list(BRANCH_STREAM).index(site)
                    found["branch_correlation"][rows, layer, branch] = branch_correlation(wide[BRANCH_STREAM[site]], x)
        stream = sites["resid_post"]
    by_token[:, :, 1:, PRE] = by_token[:, :, :-1, POST]
    for name in OF_SEQUENCES:
        found[name][:, 1:, PRE] = found[name][:, :-1, POST]
    if branches:
        found["overlap"] = torch.stack([overlap_sums(list(one)) for one in zip(*contributions, strict=True)])
        found["overlap"] /= n_tokens * replay.d_model
    if replay.has_loss:
        found["loss"] = replay.losses(stream[None], captured.batch)[0]
        found["n_targets"] = replay.count(captured.batch)
    return {"by_token": by_token, **found}


def _mark_absent(arrays: Arrays, branches: bool) -> None:
    """Set NaN where there is no such site, or none that can be told."""
    absent = np.zeros((arrays["by_token"].shape[2], len(SITES)), dtype=bool)
    absent[0, :POST] = True
    absent[:, PRE + 1 : POST] |= not branches
    arrays["by_token"][:, :, absent] = np.nan
    for name in OF_SEQUENCES:
        arrays[name][:, absent] = np.nan
    arrays["branch_correlation"][:, 0] = np.nan


def _of_sequences(x: Tensor) -> dict[str, Tensor]:
    """The statistics of `OF_SEQUENCES` of x (B, T, D), (B) each."""
    entries = x.flatten(-2)
    values = (
        token_correlation(x),
        outlier_share(entries, 3.0),
        outlier_share(x, 3.0).mean(dim=-1),
        largest_energy_share(entries, 10),
    )
    return dict(zip(OF_SEQUENCES, values, strict=True))


def _of_tokens(values: dict[str, Array], seed: int) -> Variables:
    """Quantiles and means over the tokens that are no sinks, and means over the sinks, from (L + 1, sites, S, T)."""
    sinks = sink_positions(torch.from_numpy(values["second_moment"][:, POST])).numpy()
    others = ~sinks if not sinks.all() else sinks
    variables: Variables = {"sink_count": ((), int(sinks.sum()))}
    for name, of_tokens in values.items():
        quantiles = token_quantiles(torch.from_numpy(of_tokens), torch.from_numpy(others)).numpy()
        if name in ("skewness", "excess_kurtosis"):
            variables[f"{name}_median"] = (AT_SITES, quantiles[..., QUANTILES.index(0.5)])
            continue
        variables[f"{name}_quantile"] = ((*AT_SITES, "quantile"), quantiles)
        variables[f"sink_{name}"] = (AT_SITES, of_tokens[..., sinks].mean(axis=-1))
        sums = np.moveaxis((of_tokens * others).sum(axis=-1), -1, 0)  # (S, L + 1, sites)
        counts = others.sum(axis=-1).astype(float)[:, None, None]
        variables |= with_stderr(f"{name}_without_sinks", AT_SITES, ratio, sums, counts, seed=seed)
    return variables


def _overlaps(overlap: Array) -> Variables:
    """Between branches of one kind, and between whole blocks, from those of all contributions (K, K): the embedding,
    then attention and feed-forward of each layer."""
    n_layers, n_branches = len(overlap) // len(BRANCHES), len(BRANCHES)
    layer_of = np.array([0, *np.repeat(np.arange(1, n_layers + 1), n_branches)])
    into_blocks = np.equal.outer(np.arange(n_layers + 1), layer_of).astype(float)
    by_branch = np.full((n_branches, n_layers + 1, n_layers + 1), np.nan)
    for branch in range(n_branches):
        by_branch[branch, 1:, 1:] = overlap[1 + branch :: n_branches, 1 + branch :: n_branches]
    return {
        "branch_overlap": (("branch", *PAIRS), by_branch),
        "block_overlap": (PAIRS, into_blocks @ overlap @ into_blocks.T),
    }


def _losses(arrays: Arrays, seed: int) -> Variables:
    sums, counts = arrays["loss"], arrays["n_targets"]
    return {
        "loss": (("sequence",), ratio(sums, counts)),
        "n_targets": (("sequence",), counts.astype(np.int64)),
        **with_stderr("loss_mean", (), ratio, sums, counts, seed=seed),
    }
