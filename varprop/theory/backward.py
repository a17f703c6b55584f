"""Gradients through depth at initialisation: second moment and token correlation of dL/dx_l, and products of Jacobians.

The gradient's mean square over tokens and entries g and its mean product over two different tokens k go through a
residual sum as

    g' = own * g + own_pair * k,    k' = pair_own * g + pair * k

with the powers of `branch_jacobian.py`. Exchangeable gradients: g and k do not depend on the token. Weights used in the
forward pass are taken as independent of the gradient that arrives (exact for the last matrix of a branch, leading order
in 1/d for the rest).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.special

from varprop.errors import AssumptionError, require
from varprop.spec import ModelSpec
from varprop.theory.branch_jacobian import BranchPowers, branch_powers
from varprop.theory.jacobian import DEFINITIONS, block_jacobian, branch_names, checked_moments, residual_powers
from varprop.theory.namespace import checked


@dataclass(frozen=True)
class GradientProfile:
    """Second moment relative to the last layer's, and token correlation, of dL/dx_l for l = 0..n_layers."""

    second_moment: np.ndarray
    token_correlation: np.ndarray


def gradient_second_moment(
    spec: ModelSpec,
    *,
    n_tokens: int,
    second_moment: Any,
    token_correlation: Any,
    middle_second_moment: Any,
    middle_token_correlation: Any,
    gradient_token_correlation: float = 0.0,
) -> GradientProfile:
    """Second moment of the gradient of every layer's stream, relative to that of the last, from a forward profile.

    Per residual sum of feed-forwards g' = g (k^2 + v_J nu), k the skip scale: the product of 1 + v_J / q. Attention
    moves gradients between tokens. second_moment, token_correlation: of the stream before each layer, (n_layers,);
    middle_...: before each feed-forward, (n_layers,) (not read by a parallel block). gradient_token_correlation: of the
    gradient that arrives at the last layer; 0 gives E||dx_L / dx_l||_F^2 / d of one output token against all inputs.
    Leading order in 1/d: real gradients of relu stacks exceed q_L / q_0 by 2 % to 4 % (se 1 % to 2 %) at d = 64, 16 and
    64 layers, and d = 256, 16 layers. Causal and windowed attention are averaged over positions here, which misses
    that gradients gather on the first ones: 4 % too low after 4 layers and 15 % to 40 % after 16 at 8 to 32 tokens.
    `gradient_by_position` resolves them, and `predict` takes it. Raises `AssumptionError` as `block_jacobian` does.
    Source: derived in proofs/prove_backward.py. Checked by: tests/theory/test_backward.py, autograd.

    >>> from varprop.spec import FeedForwardSpec
    >>> part = FeedForwardSpec(d_ff=64, activation="relu", gated=False)
    >>> spec = ModelSpec(d_model=10**6, n_layers=3, feed_forward=part)
    >>> q, c = [1.0, 1.5, 2.0], [0.0, 0.0, 0.0]
    >>> moments = {"second_moment": q, "token_correlation": c, "middle_second_moment": q, "middle_token_correlation": c}
    >>> gradient_second_moment(spec, n_tokens=4, **moments).second_moment.round(3)  # 2.5 / q
    array([2.5  , 1.667, 1.25 , 1.   ])
    """
    moments = checked_moments(
        spec,
        1,
        n_tokens,
        second_moment=second_moment,
        token_correlation=token_correlation,
        middle_second_moment=middle_second_moment,
        middle_token_correlation=middle_token_correlation,
    )
    for array in moments:
        shape, expected = array.shape, f"one number for each of the {spec.n_layers} layers"
        require(shape == (spec.n_layers,), AssumptionError, "shape of moments", shape, "wrong", expected)
    start = checked("gradient_token_correlation", gradient_token_correlation, "a number in [-1, 1]", -1.0, 1.0)
    state = np.array([1.0, float(start)])
    states = [state]
    for transfer in reversed(gradient_transfers(spec, n_tokens, *moments)):
        state = transfer @ state
        states.append(state)
    profile = np.array(states[::-1])
    return GradientProfile(profile[:, 0], profile[:, 1] / profile[:, 0])


def jacobian_profile(spec: ModelSpec, *, n_tokens: int, **moments: Any) -> np.ndarray:
    """`block_jacobian` of every layer, (n_layers, 3) in the order of `DEFINITIONS`.

    moments: those of `block_jacobian`, one number a layer. Raises `AssumptionError` as `block_jacobian` does.
    """
    total = np.empty((spec.n_layers, len(DEFINITIONS)))
    for members in _equal_layers(spec):
        chosen = {name: np.asarray(values)[members] for name, values in moments.items()}
        found = block_jacobian(spec, members[0] + 1, n_tokens=n_tokens, **chosen)
        total[members] = np.stack([found[name] for name in DEFINITIONS], axis=-1)
    return total


def gradient_transfers(
    spec: ModelSpec, n_tokens: int, q: np.ndarray, c: np.ndarray, middle_q: np.ndarray, middle_c: np.ndarray
) -> np.ndarray:
    """(n_layers, 2, 2): what each block does to (second moment, token covariance) of the gradient."""
    total = np.empty((spec.n_layers, 2, 2))
    names = branch_names(spec)
    moments = {"attention": (q, c), "mlp": (middle_q, middle_c)}
    for members in _equal_layers(spec):
        layer = members[0] + 1
        if spec.block == "parallel" and len(names) == 2:
            both = [transfer(branch_powers(spec, layer, n_tokens, name, q[members], c[members])) for name in names]
            total[members] = spec.skip_scale**2 * np.eye(2) + both[0] + both[1]
            continue
        total[members] = np.eye(2)
        for name in names:  # the last residual sum acts on the gradient first
            at = (x[members] for x in moments[name])
            rest, trace = residual_powers(spec, layer, n_tokens, name, *at)
            identity = np.multiply.outer(np.square(trace), np.eye(2))
            total[members] = total[members] @ (identity + transfer(rest))
    return total


def transfer(powers: BranchPowers) -> np.ndarray:
    """(..., 2, 2) matrix of own, own_pair, pair_own, pair."""
    entries = np.broadcast_arrays(powers.values["all_sources"], powers.own_pair, powers.pair_own, powers.pair)
    return np.stack(entries, axis=-1).reshape(*entries[0].shape, 2, 2)


def _equal_layers(spec: ModelSpec) -> list[list[int]]:
    """Indices of the layers that have the same rules, so that each group is one array computation."""
    groups: dict[Any, list[int]] = {}
    for index in range(spec.n_layers):
        layer = index + 1
        placement = spec.norm_placement(layer)
        window = spec.window(layer) if spec.attention is not None else None
        key = (placement, window, spec.is_moe(layer), layer if placement == "lns" else 0)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def jacobian_product(second_moment: Any, increment: Any, jacobian_power: Any, n_layers: Any, xp: Any = np) -> Any:
    """prod_{l < L} (1 + v_J / (q_0 + v l)) = B(a, r) / B(a + L, r), B the beta function, a = q_0 / v, r = v_J / v.

    E||dx_L / dx_0||_F^2 / d of L equal feed-forward blocks at infinite width: q_L / q_0 for v_J = v (relu, identity),
    else bounded by `gradient_growth`. second_moment: q_0 > 0; increment: v > 0 that a block adds to q; jacobian_power:
    v_J > 0; n_layers: L >= 0. Exact. Raises `AssumptionError` outside these domains.
    Source: derived in proofs/prove_backward.py.

    >>> round(float(jacobian_product(1.0, 0.5, 0.5, 10)), 9), round(float(jacobian_product(1.0, 0.5, 1.0, 10)), 9)
    (6.0, 26.0)
    """
    for name, value in (("second_moment", second_moment), ("increment", increment), ("jacobian_power", jacobian_power)):
        checked(name, value, "numbers > 0", 1e-300)
    checked("n_layers", n_layers, "numbers >= 0", 0.0)
    start, exponent = second_moment / increment, jacobian_power / increment
    if xp is np:
        return np.exp(scipy.special.betaln(start, exponent) - scipy.special.betaln(start + n_layers, exponent))
    return xp.beta(start, exponent) / xp.beta(start + n_layers, exponent)


def gradient_growth(ratio: Any, increment: Any, jacobian_power: Any) -> Any:
    """(q_L / q_0)^{v_J / v}: growth of the gradient from layer L to 0 where each block adds little.

    ratio: q_L / q_0; increment: v > 0; jacobian_power: v_J. Exact for v_J = v at any depth; else the limit of small
    v / q, an upper bound for v_J >= v and a lower bound for v_J <= v (Bernoulli's inequality, 1 + r x against
    (1 + x)^r). Source: derived in proofs/prove_backward.py.

    >>> gradient_growth(4.0, 0.5, 0.25), gradient_growth(4.0, 0.5, 0.5)
    (2.0, 4.0)
    """
    return ratio ** (jacobian_power / increment)


def weight_gradient_second_moment(
    input_second_moment: Any,
    gradient_second_moment: Any,
    n_tokens: Any = 1,
    input_correlation: Any = 0,
    gradient_correlation: Any = 0,
) -> Any:
    """Second moment of an entry of dL/dW = sum_t delta_t h_t': T g q (1 + (T - 1) c_g c_h).

    input_second_moment, input_correlation: q, c_h of the matrix's input h over tokens; gradient_second_moment,
    gradient_correlation: g, c_g of the gradient delta at its output; n_tokens: T. Exact for delta independent of h.
    Source: derived in proofs/prove_backward.py.

    >>> weight_gradient_second_moment(2.0, 0.5, 3), weight_gradient_second_moment(1.0, 1.0, 4, 1.0, 1.0)
    (3.0, 16.0)
    """
    pairs = 1 + (n_tokens - 1) * input_correlation * gradient_correlation
    return n_tokens * gradient_second_moment * input_second_moment * pairs
