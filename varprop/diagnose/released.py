"""What the released code of arXiv 2603.15389 computes under the names of its scores, defect by defect.

Written from a description of that code. Each score has the names of the corrected one, so that two results can be laid
side by side; `defects` puts one defect at a time into the corrected score. What differs:

row_shift   transformers records the streams of a dense model, and a skipped layer leaves no entry: behind it the
            contribution of layer l + 1 in the skipped run is compared with that of layer l, and the last column is 0.
final_norm  the last recorded stream of a dense model is the one after the final norm, so that the last layer is
            norm(layer(x)) in the causal matrix, the Jacobian, usefulness and the similarity.
transposed  usefulness installs the transpose of the fitted matrix.
in_sample   usefulness is evaluated on the tokens of the fit.
elementwise the Jacobian by the method of this name is divided by the micro-batch.

The streams of mixtures are put together by hand there: without row_shift and final_norm. Not imitated: chunks of text
drawn with replacement, bfloat16, the weight of a last, smaller micro-batch.

Shape suffixes: `V` variants, `B` sequences, `T` tokens, `D` d_model, `L` layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from varprop.diagnose import experts as corrected_experts
from varprop.diagnose import permutation as corrected_permutation
from varprop.diagnose.bootstrap import ratio, resample_weights, with_stderr
from varprop.diagnose.jacobian_products import Graph, n_copies
from varprop.diagnose.layers import PAIRS, from_1
from varprop.diagnose.normal_equations import NormalEquations
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.diagnose.usefulness import evaluated, fit, split
from varprop.diagnose.wavefront import Affine, Program, Skip, walk

DEFECTS = ("row_shift", "final_norm", "transposed", "in_sample", "elementwise")
MICRO_BATCH = 2
"""Of the released Jacobian."""


def defects_of(session: Session) -> tuple[str, ...]:
    """The defects that the released code has for a model like this one, with its own settings.

    Raises `UnsuitedError` as `experts.is_mixture` does.
    """
    is_dense = not any(corrected_experts.is_mixture(layer) for layer in session.replay.layers)
    recorded = ("row_shift", "final_norm") if is_dense else ()
    divided = ("elementwise",) if session.option("elementwise_micro_batch") else ()
    return (*recorded, "transposed", "in_sample", *divided)


def causal(session: Session, defects: Collection[str] | None = None) -> Variables:
    """causal_effect (s, l) as released: row_shift and final_norm; its means over l > s and over all pairs.

    defects: some of `DEFECTS`; None = `defects_of`. causal_layer_score of the last layer is NaN, as in the code;
    causal_score: it states no number for a model, this is the mean over all pairs s < l.
    Checked by: tests/diagnose/test_released.py, lists of recorded streams of models without the layer.
    """
    given = defects_of(session) if defects is None else defects
    key = _key("causal", given, ("row_shift", "final_norm"))
    arrays = session.each_batch(key, lambda captured: _changes(session.replay, captured, given))
    n_layers = session.replay.n_layers
    later = np.triu(np.ones((n_layers, n_layers)), 1)
    counts = np.where(later.any(axis=-1), later.sum(axis=-1), np.nan)

    def effect(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        return np.pad(ratio(change, size[..., None, :]), ((0, 0), (1, 0), (1, 0)), constant_values=np.nan)

    def layer_score(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        rows = ratio(change, size[..., None, :]).sum(axis=-1) / counts
        return np.pad(rows, ((0, 0), (1, 0)), constant_values=np.nan)

    def score(change: np.ndarray, size: np.ndarray) -> np.ndarray:
        return ratio(change, size[..., None, :]).sum(axis=(-2, -1)) / max(later.sum(), 1)

    sums = arrays["change"], arrays["size"]
    variables: Variables = {}
    for name, dims, statistic in (
        ("causal_effect", PAIRS, effect),
        ("causal_layer_score", ("layer",), layer_score),
        ("causal_score", (), score),
    ):
        variables |= with_stderr(name, dims, statistic, *sums, seed=session.seed)
    return variables


@torch.no_grad()
def _changes(replay: Replay, captured: Captured, defects: Collection[str]) -> dict[str, Tensor]:
    """Sums over tokens of |delta' - delta| (B, L, L) and of |delta| (B, L)."""
    n_layers, shift = replay.n_layers, int("row_shift" in defects)
    streams = _recorded(replay, captured, defects)
    contributions = [after - before for before, after in itertools.pairwise(streams)]
    change = torch.zeros(captured.n_sequences, n_layers, n_layers, dtype=torch.float64, device=replay.device)

    def observe(place: int, numbers: Sequence[int], before: Tensor, after: Tensor, _: Tensor) -> None:
        if place == n_layers - 1 and "final_norm" in defects:
            after = replay.normed(after.flatten(0, 1)).reshape(after.shape)
        target = place - shift
        for i, number in enumerate(numbers):
            if 0 <= number < target:
                change[:, number, target] = _norms((after[i] - before[i]) - contributions[target])

    skips: list[Program] = [{layer: Skip()} for layer in range(n_layers)]
    walk(replay, captured, skips, observe=observe, losses=False)
    return {"change": change, "size": torch.stack([_norms(x) for x in contributions], dim=1)}


def usefulness(session: Session, defects: Collection[str] | None = None) -> Variables:
    """The variables of `usefulness.evaluated` as released: transposed, in_sample and final_norm.

    in_sample: fit and evaluation on all sequences; without it as the corrected score. final_norm: the last layer's map
    is fitted to the stream after the final norm and its output is normed again. defects: see `causal`.
    Checked by: tests/diagnose/test_released.py, lstsq and the model with that layer replaced; a layer that is affine.
    """
    session.replay.require_loss("usefulness")
    given = defects_of(session) if defects is None else defects
    everything = slice(0, session.n_sequences)
    first, rest = (everything, everything) if "in_sample" in given else split(session)
    maps = fit(session, first)
    if "final_norm" in given:
        maps[-1] = _map_to_norm(session, first)
    if "transposed" in given:
        # x W + b is fitted, x W^T + b installed; both W and its transpose are I plus the map of the update.
        maps = [Affine(found.matrix.mT, found.shift) for found in maps if found.matrix is not None]
    key = _key("usefulness", given, ("final_norm", "transposed", "in_sample"))
    variables = evaluated(session, maps, rest, part=key)
    return {name: value for name, value in variables.items() if not name.startswith("usefulness_curve")}


def _map_to_norm(session: Session, sequences: slice) -> Affine:
    """The map from the last layer's input to its output after the final norm, as an update."""
    replay = session.replay
    sums = NormalEquations.empty(replay.d_model, replay.device)
    size = session.batch_size()
    for start in range(sequences.start, sequences.stop, size):
        captured = session.capture(slice(start, min(sequences.stop, start + size)))
        with torch.no_grad():
            before, after = captured.streams[-2], replay.normed(captured.streams[-1])
        sums.add(before.flatten(0, 1), after.flatten(0, 1).double() - before.flatten(0, 1).double())
    found, wide = sums.solve(), torch.promote_types(replay.dtype, torch.float32)
    return Affine(found.matrix.to(wide), found.shift.to(wide))


def jacobian(session: Session, defects: Collection[str] | None = None) -> Variables:
    """Norms of the mean Jacobian of every layer as released: final_norm and, by option, elementwise. Exact.

    J (D, D): summed over source tokens, averaged over target tokens and sequences, then the norms, as the corrected
    token_mean; elementwise: J over the micro-batch (option elementwise_micro_batch, else 2). jacobian_norm = |J - I| /
    D, jacobian_off_diagonal_norm = |off-diagonal part| / sqrt(D^2 - D), jacobian_diagonal_mean, jacobian_diagonal_std,
    jacobian_frobenius_norm = |J|, jacobian_spectral_norm, jacobian_identity_share: of layers with a diagonal mean
    above 0.5. D products for every layer and sequence. Only jacobian_norm has a standard error. defects: see `causal`.
    Checked by: tests/diagnose/test_released.py, torch.autograd.functional.jacobian of norm and layer.
    """
    return _jacobians(session, [defects_of(session) if defects is None else defects])[0]


def _jacobians(session: Session, chosen: Sequence[Collection[str]]) -> list[Variables]:
    """`jacobian` with each of some sets of defects, from the same products."""
    replay, sequences = session.replay, session.first_sequences(session.option("jacobian_tokens"))
    micro_batch = session.option("elementwise_micro_batch") or MICRO_BATCH
    found: list[list[dict[str, float]]] = [[] for _ in chosen]
    for layer in range(replay.n_layers):
        rows: dict[bool, np.ndarray] = {}
        for by_layer, given in zip(found, chosen, strict=True):
            normed = layer == replay.n_layers - 1 and "final_norm" in given
            if normed not in rows:
                rows[normed] = _rows(session, sequences, layer, normed)
            divisor = micro_batch if "elementwise" in given else 1
            by_layer.append(_summary(rows[normed] / divisor, session.seed))
    return [_over_layers(by_layer) for by_layer in found]


def _over_layers(by_layer: list[dict[str, float]]) -> Variables:
    variables: Variables = {
        name: (("layer",), from_1(np.array([found[name] for found in by_layer]))) for name in by_layer[0]
    }
    share = float(np.mean([found["jacobian_diagonal_mean"] > 0.5 for found in by_layer]))
    return variables | {"jacobian_identity_share": ((), share)}


def _rows(session: Session, sequences: slice, layer: int, normed: bool) -> np.ndarray:
    """`_mean_rows` of some sequences, (S, D, D) float64."""

    def of_batch(captured: Captured) -> dict[str, Tensor]:
        return {"rows": _mean_rows(session.replay, captured, layer, normed)}

    key = f"released-jacobian-{layer}{'-final_norm' * normed}"
    return session.each_batch(key, of_batch, sequences)["rows"].astype(np.float64)


def _mean_rows(replay: Replay, captured: Captured, layer: int, normed: bool) -> Tensor:
    """sum_ts J_ts / T of every sequence, (B, D, D), of the layer or of the final norm behind it."""
    d_model = replay.d_model
    size = n_copies(replay, captured, d_model)
    graph = Graph(replay, captured, layer, ("layer",), size)
    found = torch.zeros(captured.n_sequences, d_model, d_model, dtype=graph.sum_type, device=replay.device)
    units = torch.eye(d_model, dtype=graph.sum_type, device=replay.device)
    for start in range(0, d_model, size):
        some = units[start : start + size]
        cotangent = units.new_zeros(graph.x.shape)
        cotangent[: len(some)] = some[:, None, None]
        if normed:
            cotangent = _through_norm(replay, captured.streams[-1], cotangent)
        (product,) = graph.products(cotangent)
        found[:, start : start + len(some)] = (product + cotangent)[: len(some)].mean(dim=2).transpose(0, 1)
    return found


def _through_norm(replay: Replay, streams: Tensor, cotangent: Tensor) -> Tensor:
    """J^T u of the final norm at streams (B, T, D) for u (V, B, T, D)."""
    x = streams.expand(cotangent.shape).flatten(0, 1).clone().requires_grad_()
    with torch.enable_grad():
        y = replay.normed(x)
    (found,) = torch.autograd.grad(y, x, cotangent.flatten(0, 1).to(y.dtype))
    return found.reshape(cotangent.shape).to(cotangent.dtype)


def _summary(rows: np.ndarray, seed: int) -> dict[str, float]:
    """Of Jacobians (S, D, D) of sequences: norms of their mean."""
    n_sequences, d_model, _ = rows.shape
    matrix = rows.mean(axis=0)
    diagonal = np.diag(matrix)
    gaps = (rows - np.eye(d_model)).reshape(n_sequences, -1)
    weights = resample_weights(n_sequences, seed)
    resampled = np.sqrt(np.maximum(np.einsum("ra,ab,rb->r", weights, gaps @ gaps.T, weights), 0)) / d_model
    factor = (n_sequences / (n_sequences - 1)) ** 0.5 if n_sequences > 1 else np.nan
    return {
        "jacobian_norm": float(np.linalg.norm(gaps.mean(axis=0)) / d_model),
        "jacobian_norm_stderr": float(resampled.std(ddof=1) * factor),
        "jacobian_off_diagonal_norm": float(np.linalg.norm(matrix - np.diag(diagonal)) / (d_model**2 - d_model) ** 0.5),
        "jacobian_diagonal_mean": float(diagonal.mean()),
        "jacobian_diagonal_std": float(diagonal.std()),
        "jacobian_frobenius_norm": float(np.linalg.norm(matrix)),
        "jacobian_spectral_norm": float(np.linalg.norm(matrix, 2)),
    }


def permutation(session: Session) -> Variables:
    """The corrected score (`varprop.diagnose.permutation`) of all pairs on all sequences: the code has no defect here.

    But permutation_layer_score is listed with the weight 0.9^(l-1) in it. The code swaps parameters and not layers,
    which differs where layers have windows or scales of their own.
    """
    options = {"permutation_pairs": 0, "permutation_tokens": session.n_sequences * session.n_tokens}
    found = corrected_permutation.permutation(
        dataclasses.replace(session, options={**session.options, **options, "permutation_stderr": 0.0})
    )
    for name in ("permutation_layer_score", "permutation_layer_score_stderr"):
        if name in found:
            dims, values = found[name]
            found[name] = (dims, values * corrected_permutation.DECAY ** (np.arange(len(values)) - 1))
    return found


def similarity(session: Session, defects: Collection[str] | None = None) -> Variables:
    """layer_similarity (k, l): cosine between the mean streams of layers k and l as released: final_norm.

    Over all tokens, layers 0..L; dominated by what all tokens have in common. defects: see `causal`.
    Checked by: tests/diagnose/test_released.py, means of recorded streams.
    """
    given = defects_of(session) if defects is None else defects

    def of_batch(captured: Captured) -> dict[str, Tensor]:
        with torch.no_grad():
            streams = _recorded(session.replay, captured, given)
        return {"mean": torch.stack([x.double().mean(dim=1) for x in streams], dim=1)}

    def cosines(mean: np.ndarray) -> np.ndarray:
        unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return unit @ np.swapaxes(unit, -1, -2)

    means = session.each_batch(_key("similarity", given, ("final_norm",)), of_batch)["mean"]
    return dict(with_stderr("layer_similarity", PAIRS, cosines, means, seed=session.seed))


def experts(session: Session) -> Variables:
    """expert_load as released: 0 for every expert, since its hook never fits what the router gives.

    Nothing for a model without a mixture.
    """
    found = corrected_experts.experts(session)
    if not found:
        return {}
    dims, load = found["expert_load"]
    return {"expert_load": (dims, np.where(np.isnan(load), np.nan, 0.0))}


def defects(session: Session) -> Variables:
    """The headline numbers with no defect, with each of `DEFECTS` alone, and with all that the code has for this model.

    causal_score_by_defect, usefulness_by_defect, usefulness_mean_loss_ratio_by_defect (defect),
    jacobian_norm_by_defect (defect, layer), with standard errors. A defect that is not in a score leaves it as it is.
    """
    session.replay.require_loss("defects")
    labels = ("none", *DEFECTS, "all")
    chosen: Mapping[str, tuple[str, ...]] = {"none": (), "all": defects_of(session)} | {
        name: (name,) for name in DEFECTS
    }
    variables: Variables = {"defect": (("defect",), np.array(labels))}
    for score, names, concerned in (
        (lambda sets: [causal(session, some) for some in sets], ("causal_score",), ("row_shift", "final_norm")),
        (
            lambda sets: [usefulness(session, some) for some in sets],
            ("usefulness", "usefulness_mean_loss_ratio"),
            ("final_norm", "transposed", "in_sample"),
        ),
        (lambda sets: _jacobians(session, sets), ("jacobian_norm",), ("final_norm", "elementwise")),
    ):
        of_label = [tuple(name for name in concerned if name in chosen[label]) for label in labels]
        sets = list(dict.fromkeys(of_label))
        found = dict(zip(sets, score(sets), strict=True))
        for name in (name + end for name in names for end in ("", "_stderr")):
            values = np.stack([np.asarray(found[some][name][1]) for some in of_label])
            by_defect = name.removesuffix("_stderr") + "_by_defect" + "_stderr" * name.endswith("_stderr")
            variables[by_defect] = (("defect", *found[()][name][0]), values)
    return variables


def _recorded(replay: Replay, captured: Captured, defects: Collection[str]) -> list[Tensor]:
    """The streams of layers 0..L as they are recorded."""
    last = captured.streams[-1]
    return [*captured.streams[:-1], replay.normed(last) if "final_norm" in defects else last]


def _key(score: str, defects: Collection[str], concerned: Sequence[str]) -> str:
    return "-".join(["released", score, *(name for name in concerned if name in defects)])


def _norms(x: Tensor) -> Tensor:
    """Sum over tokens of the norms of x (B, T, D): (B) float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=wide).double().sum(dim=-1)
