"""Proofs of varprop/theory/backward.py and of the Jacobians in *jacobian.py beside it.

Weights that multiply a derivative are symbols independent of those in the pre-activation: the norm removes the
direction of the token, and orthogonal projections of a Gaussian row are independent.
"""

from __future__ import annotations

import itertools
from typing import Any

import mpmath
import numpy as np
import sympy

from proofs.check import CASES, PROVED, Proof, close, equal, expect, normal_average, normal_moments, plane_integral
from varprop import presets
from varprop.theory.backward import gradient_growth, jacobian_product, weight_gradient_second_moment
from varprop.theory.branch_jacobian import gated_jacobian, gated_sum_jacobian, norm_jacobian, plain_jacobian
from varprop.theory.gate_jacobian import gate_jacobian
from varprop.theory.jacobian import identity_deviation, product_excess
from varprop.theory.softmax_jacobian import centred_overlap, mean_rotation, power_moments, softmax_sources

D = 2
eps = sympy.symbols("epsilon", positive=True)
r, theta = sympy.symbols("r theta", positive=True)


def _norm_derivative(point: Any, centred: bool) -> Any:
    """Matrix du/dx of the norm, differentiated and put at a point."""
    x = sympy.symbols(f"x:{len(point)}", real=True)
    y = [v - sum(x) / len(x) for v in x] if centred else list(x)
    u = [v / sympy.sqrt(sum(w**2 for w in y) / len(x) + eps) for v in y]
    return sympy.Matrix(u).jacobian(sympy.Matrix(x)).subs(dict(zip(x, point, strict=True)))


def _check_norm(rule, basis, centred):
    first, second = (sympy.Matrix(e) / sympy.sqrt(sum(v**2 for v in e)) for e in basis)
    size = len(basis[0])
    other = r * (sympy.cos(theta) * first + sympy.sin(theta) * second)
    a, b = _norm_derivative(list(r * first), centred), _norm_derivative(list(other), centred)
    q = r**2 / size
    equal(rule(q, sympy.cos(theta), eps, size, int(centred)), (a * b.T).trace() / size)
    equal(rule(q, 1, eps, size, int(centred)), (a * a.T).trace() / size)
    equal(rule(q, 1, 0, size, int(centred)), (1 - sympy.Rational(1 + centred, size)) / q)


def prove_norm_jacobian(rule=norm_jacobian):
    _check_norm(rule, ((1, 0, 0), (0, 1, 0)), centred=False)
    _check_norm(rule, ((1, -1, 0), (1, 1, -2)), centred=True)


def prove_identity_deviation(rule=identity_deviation):
    j: Any = sympy.Matrix(D, D, sympy.symbols(f"j:{D * D}", real=True))
    gap, trace = j - sympy.eye(D), j.trace() / D
    equal(rule((j.T * j).trace() / D - trace**2, trace), (gap.T * gap).trace() / D)


def prove_product_excess(rule=product_excess):
    """Powers and traces multiply for J_i = t_i I + X_i with zero-mean independent X_i of i.i.d. entries, d = 2."""
    t, std = sympy.symbols("t:2", positive=True), sympy.symbols("sigma:2", positive=True)
    parts = [_matrix(f"x{i}_", D, D) for i in range(2)]
    moments = _normals(parts[0], std[0]) | _normals(parts[1], std[1])
    product = (t[1] * sympy.eye(D) + parts[1]) * (t[0] * sympy.eye(D) + parts[0])
    power = expect((product.T * product).trace() / D, moments)
    excess = [D * v**2 for v in std]
    equal(rule(excess[0], t[0], excess[1], t[1]), power - (t[0] * t[1]) ** 2)


def _matrix(name: str, rows: int, columns: int) -> Any:
    return sympy.Matrix(rows, columns, lambda i, j: sympy.Symbol(f"{name}{i}{j}"))


def _normals(matrix: Any, std: Any) -> dict[Any, Any]:
    return {entry: normal_moments(std**2) for entry in matrix}


def prove_plain_jacobian(rule=plain_jacobian):
    """Slopes a_i, b_i of hidden unit i at the two tokens; one output, since outputs are alike."""
    down_std, up_std, kernel = sympy.symbols("sigma_down sigma_up kappa", positive=True)
    down, up = _matrix("o", 1, D), _matrix("v", D, D)
    a, b = sympy.symbols(f"a:{D}"), sympy.symbols(f"b:{D}")
    product = (down * sympy.diag(*a) * up) * (down * sympy.diag(*b) * up).T
    mean = sympy.expand(expect(product[0], _normals(down, down_std) | _normals(up, up_std)))
    mean = mean.subs({a[i] * b[i]: kernel for i in range(D)})
    equal(rule(kernel, D * up_std**2, D * down_std**2), mean)


def prove_gated_jacobian(rule=gated_jacobian):
    """Values x_i, y_i and slopes a_i, b_i of gate i at the tokens u and w."""
    stds = sympy.symbols("sigma_down sigma_up sigma_gate", positive=True)
    down, up, gate = _matrix("o", 1, D), _matrix("v", D, D), _matrix("w", D, D)
    slopes, values = sympy.symbols("kappa_slope kappa_value", positive=True)
    tokens = [sympy.Matrix(sympy.symbols(f"{name}:{D}")) for name in "uw"]
    a, b, x, y = (sympy.symbols(f"{name}:{D}") for name in "abxy")

    def derivative(slope, value, token):
        return down * (sympy.diag(*slope) * sympy.diag(*(up * token)) * gate + sympy.diag(*value) * up)

    product = derivative(a, x, tokens[0]) * derivative(b, y, tokens[1]).T
    moments = {}
    for matrix, std in zip((down, up, gate), stds, strict=True):
        moments |= _normals(matrix, std)
    mean = sympy.expand(expect(product[0], moments))
    for i in range(D):  # cross terms slope * value are odd in the gate's weights: none is left
        mean = mean.subs({a[i] * b[i]: slopes, x[i] * y[i]: values})
    covariance = (tokens[0].T * tokens[1])[0] / D
    gains = [D * std**2 for std in stds]
    equal(rule(covariance, slopes, values, gains[2], gains[1], gains[0]), sympy.expand(mean))


def prove_gated_sum(rule=gated_sum_jacobian):
    """Two experts with outputs e_i and Jacobians m_i (one row), gates g_i, slopes s_ij, router rows w_j."""
    std, output_std, row_std = sympy.symbols("sigma_w sigma_e sigma_m", positive=True)
    experts, rows = [_matrix(f"m{i}_", 1, D) for i in range(2)], [_matrix(f"w{j}_", 1, D) for j in range(2)]
    e, g = sympy.symbols("e:2"), sympy.symbols("g:2")
    slope = _matrix("s", 2, 2)
    total = sympy.zeros(1, D)
    for i in range(2):
        total += g[i] * experts[i] + e[i] * (slope[i, 0] * rows[0] + slope[i, 1] * rows[1])
    moments = {v: normal_moments(output_std**2) for v in e}
    for i in range(2):
        moments |= _normals(experts[i], row_std) | _normals(rows[i], std)
    gates, square = sum(v**2 for v in g), sum(v**2 for v in slope)
    expected = expect((total * total.T)[0], moments)
    equal(rule(gates, D * row_std**2, square, D * std**2, output_std**2), expected)


P = (sympy.Rational(1, 2), sympy.Rational(1, 3), sympy.Rational(1, 6))


def _softmax_jacobian(p: Any) -> Any:
    return sympy.diag(*p) - sympy.Matrix(p) * sympy.Matrix(p).T


def prove_softmax_sources(rule=softmax_sources):
    """Given weights p: value p_s I, key p_s (u_s - mean) kappa', query sum_j p_j (u_j - mean)(u_j - mean)' A.

    u_j = sqrt(c) xi + sqrt(1 - c) z_j; |kappa|^2 = s^2; A has i.i.d. entries of variance s^2 / d^2. The exact average
    has a further s^2 (1 - c)^2 tr B^2 / d.
    """
    logits = sympy.symbols("l:3", real=True)
    weights = [sympy.exp(v) / sum(map(sympy.exp, logits)) for v in logits]
    derivative = sympy.Matrix(weights).jacobian(sympy.Matrix(logits))
    for i, j in itertools.product(range(3), repeat=2):
        equal(derivative[i, j], _softmax_jacobian(weights)[i, j])
    c, variance = sympy.symbols("c s2", positive=True)
    z = [sympy.Matrix(sympy.symbols(f"z{j}_:{D}")) for j in range(3)]
    moments: Any = {entry: normal_moments(1) for vector in z for entry in vector}
    centre: Any = sum((p * v for p, v in zip(P, z, strict=True)), sympy.zeros(D, 1))
    away = [v - centre for v in z]
    key = sum(p**2 * (v.T * v)[0] for p, v in zip(P, away, strict=True)) * variance / D
    spread: Any = sum((p * v * v.T for p, v in zip(P, away, strict=True)), sympy.zeros(D))
    query = (spread * spread).trace() * variance / D**2
    exact = sum(p**2 for p in P) + (1 - c) * expect(key, moments) + (1 - c) ** 2 * expect(query, moments)
    b: Any = _softmax_jacobian(P)
    square, trace = (b * b).trace(), b.trace()
    dropped = variance * (1 - c) ** 2 * square / D
    equal(rule(sum(p**2 for p in P), square, square, trace**2, variance, c, c, D) + dropped, exact)
    equal(square, sum(p**2 for p in P) - 2 * sum(p**3 for p in P) + sum(p**2 for p in P) ** 2)


def prove_centred_overlap(rule=centred_overlap):
    def centring(members, size=7):
        inside: Any = sympy.Matrix([1 if j in members else 0 for j in range(size)])
        return sympy.diag(*inside) - inside * inside.T / len(members)

    for first, other in (({0, 1, 2}, {2, 3}), ({0, 1, 2, 3}, {1, 2, 3}), ({0, 1}, {4, 5, 6}), ({0, 1}, {0, 1})):
        trace = (centring(first) * centring(other)).trace()
        equal(rule(len(first & other), sympy.Integer(len(first)), sympy.Integer(len(other))), trace)


def prove_power_moments(rule=power_moments):
    """Two keys: p = 1 / (1 + e^{-sqrt(2) s z}). Three keys: a double integral over the differences of logits."""

    for s in (0.3, 1.2, 4.0):

        def product(z, s=s):
            p = 1 / (1 + mpmath.exp(-mpmath.sqrt(2) * s * z))
            return p * (1 - p)

        y, square, spread = rule(np.array([2.0]), s)[:, 0]
        close(y, 1 - 2 * normal_average(product), 1e-9)
        close(square, 4 * normal_average(lambda z: product(z) ** 2), 1e-9)
        close(spread, 4 * normal_average(lambda z: product(z) ** 2), 1e-9)
    s = 1.2

    def three(function):
        def integrand(a, b):
            weight = np.exp(-(a**2 + b**2 - a * b) / 3) / (2 * np.pi * 3**0.5)
            x = np.stack(np.broadcast_arrays(np.exp(s * a), np.exp(s * b), 1.0 + 0 * a))
            p = x / x.sum(axis=0)
            return weight * function((p**2).sum(axis=0), (p**3).sum(axis=0))

        return plane_integral(integrand, [-16, -5, 0, 5, 16])

    y, square, spread = rule(np.array([3.0]), s)[:, 0]
    close(y, three(lambda a, b: a), 1e-8)
    close(square, three(lambda a, b: a - 2 * b + a**2), 1e-8)
    close(spread, three(lambda a, b: (1 - a) ** 2), 1e-8)


def prove_gate_two_experts(rule=gate_jacobian):
    std = 1.25

    def slope(z):
        p = 1 / (1 + mpmath.exp(-std * mpmath.sqrt(2) * z))
        return p * (1 - p)

    square = normal_average(lambda z: slope(z) ** 2)
    for options, count in (({"top_k": 1, "normalize": False}, 2), ({"top_k": 2, "normalize": True}, 4)):
        values = rule(2, logit_std=std, **options)
        close(values[0], count * square, 1e-8)
        close(values[1], count / 2 * normal_average(slope), 1e-7)

    def sigmoid(z):
        f = 1 / (1 + mpmath.exp(-std * z))
        return f * (1 - f)

    values = rule(2, 2, std, normalize=False, router="sigmoid")
    close(values[0], 2 * normal_average(lambda z: sigmoid(z) ** 2), 1e-8)
    close(values[1], 2 * normal_average(sigmoid), 1e-8)


def prove_gate_three_experts(rule=gate_jacobian):
    """The logits of two experts lie a and b below (one active) or above (two active) the third's."""
    std = 0.875

    def quadrant(function):
        def weighted(a, b):
            return function(a, b) * np.exp(-(a**2 + b**2 - a * b) / 3) / (2 * np.pi * 3**0.5)

        return 3 * plane_integral(weighted, [0, 3, 16])

    def square(active, scores):
        total = sum(scores)
        g = [score / total for score in scores]
        return sum(g[i] ** 2 * ((i == j) - g[j]) ** 2 for i in range(active) for j in range(3))

    def one(a, b):
        return square(1, [1.0, np.exp(-std * a), np.exp(-std * b)])

    def two(a, b, last=1.0):
        return square(2, [np.exp(std * a), np.exp(std * b), last])

    close(rule(3, 1, std, normalize=False)[0], quadrant(one), 1e-8)
    close(rule(3, 2, std, normalize=False)[0], quadrant(two), 1e-8)
    close(rule(3, 2, std, normalize=True)[0], quadrant(lambda a, b: two(a, b, 0.0)), 1e-8)


def prove_gate_normalised_sigmoid(rule=gate_jacobian):
    """Two active experts of two: dg_1 / dl_1 = f_1' f_2 / (f_1 + f_2)^2 and the like."""
    std = 0.875

    def square(a, b):
        f, h = 1 / (1 + np.exp(-std * a)), 1 / (1 + np.exp(-std * b))
        return 2 * (f * h) ** 2 * ((1 - f) ** 2 + (1 - h) ** 2) / (f + h) ** 4

    density = plane_integral(lambda a, b: square(a, b) * np.exp(-(a**2 + b**2) / 2) / (2 * np.pi), [-9, -3, 0, 3, 9])
    close(rule(2, 2, std, normalize=True, router="sigmoid")[0], density, 1e-8)


def prove_mean_rotation(rule=mean_rotation):
    spec = presets.tiny().with_fields(rope_theta=100.0, rope_fraction=0.5)
    size, n = spec.head_dim, 7
    angles = [mpmath.mpf(100) ** (-mpmath.mpf(i) / (size // 4)) for i in range(size // 4)]
    total = mpmath.mpf(0)
    for j, k in itertools.permutations(range(n), 2):
        total += mpmath.mpf(1) / 2 + sum(mpmath.cos((j - k) * a) for a in angles) * 2 / size
    close(rule(spec, 1, n), total / (n * (n - 1)))


def prove_jacobian_product(rule=jacobian_product):
    q, v, w = sympy.symbols("q v v_J", positive=True)
    n = sympy.symbols("L", positive=True, integer=True)
    for depth in (0, 1, 4):
        product = sympy.prod([1 + w / (q + v * k) for k in range(depth)])
        equal(sympy.gammasimp(rule(q, v, w, depth, sympy).rewrite(sympy.gamma)), product)
    ratio = rule(q, v, w, n + 1, sympy) / rule(q, v, w, n, sympy)  # induction in L
    equal(sympy.gammasimp(ratio.rewrite(sympy.gamma)), 1 + w / (q + v * n))
    equal(sympy.gammasimp(rule(q, v, v, n, sympy).rewrite(sympy.gamma)), (q + v * n) / q)  # telescoping
    close(jacobian_product(1.3, 0.4, 0.7, 9), mpmath.mpf(1) * np.prod([1 + 0.7 / (1.3 + 0.4 * k) for k in range(9)]))


def prove_gradient_growth(rule=gradient_growth):
    """Bernoulli: (1 + x)^r - 1 - r x vanishes at 0; its slope r ((1 + x)^{r-1} - 1) has the sign of r - 1 for x > 0."""
    x, v, w = sympy.symbols("x v v_J", positive=True)
    gap = rule(1 + x, v, w) - (1 + w / v * x)
    equal(gap.subs(x, 0), 0)
    equal(sympy.diff(gap, x), w / v * ((1 + x) ** (w / v - 1) - 1))
    equal(rule(1 + x, v, v), 1 + x)


def prove_weight_gradient(rule=weight_gradient_second_moment):
    """delta_t = sqrt(c_g) a + sqrt(1 - c_g) a_t, h_t likewise: three tokens."""
    c_h, c_g, q, g = sympy.symbols("c_h c_g q g", positive=True)
    shared, own = sympy.symbols("a b"), [sympy.symbols(f"a{t} b{t}") for t in range(3)]
    total = 0
    for pair in own:
        delta = sympy.sqrt(g) * (sympy.sqrt(c_g) * shared[0] + sympy.sqrt(1 - c_g) * pair[0])
        total += delta * sympy.sqrt(q) * (sympy.sqrt(c_h) * shared[1] + sympy.sqrt(1 - c_h) * pair[1])
    moments = {symbol: normal_moments(1) for symbol in (*shared, *itertools.chain(*own))}
    equal(rule(q, g, 3, c_h, c_g), expect(total**2, moments))


PROOFS = [
    Proof("norm Jacobian of one token and of two, rms and layer", "equal second moments", prove_norm_jacobian, CASES),
    Proof("||J - I||^2 from power and trace", "none", prove_identity_deviation, CASES),
    Proof("power of a product", "independent zero-mean parts, i.i.d. entries", prove_product_excess, CASES),
    Proof("plain feed-forward Jacobian", "slopes independent of the weights after them", prove_plain_jacobian, CASES),
    Proof("gated feed-forward Jacobian", "slopes independent of the weights after them", prove_gated_jacobian, CASES),
    Proof("Jacobian of a gated sum of experts", "independent zero-mean experts and router", prove_gated_sum, CASES),
    Proof(
        "softmax Jacobian: value, key and query path", "Gaussian tokens, fixed weights", prove_softmax_sources, CASES
    ),
    Proof("overlap of centring matrices", "none", prove_centred_overlap, CASES),
    Proof("softmax power moments, two and three keys (1e-8)", "i.i.d. normal logits", prove_power_moments),
    Proof("gate Jacobian, two experts (1e-7)", "i.i.d. normal router logits", prove_gate_two_experts),
    Proof("gate Jacobian, three experts (1e-8)", "i.i.d. normal router logits", prove_gate_three_experts),
    Proof("gate Jacobian, normalised sigmoid (1e-8)", "i.i.d. normal router logits", prove_gate_normalised_sigmoid),
    Proof("mean rotation between positions", "none", prove_mean_rotation),
    Proof("product of Jacobians over depth; telescoping", "equal blocks", prove_jacobian_product, PROVED),
    Proof("its bound (q_L / q_0)^(v_J / v), Bernoulli", "positive increments", prove_gradient_growth),
    Proof("weight gradient over correlated tokens", "gradient independent of input", prove_weight_gradient, CASES),
]
