"""The block Jacobian J at initialisation, in three definitions of E||J - I||_F^2 / d.

all_sources: one output token against every input token. own_token: one token's output against its own input.
token_mean: J summed over source tokens and averaged over target tokens, then the norm (the metric of arXiv 2603.15389,
whose figures show sqrt(value / d)).

A branch's last matrix is zero-mean and independent of the rest, so that the cross terms between identity, attention
and feed-forward vanish and the powers of a product multiply; the branches are in `branch_jacobian.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.attention import attention_gains
from varprop.theory.branch_jacobian import BranchPowers, Jacobian, branch_powers, logit_std, norm_powers, token_mean
from varprop.theory.namespace import checked

DEFINITIONS = ("all_sources", "own_token", "token_mean")


def identity_deviation(excess: Any, trace: Any) -> Any:
    """E||J - I||^2 / d = (trace - 1)^2 + excess, excess = E||J||^2 / d - trace^2, trace = E tr J / d; exact.

    Source: derived in proofs/prove_backward.py.

    >>> identity_deviation(0.5, 2.0)
    1.5
    """
    return (trace - 1) ** 2 + excess


def product_excess(first: Any, first_trace: Any, second: Any, second_trace: Any) -> Any:
    """Excess of J_2 J_1 where powers and traces multiply: e_1 e_2 + e_1 t_2^2 + e_2 t_1^2.

    Without cancellation for a small excess. Leading order in 1/d. Source: derived in proofs/prove_backward.py.

    >>> product_excess(0.5, 1.0, 0.25, 1.0)
    0.875
    """
    return first * second + first * second_trace**2 + second * first_trace**2


def attention_jacobian(
    spec: ModelSpec, layer: int, *, n_tokens: int, second_moment: Any, token_correlation: Any
) -> Jacobian:
    """E||d a / dx||_F^2 / d of what the attention of a layer adds to the stream, in the three definitions.

    sigma_OV^2 nu times: all_sources `softmax_sources`; own_token the share of the own key in the value and key path
    and the query path; token_mean the whole value path, 1, and the query path averaged over pairs of queries.
    nu = `norm_jacobian`. second_moment, token_correlation: of the stream, numbers or arrays of one shape; n_tokens: T.
    Leading order in 1/d and 1/head_dim (relative error s^2 / head_dim of the query path). Causal and windowed attention
    average over the numbers of visible keys at one token correlation. Returns floats, or arrays for arrays.
    Raises `AssumptionError` for a soft cap, sink logit or key mask, and for arguments outside their domain.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import AttentionSpec
    >>> spec = ModelSpec(d_model=64, n_layers=1, attention=AttentionSpec(n_heads=1))
    >>> attention_jacobian(spec, 1, n_tokens=1, second_moment=2.0, token_correlation=1.0)["all_sources"]  # one key
    0.4921...
    """
    _present(spec, "attention")
    arrays = checked_moments(spec, layer, n_tokens, second_moment=second_moment, token_correlation=token_correlation)
    return _output(branch_powers(spec, layer, n_tokens, "attention", *arrays).values)


def feed_forward_jacobian(
    spec: ModelSpec, layer: int, *, n_tokens: int, second_moment: Any, token_correlation: Any
) -> Jacobian:
    """E||d f / dx||_F^2 / d of what the feed-forward or mixture of a layer adds, in the three definitions.

    One token (all_sources = own_token): nu `plain_jacobian` or `gated_jacobian`, exact given the realised second moment
    for Gaussian weights. token_mean: (1/T) of it and (1 - 1/T) of the same with the kernels at the token correlation.
    Mixture: S_2 times the expert's plus router_gain |f_E|^2 times `gate_jacobian`. Arguments, results and errors as in
    `attention_jacobian`; raises `AssumptionError` for expert-choice routing.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import FeedForwardSpec
    >>> spec = ModelSpec(d_model=64, n_layers=1, feed_forward=FeedForwardSpec(d_ff=64, activation="relu", gated=False))
    >>> j = feed_forward_jacobian(spec, 1, n_tokens=1000, second_moment=2.0, token_correlation=0.0)
    >>> round(j["own_token"], 3), round(j["token_mean"], 3)
    (0.246, 0.121)
    """
    _present(spec, "mlp")
    arrays = checked_moments(spec, layer, n_tokens, second_moment=second_moment, token_correlation=token_correlation)
    return _output(branch_powers(spec, layer, n_tokens, "mlp", *arrays).values)


def block_jacobian(
    spec: ModelSpec,
    layer: int,
    *,
    n_tokens: int,
    second_moment: Any,
    token_correlation: Any,
    middle_second_moment: Any,
    middle_token_correlation: Any,
) -> Jacobian:
    """E||J - I||_F^2 / d of the whole block of a layer (attention, then feed-forward), in the three definitions.

    Pre-norm: (1 + a)(1 + f) - 1 with the powers a, f of `attention_jacobian` and `feed_forward_jacobian`; with skip
    scale k: (k^2 + a)(k^2 + f) - 2 k^2 + 1. A norm after the sum (post) multiplies power and trace of its half; a
    parallel block adds a + f. second_moment, token_correlation: of the stream before the attention; middle_...: before
    the feed-forward (not read by a parallel block). Numbers, or arrays of one shape (say, over layers with the same
    tensors). Leading order in 1/d. Raises `AssumptionError` as the parts do.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import FeedForwardSpec
    >>> spec = ModelSpec(d_model=512, n_layers=1, feed_forward=FeedForwardSpec(d_ff=64, activation="relu", gated=False))
    >>> moments = {"second_moment": 4.0, "token_correlation": 0.0}
    >>> moments |= {f"middle_{name}": value for name, value in moments.items()}
    >>> round(block_jacobian(spec, 1, n_tokens=8, **moments)["own_token"], 3)  # v_J / q = 0.5 / 4
    0.125
    """
    q, c, middle_q, middle_c = checked_moments(
        spec,
        layer,
        n_tokens,
        second_moment=second_moment,
        token_correlation=token_correlation,
        middle_second_moment=middle_second_moment,
        middle_token_correlation=middle_token_correlation,
    )
    names = branch_names(spec)
    if spec.block == "parallel" and len(names) == 2:
        first, second = (branch_powers(spec, layer, n_tokens, name, q, c).values for name in names)
        skip = (spec.skip_scale - 1) ** 2
        return _output({name: skip + first[name] + second[name] for name in DEFINITIONS})
    moments = {"attention": (q, c), "mlp": (middle_q, middle_c)}
    excess, total_trace = dict.fromkeys(DEFINITIONS, 0.0), 1.0
    for name in names:
        half, trace = residual_powers(spec, layer, n_tokens, name, *moments[name])
        excess = {key: product_excess(excess[key], total_trace, half.values[key], trace) for key in DEFINITIONS}
        total_trace = total_trace * trace
    return _output({key: identity_deviation(value, total_trace) for key, value in excess.items()})


GATE_ERROR = 0.04


def jacobian_error(spec: ModelSpec, layer: int) -> float:
    """Claimed relative error of `block_jacobian` at the width of the spec; positions of causal attention apart.

    Feed-forward 3 / d. Attention (3 + 4 s^2) / d + s^2 / head_dim, s^2 the variance of the logits: sharing |u|^2 = d
    between the attended direction and the rest takes 3 s^2 to 4 s^2 in d, tilted keys add s^2 in head_dim. A norm after
    the branch or the sum: 4 / d each for the fluctuation of what it divides by. A mixture: GATE_ERROR, for gate slopes
    interpolated between token correlations 0 and 1 (`token_mean` of the branch 1.4 % and 3.6 % high at c = 0.5 and
    0.9, E = 8, k = 2 with normalised gates). Gradients' pair terms of the softmax (`own_pair`, `pair`) are 10 % to 25 %
    off at s >= 2.
    Checked by: tests/theory/test_backward.py.

    >>> from varprop.spec import FeedForwardSpec
    >>> spec = ModelSpec(d_model=300, n_layers=1, feed_forward=FeedForwardSpec(d_ff=64))
    >>> jacobian_error(spec, 1)
    0.01
    """
    norms = 4 if spec.norm_placement(layer) in ("post", "peri", "reordered") else 0
    error = 0.0
    for name in branch_names(spec):
        error += (3 + norms) / spec.d_model
        if name == "attention":
            gains = attention_gains(spec, layer)
            variance = float(logit_std(spec, gains.query * gains.key, 1.0)) ** 2
            error += 4 * variance / spec.d_model + variance / spec.head_dim
        elif spec.is_moe(layer):
            error += GATE_ERROR
    return error


def branch_names(spec: ModelSpec) -> tuple[str, ...]:
    """The branches of a block in order: `attention`, `mlp`."""
    has = (spec.attention is not None, spec.feed_forward is not None or spec.moe is not None)
    return tuple(name for name, present in zip(("attention", "mlp"), has, strict=True) if present)


def _present(spec: ModelSpec, name: str) -> None:
    field = "attention" if name == "attention" else "feed_forward"
    require(name in branch_names(spec), AssumptionError, field, None, "absent", "a spec with this branch")


def checked_moments(spec: ModelSpec, layer: int, n_tokens: int, **moments: Any) -> list[np.ndarray]:
    """The moments as arrays of one shape; correlations below 0 (rounding; exchangeable tokens have none) count as 0."""
    for name, value, largest in (("layer", layer, spec.n_layers), ("n_tokens", n_tokens, None)):
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        good = integer and value >= 1 and (largest is None or value <= largest)
        domain = "an integer >= 1" if largest is None else f"an integer in 1..{largest}"
        require(bool(good), AssumptionError, name, value, "outside the domain", domain)
    arrays = []
    for name, value in moments.items():
        if name.endswith("correlation"):
            value = checked(name, value, "numbers in [-1, 1]", -1 - 1e-9, 1 + 1e-9)
            arrays.append(np.clip(np.asarray(value, dtype=float), 0.0, 1.0))
        else:
            arrays.append(np.asarray(checked(name, value, "finite numbers > 0", 1e-300), dtype=float))
    try:
        return list(np.broadcast_arrays(*arrays))
    except ValueError:
        shapes = ", ".join(str(a.shape) for a in arrays)
        raise AssumptionError(f"moments={shapes!r} are shapes that differ; expected one shape") from None


def _output(values: Jacobian) -> Jacobian:
    return {name: float(value) if np.ndim(value) == 0 else np.asarray(value) for name, value in values.items()}


def residual_powers(
    spec: ModelSpec, layer: int, n_tokens: int, name: str, second_moment: Any, correlation: Any
) -> tuple[BranchPowers, Any]:
    """One residual sum as trace * identity + rest: powers of the rest, and the trace.

    The rest is the branch; with a norm after the sum (post) also what that norm takes from the identity.
    """
    branch = branch_powers(spec, layer, n_tokens, name, second_moment, correlation)
    skip = spec.skip_scale
    if spec.norm_placement(layer) != "post":
        return branch, skip
    own, pair = norm_powers(spec, skip**2 * second_moment + branch.forward, correlation)
    kept = 1 - (2 if spec.norm.kind == "layer" else 1) / spec.d_model  # the norm is a projection times a number
    square = own * kept
    removed = {"all_sources": own, "own_token": own, "token_mean": token_mean(own, pair, n_tokens)}
    rest = branch.times(own, pair, n_tokens)
    values = {key: value + skip**2 * (removed[key] - square) for key, value in rest.values.items()}
    return replace(rest, values=values, pair=rest.pair + skip**2 * (pair - square)), skip * np.sqrt(square)
