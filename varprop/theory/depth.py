"""The recursion over depth of a model at initialisation: `predict(spec)`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from varprop import results
from varprop.errors import AccuracyWarning, AssumptionError, require
from varprop.spec import ModelSpec
from varprop.spec.axes import axes_json, combinations, dimensions
from varprop.theory.backward import gradient_second_moment, jacobian_profile
from varprop.theory.causal import has_closure
from varprop.theory.error import claims
from varprop.theory.exchangeable import (
    embedding_second_moment,
    exchangeable_profile,
    is_tabulated,
    largest_input,
    structure,
)
from varprop.theory.gram import GramRecursion
from varprop.theory.jacobian import DEFINITIONS, jacobian_error
from varprop.theory.moments import Moments
from varprop.theory.position_gradient import gradient_by_position

METHODS = ("auto", "sampled")
MAX_INTEGER = 10**15
MAX_GRAM_TOKENS = 4096
"""A position-resolved recursion holds several (n_tokens, n_tokens) matrices."""
MAX_GRADIENT_NUMBERS = 2**29
"""The way back reads two such matrices for each layer, in float32: 2 GB."""
WARN_ABOVE = 0.05
"""Claimed relative error of the stream beyond which `predict` warns."""
NUMBERS = (
    *("second_moment", "token_correlation", "theory_error", "token_correlation_error"),
    *("second_moment_stderr", "token_correlation_stderr"),
)
RUN_ARGUMENTS = ("n_tokens", "token_correlation")


@dataclass
class _Point:
    """One spec and its tokens, and the profile found: arrays (n_layers + 1, 5)."""

    spec: ModelSpec
    n_tokens: int
    token_correlation: float | np.ndarray
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    exactness: np.ndarray = field(default_factory=lambda: np.empty(0))
    backward: dict[str, np.ndarray] = field(default_factory=dict)
    grams: list[tuple[np.ndarray, np.ndarray]] | None = None
    """Kept for the gradients where positions are resolved: before the attention and the feed-forward of each layer."""

    @property
    def attributes(self) -> dict[str, Any]:
        """What a result says of it; a correlation matrix by its SHA-256 as float64, as in a simulation."""
        given = self.token_correlation
        correlation = results.sha256_of_array(given) if isinstance(given, np.ndarray) else given
        named = {"spec": self.spec.to_json(), "spec_id": self.spec.spec_id}
        return {**named, "n_tokens": int(self.n_tokens), "token_correlation": correlation}

    def write(
        self,
        second_moment: np.ndarray,
        correlation: np.ndarray,
        stderr: np.ndarray | float = 0.0,
        correlation_stderr: np.ndarray | float = 0.0,
        attention_error: np.ndarray | None = None,
    ) -> None:
        """Store layers 1..n_layers, (n_layers, 5), add the claimed errors, and the embedding as layer 0."""
        claimed = claims(self.spec, self.n_tokens, second_moment, correlation, attention_error)
        shape = second_moment.shape
        profile = (
            *(second_moment, correlation, claimed.relative, claimed.correlation),
            *(np.broadcast_to(stderr, shape), np.broadcast_to(correlation_stderr, shape)),
        )
        embedding = np.full((1, 5), np.nan)
        for name, values in zip(NUMBERS, profile, strict=True):
            embedding[0, 4] = values[0, 0]  # the embedding is what layer 1 reads
            self.numbers[name] = np.concatenate([embedding, values])
        first = np.array([["", "", "", "", "exact"]])
        self.exactness = np.concatenate([first, claimed.exactness]).astype("<U10")

    def write_backward(self, documents: np.ndarray | None) -> None:
        """Add the gradients and the Jacobians of the blocks, from the profile stored."""
        q, c = self.numbers["second_moment"], np.clip(self.numbers["token_correlation"], 0.0, 1.0)
        moments: dict[str, Any] = {
            **{"second_moment": q[1:, 0], "token_correlation": c[1:, 0]},
            **{"middle_second_moment": q[1:, 2], "middle_token_correlation": c[1:, 2]},
        }
        jacobian = jacobian_profile(self.spec, n_tokens=self.n_tokens, **moments)
        absent = np.full((1, len(DEFINITIONS)), np.nan)
        if self.grams is None:
            gradient = gradient_second_moment(self.spec, n_tokens=self.n_tokens, **moments).second_moment
        else:
            gradient = gradient_by_position(self.spec, self.grams, documents=documents).mean(axis=-1)
        self.backward["jacobian_deviation"] = np.concatenate([absent, jacobian])
        self.backward["grad_second_moment"] = gradient
        errors = np.array([jacobian_error(self.spec, layer) for layer in range(1, self.spec.n_layers + 1)])
        power = jacobian[:, DEFINITIONS.index("all_sources")]
        passed = np.cumsum((errors * power / (1 + power))[::-1])[::-1]
        self.backward["grad_second_moment_error"] = np.append(passed, 0.0)
        self.backward["jacobian_deviation_error"] = np.concatenate([absent, np.tile(errors[:, None], 3)])


def predict(
    spec: ModelSpec,
    *,
    n_tokens: int,
    token_correlation: float | np.ndarray = 0.0,
    seed: int = 0,
    method: str = "auto",
    documents: Sequence[int] | np.ndarray | None = None,
    over: Mapping[str, Sequence[Any]] | None = None,
    backward: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Second moment and token correlation at every layer and site of a model at initialisation.

    token_correlation: of the embeddings of two tokens, a number in [0, 1], or a correlation matrix
    (n_tokens, n_tokens), 1 where two positions hold the same token. The embedding has the second moment
    (init std * embedding_scale)^2. documents: (n_tokens,) integers, tokens see keys of their own document only.
    over: field names (or `n_tokens`, `token_correlation`) with their values; the result has these dimensions first, the
    second of those two as `input_token_correlation`. backward: add the variables `jacobian_deviation` (layer,
    definition), ||J - I||_F^2 / d of each block in the three definitions of `block_jacobian`, with its relative error
    `jacobian_deviation_error`, and `grad_second_moment`
    (layer), of the gradient of the stream relative to that of the last layer, with `grad_second_moment_error`, the sum
    of the former's over the layers above (causal and windowed attention: the Gram matrix of the gradients of all
    positions goes back through the layers). progress: called with the layers done and
    their number.
    method: "auto" takes the two-scalar recursion where tokens are exchangeable (full attention without positions), the
    deterministic closure of the token Gram matrix where it holds, and else draws attention heads; "sampled" draws them
    wherever there is attention.

    Variables, dimensions (layer, site): `second_moment`, E|x|^2 / d averaged over positions; `token_correlation`,
    E x_i.x_j / d averaged over i != j over the second moment (1 for one token, 0 for an absent branch);
    `theory_error`, the claimed relative error of `second_moment`; `token_correlation_error`, its own claimed absolute
    error; `second_moment_stderr` and `token_correlation_stderr`, the standard errors from drawn heads (0 where nothing
    was drawn); `exactness`, "exact", "quadrature" or "O(1/width)" of `second_moment`.

    Not claimed: for n_tokens > d_model in full attention the correlations of single pairs of tokens, which couple
    values and keys, vary more with every layer, and attention outputs are up to several times as large as predicted
    (experiments/theory_vs_simulation). Warns (`AccuracyWarning`) there, and where the claimed error of the stream
    passes 5 %. The same seed gives bitwise the same result. Raises `AssumptionError` outside the domain, naming the
    parameter. Source: proofs/ of each component.
    Checked by: experiments/theory_accuracy.py, tests/theory/test_depth.py.

    >>> from varprop.spec import FeedForwardSpec, ModelSpec
    >>> spec = ModelSpec(d_model=64, n_layers=4, feed_forward=FeedForwardSpec(d_ff=256, activation="relu", gated=False))
    >>> [round(float(q), 3) for q in predict(spec, n_tokens=8).second_moment.sel(site="resid_post")]
    [1.0, 1.5, 2.0, 2.5, 3.0]
    >>> predict(spec, n_tokens=8, over={"density": [1.0, 0.5]}).second_moment.sel(site="resid_post", layer=4).round(3)
    ... # doctest: +ELLIPSIS
    <xarray.DataArray 'second_moment' (density: 2)>...
    array([3. , 1.5])
    ...
    """
    require(isinstance(spec, ModelSpec), AssumptionError, "spec", type(spec).__name__, "no model", "a ModelSpec")
    check_integer("seed", seed, 0)
    require(method in METHODS, AssumptionError, "method", method, "unknown", " or ".join(METHODS))
    require(over is None or isinstance(over, Mapping), AssumptionError, "over", over, "no mapping", "field: values")
    axes = dict(over or {})
    points = []
    for fields in combinations(axes):
        arguments: dict[str, Any] = {"n_tokens": n_tokens, "token_correlation": token_correlation}
        arguments |= {name: fields.pop(name) for name in RUN_ARGUMENTS if name in fields}
        check_integer("n_tokens", arguments["n_tokens"], 1)
        arguments["token_correlation"] = checked_correlation(arguments["token_correlation"], arguments["n_tokens"])
        points.append(_Point(spec.with_fields(fields) if fields else spec, **arguments))
    ids = None if documents is None else _checked_documents(documents, points)
    exchangeable = [p for p in points if method == "auto" and ids is None and _is_exchangeable(p)]
    chosen = set(map(id, exchangeable))
    others = [p for p in points if id(p) not in chosen]
    _exchangeable(exchangeable)
    for index, point in enumerate(others):
        if backward:
            _keep_grams(point)
        _position_resolved(point, None if method == "auto" else seed, seed, ids, (index, len(others)), progress)
        if backward:
            point.write_backward(ids)
            point.grams = None  # as large as all the rest together
    _warn(points)
    for point in exchangeable if backward else ():
        point.write_backward(ids)
    return _dataset(spec, axes, points, seed)


def _is_exchangeable(point: _Point) -> bool:
    if np.ndim(point.token_correlation):
        return False
    part = point.spec.attention
    return is_tabulated(point.spec) or (point.n_tokens == 1 and part is not None and not part.sink_logit)


def _exchangeable(points: Sequence[_Point]) -> None:
    """Points of one structure and number of tokens advance together."""
    groups: dict[tuple[object, ...], list[_Point]] = {}
    for point in points:
        groups.setdefault((point.n_tokens, structure(point.spec)), []).append(point)
    for group in groups.values():
        correlations = np.array([point.token_correlation for point in group], dtype=float)
        specs = [point.spec for point in group]
        second_moment, covariance = exchangeable_profile(specs, group[0].n_tokens, correlations)
        present = second_moment > 0
        correlation = np.divide(covariance, second_moment, out=np.zeros_like(covariance), where=present)
        for index, point in enumerate(group):
            point.write(second_moment[index], correlation[index])


def _keep_grams(point: _Point) -> None:
    numbers = 2 * point.spec.n_layers * point.n_tokens**2
    largest = int((MAX_GRADIENT_NUMBERS / (2 * point.spec.n_layers)) ** 0.5)
    domain = f"at most {largest} with backward=True and {point.spec.n_layers} layers"
    good, wrong = numbers <= MAX_GRADIENT_NUMBERS, "too many for position-resolved gradients"
    require(good, AssumptionError, "n_tokens", point.n_tokens, wrong, domain)
    point.grams = []


def _position_resolved(
    point: _Point,
    seed: int | None,
    fallback_seed: int,
    documents: np.ndarray | None,
    place: tuple[int, int],
    progress: Callable[[int, int], None] | None,
) -> None:
    spec, n_tokens = point.spec, point.n_tokens
    domain = f"at most {MAX_GRAM_TOKENS} (full attention without positions and with one correlation has no limit)"
    wrong = "too many for a position-resolved recursion"
    require(n_tokens <= MAX_GRAM_TOKENS, AssumptionError, "n_tokens", n_tokens, wrong, domain)
    if seed is None and not has_closure(spec, largest_input(spec)):
        seed = fallback_seed
    matrix = np.asarray(point.token_correlation, dtype=float)
    if matrix.ndim == 0:
        matrix = (1 - matrix) * np.eye(n_tokens) + matrix
    recursion = GramRecursion(spec, embedding_second_moment(spec) * matrix, seed, documents)
    moments = np.empty((spec.n_layers, 5, recursion.n_recursions))
    correlations = np.empty_like(moments)
    for layer, sites in enumerate(recursion):
        for site, gram in enumerate(sites):
            tokens = Moments(gram, n_tokens)
            moments[layer, site], correlations[layer, site] = tokens.second_moment, tokens.token_correlation
        if point.grams is not None:
            point.grams.append(tuple(sites[site].mean(axis=0).astype(np.float32) for site in (0, 2)))
        if progress is not None:
            progress(place[0] * spec.n_layers + layer + 1, place[1] * spec.n_layers)
    weight = moments.sum(axis=-1)
    weighted = (moments * correlations).sum(axis=-1)
    correlation = np.divide(weighted, weight, out=np.zeros_like(weight), where=weight > 0)
    count = recursion.n_recursions

    def stderr(values: np.ndarray) -> np.ndarray | float:
        return values.std(axis=-1, ddof=1) / count**0.5 if count > 1 else 0.0

    stderrs = stderr(moments), stderr(correlations)
    point.write(moments.mean(axis=-1), correlation, *stderrs, recursion.attention_error)


def _warn(points: Sequence[_Point]) -> None:
    for spec, n_tokens in ((p.spec, p.n_tokens) for p in points):
        full = spec.attention is not None and spec.attention.pattern == "full"
        if full and n_tokens > spec.d_model and spec.n_layers > 1:
            message = (
                f"n_tokens={n_tokens} in full attention is more than d_model={spec.d_model}, where attention after the "
                "first layer is larger than predicted and claimed; expected n_tokens <= d_model"
            )
            warnings.warn(message, AccuracyWarning, stacklevel=3)
            break
    worst = max(points, key=lambda p: float(p.numbers["theory_error"][-1, 4]))
    error = float(worst.numbers["theory_error"][-1, 4])
    if error > WARN_ABOVE:
        message = (
            f"theory_error={error:.2g} is claimed at the last layer; expected below {WARN_ABOVE:g}, as with fewer "
            "layers, a wider stream, heads or feed-forward, or masks that keep more"
        )
        warnings.warn(message, AccuracyWarning, stacklevel=3)


def _dataset(spec: ModelSpec, axes: Mapping[str, Sequence[Any]], points: Sequence[_Point], seed: int) -> xr.Dataset:
    labels = dimensions(axes)
    dims, shape = (*labels, "layer", "site"), tuple(len(values) for values in labels.values())

    def stacked(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack(arrays).reshape(*shape, *arrays[0].shape)

    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
        name: (dims, stacked([p.numbers[name] for p in points])) for name in NUMBERS
    }
    variables["exactness"] = (dims, stacked([p.exactness for p in points]))
    for name in points[0].backward:
        last = ("definition",) if name.startswith("jacobian") else ()
        variables[name] = ((*labels, "layer", *last), stacked([p.backward[name] for p in points]))
    if axes:
        variables[results.POINT] = (
            tuple(labels),
            results.point_variable([p.attributes for p in points]).reshape(shape),
        )
    same = "token_correlation" not in axes
    dataset = results.new(
        variables,
        source="theory",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=points[0].n_tokens,
        coords={**labels, "definition": list(DEFINITIONS)} if points[0].backward else labels,
        seed_entropy=str(seed),
        attributes={
            "token_correlation": points[0].attributes["token_correlation"] if same else "",
            **({"axes": axes_json(axes)} if axes else {}),
        },
    )
    if "n_tokens" in axes:
        dataset.attrs["n_tokens"] = ""
    return dataset


def check_integer(name: str, value: object, least: int) -> None:
    """`AssumptionError` unless `value` is an integer in least..MAX_INTEGER."""
    good = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and least <= value <= MAX_INTEGER
    above = isinstance(value, int) and value > MAX_INTEGER
    domain = f"an integer up to {MAX_INTEGER}" if above else f"an integer >= {least}"
    require(bool(good), AssumptionError, name, value, "outside the domain", domain)


def checked_correlation(value: object, n_tokens: int) -> float | np.ndarray:
    matrix = np.asarray(value)
    matrix = matrix.astype(float) if matrix.dtype.kind in "iuf" else np.asarray(np.nan)
    domain = "a number in [0, 1] or an (n_tokens, n_tokens) correlation matrix"

    def check(good: object, shown: object) -> None:
        require(bool(good), AssumptionError, "token_correlation", shown, "outside the domain", domain)

    if matrix.ndim == 0:
        check(0 <= matrix <= 1, value)
        return float(matrix)
    check(matrix.shape == (n_tokens, n_tokens), f"array of shape {matrix.shape}")
    good = np.isfinite(matrix).all() and np.allclose(matrix, matrix.T) and np.allclose(np.diagonal(matrix), 1)
    check(good, "array that is not symmetric with a unit diagonal")
    rounding = 1e-8 * n_tokens
    check(np.linalg.eigvalsh(matrix)[0] > -rounding, "array that is not positive semidefinite")
    return matrix


def _checked_documents(documents: Sequence[int] | np.ndarray, points: Sequence[_Point]) -> np.ndarray:
    ids = np.asarray(documents)
    for point in points:
        good = ids.shape == (point.n_tokens,) and ids.dtype.kind in "iu"
        domain = f"({point.n_tokens},) integers"
        require(good, AssumptionError, "documents", f"array {ids.dtype} {ids.shape}", "of another shape", domain)
    return ids
