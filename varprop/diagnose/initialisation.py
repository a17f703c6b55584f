"""What the scores are expected to be at initialisation: closed forms, for drawing beside the measurement."""

from __future__ import annotations

import math
import warnings

import numpy as np

from varprop.diagnose.layers import PAIRS, from_1
from varprop.diagnose.session import Session, Variables
from varprop.errors import AccuracyWarning, UnsuitedError
from varprop.results import BRANCHES, SITES
from varprop.spec import ModelSpec
from varprop.theory import predict
from varprop.theory.backward import jacobian_profile
from varprop.theory.jacobian import DEFINITIONS
from varprop.theory.skipped import skipped_layer_effect

SUFFIX = "_at_initialisation"
CAUSAL_TOKENS = 32
"""Positions of the causal closed form, whose cost grows with L^2 T^3; it hardly depends on them."""


def initialisation(session: Session) -> Variables:
    """The expectation of every score that has a closed form, for random weights of the model's own shape.

    The names are those of the measured scores with `_at_initialisation`. Tokens are taken as exchangeable, with the
    correlation of the embeddings that repeated tokens give: the share of pairs of positions that hold the same token.
    From `theory.predict`: second_moment, variance (the former times 1 - 1 / d_model), token_correlation,
    jacobian_deviation and jacobian_norm. Branches are orthogonal to the stream, so branch_correlation is 0, and with v
    the second moment of a branch, q that of the stream which it is added to and k the skip multiplier, the cosine of
    the streams before and after the sum is (1 + v / (k^2 q))^(-1/2): block_influence and angular_distance are made of
    products of these, exact as d_model grows. causal_effect and its means: `theory.skipped_layer_effect`, at
    `CAUSAL_TOKENS` tokens at most.
    Losses have no closed form, nor have the scores made of them; at initialisation they are those of no model at all.
    Raises `UnsuitedError` for a model whose spec is not known (`hf.spec_of`), `AssumptionError` where theory ends.
    Checked by: tests/diagnose/test_initialisation.py, random networks.
    """
    spec = session.spec
    if spec is None:
        name = session.replay.architecture
        raise UnsuitedError(f"architecture={name!r} has no spec; expected a family that closed forms describe")
    correlation = repeated_share(session.batch.tokens.numpy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccuracyWarning)
        found = predict(spec, n_tokens=session.n_tokens, token_correlation=correlation)
    q, c = found.second_moment.to_numpy(), np.clip(found.token_correlation.to_numpy(), 0, 1)
    before, between_branches = SITES.index("resid_pre"), SITES.index("resid_mid")
    profile = jacobian_profile(
        spec,
        n_tokens=session.n_tokens,
        second_moment=q[1:, before],
        token_correlation=c[1:, before],
        middle_second_moment=q[1:, between_branches],
        middle_token_correlation=c[1:, between_branches],
    )
    jacobian = from_1(profile)
    cosines = np.array([1.0, *(block_cosine(spec, *row) for row in q[1:, [SITES.index(s) for s in SITES[:4]]])])
    log_cosines = np.cumsum(np.log(cosines))
    between = np.exp(-np.abs(log_cosines[:, None] - log_cosines[None]))
    causal = skipped_layer_effect(spec, n_tokens=min(session.n_tokens, CAUSAL_TOKENS), token_correlation=correlation)
    later = np.triu(np.ones_like(causal, dtype=bool), 1)
    rows = causal.sum(axis=1) / np.where(later.any(axis=1), later.sum(axis=1), np.nan)
    variables: Variables = {
        "second_moment": (("layer", "site"), q),
        "variance": (("layer", "site"), q * (1 - 1 / spec.d_model)),
        "token_correlation": (("layer", "site"), found.token_correlation.to_numpy()),
        "branch_correlation": (
            ("layer", "branch"),
            from_1(np.zeros((spec.n_layers, len(BRANCHES)))),
        ),
        "jacobian_deviation": (("layer", "definition"), jacobian),
        "jacobian_norm": (("layer",), np.sqrt(jacobian[:, DEFINITIONS.index("token_mean")] / spec.d_model)),
        "block_influence": (("layer",), from_1(1 - cosines[1:])),
        "angular_distance": (PAIRS, np.arccos(np.clip(between, 0, 1)) / math.pi),
        "causal_effect": (PAIRS, from_1(causal, 2)),
        "causal_layer_score": (("layer",), from_1(rows)),
    }
    if spec.n_layers > 1:
        variables["causal_score"] = ((), causal.sum() / later.sum())
        variables["causal_score_mean_row"] = ((), rows[:-1].mean())
    return {f"{name}{SUFFIX}": values for name, values in variables.items()}


def block_cosine(spec: ModelSpec, before: float, attn: float, middle: float, mlp: float) -> float:
    """cos of the streams before and after a block, from the second moments of its sites.

    >>> from varprop import presets
    >>> round(block_cosine(presets.tiny(), 1.0, 1.0, 2.0, 2.0), 12)
    0.5
    """
    k = spec.skip_scale**2
    if spec.block == "parallel":
        return (1 + (attn + mlp) / (k * before)) ** -0.5
    return ((1 + attn / (k * before)) * (1 + mlp / (k * middle))) ** -0.5


def repeated_share(tokens: np.ndarray) -> float:
    """Share of the pairs of positions of a sequence that hold the same token, averaged over sequences (S, T).

    >>> round(repeated_share(np.array([[5, 5, 7], [1, 2, 3]])), 3)
    0.167
    """
    n_tokens = tokens.shape[1]
    if n_tokens == 1:
        return 0.0
    counts = [np.unique(row, return_counts=True)[1] for row in tokens]
    return float(np.mean([(c * (c - 1)).sum() / (n_tokens * (n_tokens - 1)) for c in counts]))
