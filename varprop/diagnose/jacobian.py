"""How far each layer is from the identity: norms of J - I for its Jacobian J, and of those of its two branches.

The products with J come from `jacobian_products.py`, what follows from them from `jacobian_statistics.py`, the spectral
norm, which needs products of both sides, from `jacobian_spectrum.py`.

Shape suffixes: `S` sequences, `T` tokens, `D` d_model, `P` parts (layer, attention, feed-forward), `k` probes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose.jacobian_products import exact_tokens, mean_rows, probe_tokens, unchanged
from varprop.diagnose.jacobian_spectrum import spectral_norms
from varprop.diagnose.jacobian_statistics import BY_DEFINITION, BY_PART, relative_stderr, summary
from varprop.diagnose.layers import from_1
from varprop.diagnose.replay import Captured
from varprop.diagnose.session import Arrays, Session, Variables
from varprop.errors import ArgumentError, require
from varprop.measure import random_signs
from varprop.results import BRANCHES

EXACT_PRODUCTS = 2**14
"""The most products, one for each neuron of each token, that own_token and all_sources are exact with."""
MOST_TOKEN_PROBES = 16
FEWEST_PROBES = 4


def jacobian(session: Session) -> Variables:
    """Norms of J - I for the Jacobian J of every layer, and of its two branches, with standard errors over probes.

    J_ts (D, D): derivative of the stream after a layer at token t by the stream before it at token s, at the streams of
    the first sequences of about `jacobian_tokens` tokens. jacobian_deviation (layer, definition): token_mean (arXiv
    2603.15389) |mean_b sum_ts J_ts / T - I|^2 / D, the mean over all sequences b; own_token the mean over all tokens t
    of |J_tt - I|^2 / D; all_sources that of sum_s |J_ts - I [t = s]|^2 / D. |.| is the Frobenius norm.
    jacobian_norm (layer) = |token_mean's matrix| / D, which the paper draws. branch_jacobian_deviation (layer, branch,
    definition): the same of x -> x + branch(x), that is the norms of the derivative of what a branch adds by the stream
    that it is a function of: for the feed-forward part the stream after attention, in parallel layers the one before
    the layer, after the norm where the norm follows the sum. It is absent where branches cannot be told apart.

    More noise in fewer tokens makes the norm of a mean larger: <name>_split_half is free of that, the mean over all
    splits into halves A and B of <J_A - I, J_B - I> / D, from two sequences on; it can be negative.

    Of the matrix J of token_mean: jacobian_diagonal_mean and jacobian_diagonal_std of its diagonal,
    jacobian_off_diagonal_norm = |off-diagonal part| / sqrt(D^2 - D), jacobian_frobenius_norm = |J|,
    jacobian_identity_share the share of layers whose diagonal mean is above 0.5, jacobian_spectral_norm (see
    `jacobian_spectrum.spectral_norms`).

    `n_probes` random signs v, the same for all layers, give all of it without bias but for square roots: token_mean
    from products J^T v, one v for all output tokens; own_token and all_sources, whose noise is averaged over tokens
    too, as `measure.probe_jacobian_deviation` does, from a quarter as many probes of their own, at most 16.
    <name>_stderr is over probes, for these sequences (jackknife for the statistics of the diagonal);
    <name>_sequence_stderr over sequences, for these probes, by the bootstrap (split_half: jackknife, from three
    sequences on). jacobian_norm_stderr is of both, sqrt(probes^2 + sequences^2), NaN of one sequence. 0 probes, or as
    many as neurons: exact, one product for each neuron; then own_token and all_sources are exact where T D <= 2^14, and
    from 16 probes elsewhere. `jacobian_stderr` > 0: probes are doubled until token_mean's relative standard error over
    probes is not above it; jacobian_n_probes (layer) is how many that took, 0 = exact. Products are taken in the
    model's type, sums in at least float32: what bfloat16 rounds of (J - I)^T v is of the size of v.
    Layers count from 1; entries of layer 0 are NaN.
    Source: diagonal estimate, Bekas, Kokiopoulou and Saad (2007). Checked by: tests/diagnose/test_jacobian.py, whole
    Jacobians by torch.autograd.functional.jacobian.
    """
    n_probes = session.option("n_probes")
    good = n_probes == 0 or n_probes >= FEWEST_PROBES
    require(good, ArgumentError, "n_probes", n_probes, "too few", f"0 (exact) or at least {FEWEST_PROBES}")
    target = session.option("jacobian_stderr")
    require(0 <= target < 1, ArgumentError, "jacobian_stderr", target, "no relative error", "0 or a number below 1")
    replay = session.replay
    parts = _parts(session)
    sequences = session.first_sequences(session.option("jacobian_tokens"))
    exact = n_probes == 0 or n_probes >= replay.d_model
    n_columns = replay.d_model if exact else n_probes
    layer_bytes = 4 * (sequences.stop - sequences.start) * len(parts) * n_columns * replay.d_model
    size = max(1, int(replay.limits.memory / 8 / layer_bytes))
    found: list[Arrays] = []
    for start in range(0, replay.n_layers, size):
        layers = range(start, min(start + size, replay.n_layers))
        found += _measured(session, sequences, layers, parts, 0 if exact else n_probes)
    largest = spectral_norms(session, None if not exact else [arrays.pop("matrix") for arrays in found])
    return _variables(found, parts) | largest


def _measured(
    session: Session, sequences: slice, layers: Sequence[int], parts: Sequence[str], n_probes: int
) -> list[Arrays]:
    """`jacobian_statistics.summary` of some layers; probes are added where `jacobian_stderr` asks for them."""
    d_model, target = session.replay.d_model, session.option("jacobian_stderr")
    probes = _signs(session, 0, n_probes) if n_probes else None
    key = f"{layers[0]}-{layers[-1]}"
    first = _products(session, sequences, layers, parts, probes, f"{key}-0")
    rows = [[first["rows"][:, i]] for i in range(len(layers))]

    def numbers(i: int) -> Arrays:
        joined = np.concatenate(rows[i], axis=2)
        used = _signs(session, 0, joined.shape[2]).numpy() if n_probes else None
        tokens = {name: first[name][:, i] for name in ("own_token", "all_sources")}
        return summary(joined, used, tokens, session.seed)

    found = [numbers(i) for i in range(len(layers))]
    done, left = n_probes, list(range(len(layers)))
    while n_probes and target and done < d_model:
        left = [i for i in left if relative_stderr(found[i]) > target]
        if not left:
            break
        more = _signs(session, done, min(2 * done, d_model))
        chosen = [layers[i] for i in left]
        added = _products(session, sequences, chosen, parts, more, f"{key}-{done}", tokens_too=False)
        done += len(more)
        for place, i in enumerate(left):
            rows[i].append(added["rows"][:, place])
            found[i] = numbers(i)
    return found


def _signs(session: Session, start: int, stop: int) -> Tensor:
    """Probes `start` to `stop`, (k, D): the same ones however many are asked for at a time."""
    return random_signs((stop, session.replay.d_model), session.rng("jacobian"))[start:]


def _parts(session: Session) -> tuple[str, ...]:
    """The layer and, where they can be told apart in every one, its branches."""
    replay = session.replay
    captured = session.capture(slice(0, 1))
    try:
        with torch.no_grad():
            for layer in range(replay.n_layers):
                replay.branches(layer, captured.streams[layer][None], captured, unchanged)
    except ArgumentError:
        return ("layer",)
    return ("layer", *BRANCHES)


def _products(
    session: Session,
    sequences: slice,
    layers: Sequence[int],
    parts: Sequence[str],
    probes: Tensor | None,
    key: str,
    tokens_too: bool = True,
) -> Arrays:
    """rows (S, layers, P, k, D): sum_ts (J_ts - I [t = s])^T v / T for the k probes v (k, D); for branches without I.

    probes: None = the D unit vectors. With `tokens_too` also own_token and all_sources (S, layers, P, k') of k' probes
    of their own, or their exact values with k' = 1.
    """
    replay = session.replay
    few_products = probes is None and session.n_tokens * replay.d_model <= EXACT_PRODUCTS
    vectors = (torch.eye(replay.d_model) if probes is None else probes).to(replay.device)
    draws = None if few_products or not tokens_too else _token_probes(session, len(vectors))

    def compute(captured: Captured) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for layer in layers:
            of_layer = {"rows": mean_rows(replay, captured, layer, parts, vectors)}
            if draws is not None:
                of_layer |= probe_tokens(replay, captured, layer, parts, *draws)
            elif tokens_too:
                of_layer |= exact_tokens(replay, captured, layer, parts)
            for name, values in of_layer.items():
                found.setdefault(name, []).append(values)
        return {name: torch.stack(values, dim=1) for name, values in found.items()}

    of_call = replay.limits.call_tokens(2 * replay.call_bytes) // session.n_tokens
    size = min(session.batch_size(), max(1, of_call))
    retried = lambda captured: replay.limits.retried(lambda: compute(captured))  # noqa: E731
    return session.each_batch(f"jacobian-{key}", retried, sequences, size)


def _token_probes(session: Session, n_vectors: int) -> tuple[Tensor, Tensor]:
    """Random signs over tokens and neurons (k', T, D), and two over tokens (2, k', T, 1), int8."""
    n_probes = max(2, min(n_vectors, 4 * MOST_TOKEN_PROBES) // 4)
    rng, device = session.rng("jacobian tokens"), session.replay.device
    shapes = (n_probes, session.n_tokens, session.replay.d_model), (2, n_probes, session.n_tokens, 1)
    first, second = (random_signs(shape, rng).to(device, torch.int8) for shape in shapes)
    return first, second


def _variables(found: Sequence[Arrays], parts: Sequence[str]) -> Variables:
    """Variables over layers 0..L of the summaries of layers 1..L."""
    variables: Variables = {}
    for name in found[0]:
        values = np.stack([arrays[name] for arrays in found]).astype(np.float64)
        over_layers = from_1(values)
        dims = ("definition",) if name in BY_DEFINITION else ()
        if name not in BY_PART:
            variables[name] = (("layer",), over_layers)
            continue
        variables[name] = (("layer", *dims), over_layers[:, 0])
        if len(parts) > 1:
            variables[f"branch_{name}"] = (("layer", "branch", *dims), over_layers[:, 1:])
    diagonal = variables["jacobian_diagonal_mean"][1][1:]
    return variables | {"jacobian_identity_share": ((), float((diagonal > 0.5).mean()))}
