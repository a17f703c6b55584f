"""LaTeX of every closed form of the theory: `latex(name)` calls the very function that users call, with symbols.

One line of FORMULAS per formula. A closed form names its function, its left side and one symbol for each argument, in
order; what has no closed form (a quadrature, a series) states its defining integral instead. The one-line statement and
the source are read from the function's docstring, so that they are written once.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy

from varprop.errors import ArgumentError
from varprop.theory import (
    activation,
    attention,
    backward,
    branch_jacobian,
    branch_noise,
    closure,
    coherent,
    collapse,
    decay,
    feed_forward,
    fluctuation,
    gates,
    gqa,
    jacobian,
    key_mask,
    linear,
    moe,
    norm,
    patterns,
    residual,
    scaling,
    softmax,
    softmax_jacobian,
    stream,
)


@dataclass(frozen=True)
class Formula:
    """A function of the theory and how it is written.

    left: LaTeX of the left side. symbols: names of the symbols for its arguments, in order, as sympy reads them
    ("rho q_0"). right: LaTeX of the right side, for what has no closed form. fixed: arguments that are not symbols.
    """

    function: Callable[..., Any]
    left: str
    symbols: str = ""
    right: str = ""
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def statement(self) -> str:
        """The first line of the function's docstring."""
        return inspect.cleandoc(self.function.__doc__ or "").splitlines()[0]

    @property
    def source(self) -> str:
        """What the docstring says after `Source:`; "derived here" where it says nothing."""
        text = " ".join((self.function.__doc__ or "").split())
        found = re.search(r"Source: (.*?)(?:\.(?= |$)|$)", text)
        return found.group(1) if found else "derived here"


def _closed(function: Callable[..., Any], left: str, symbols: str, **fixed: Any) -> Formula:
    return Formula(function, left, symbols, fixed=fixed)


def _stated(function: Callable[..., Any], left: str, right: str) -> Formula:
    return Formula(function, left, right=right)


_ALL = (
    # Linear maps and masks
    _closed(linear.linear_second_moment, r"\mathbb{E}\,y^2", "q g e"),
    _closed(linear.bernoulli_retained_variance, r"e(\rho)", "rho f"),
    _closed(linear.bernoulli_excess_kurtosis, r"\kappa_4(y)", "rho kappa_u d"),
    _closed(linear.bernoulli_fourth_moment, r"\mathbb{E}\,y^4", "rho P K d"),
    _closed(linear.block_concentration, r"\frac{\sum_b |u_b|^4}{|u|^4}", "b d"),
    _closed(linear.block_excess_kurtosis, r"\kappa_4(y)", "rho s"),
    _closed(linear.structured_second_moment, r"\mathbb{E}\,y^2", "rho a w n f"),
    _closed(linear.magnitude_retained_variance, r"e(\rho)", "rho"),
    _closed(linear.magnitude_fourth_moment, r"\mathbb{E}[w^4; |w| > \tau]", "rho"),
    _stated(
        linear.ranked_moment,
        r"\mathbb{E}[|w|^p; \mathrm{kept}]",
        r"2 \int_0^\infty w^p \varphi(w)\, P\bigl(\mathrm{Bin}(m - 1, 2\Phi(-w)) < k\bigr)\, dw",
    ),
    # Norms
    _closed(norm.normalised_second_moment, r"\mathbb{E}\,u^2", "q epsilon g2"),
    _closed(norm.normalised_second_moment_mean, r"\mathbb{E}\,\frac{q}{q + \epsilon}", "q epsilon nu"),
    _closed(norm.normalised_covariance, r"\mathbb{E}\,u_t u_s", "k q_t q_s epsilon", gain_square=1),
    _closed(norm.normalised_covariance_mean, r"\mathbb{E}\,u_t u_s", "c t s d"),
    _closed(norm.centred_second_moment, r"\mathbb{E}\,\mathrm{Var}(x)", "q d m2"),
    _closed(norm.centred_correlation, r"c'", "c a_t a_s r"),
    _closed(norm.cosine_mean, r"\mathbb{E}\,C_{ts}", "c d"),
    _closed(norm.cosine_variance, r"\mathrm{Var}\,C_{ts}", "c d"),
    _closed(norm.eps_fluctuation, r"\delta_\epsilon", "q epsilon d"),
    # Activations
    _closed(activation.identity_kernel, r"\mathbb{E}\,h h'", "q_t q_s c"),
    _closed(activation.identity_square_kernel, r"\mathbb{E}\,h^2 h'^2", "q_t q_s c"),
    _closed(activation.relu_kernel, r"K_{\mathrm{relu}}", "q_t q_s c"),
    _closed(activation.relu_derivative_kernel, r"K'_{\mathrm{relu}}", "q_t q_s c"),
    _closed(activation.relu_mean, r"\mathbb{E}\,\mathrm{relu}(h)", "q"),
    _closed(activation.relu2_kernel, r"K_{\mathrm{relu}^2}", "q_t q_s c"),
    _closed(activation.relu2_derivative_kernel, r"K'_{\mathrm{relu}^2}", "q_t q_s c"),
    _closed(activation.relu2_square_kernel, r"\mathbb{E}\,\mathrm{relu}(h)^4 \mathrm{relu}(h')^4", "q_t q_s c"),
    _closed(activation.relu2_mean, r"\mathbb{E}\,\mathrm{relu}(h)^2", "q"),
    _closed(activation.gelu_kernel, r"K_{\mathrm{gelu}}", "q_t q_s c"),
    _closed(activation.gelu_derivative_kernel, r"K'_{\mathrm{gelu}}", "q_t q_s c"),
    _closed(activation.gelu_mean, r"\mathbb{E}\,\mathrm{gelu}(h)", "q"),
    _stated(
        activation.activation_kernel,
        r"K(q, c)",
        r"\sum_n a_n^2 c^n, \quad a_n = \mathbb{E}\,\phi(\sqrt{q}\,z)\, \mathrm{He}_n(z) / \sqrt{n!}",
    ),
    _stated(activation.activation_second_moment, r"K(q)", r"\int \phi(\sqrt{q}\,z)^2 \varphi(z)\, dz"),
    _stated(
        activation.kurtosis_sensitivity,
        r"\frac{\partial \ln \mathbb{E}\,\phi^2}{\partial \kappa_4}",
        r"\frac{|\mathbb{E}\,\mathrm{He}_4(z)\, \phi(\sqrt{q}\,z)^2|}{24\, \mathbb{E}\,\phi(\sqrt{q}\,z)^2}",
    ),
    # Feed-forward and residual sum
    _closed(feed_forward.plain_kernel, r"\frac{\mathbb{E}\,f_t \cdot f_s}{d}", "K g_down"),
    _closed(feed_forward.gated_kernel, r"\frac{\mathbb{E}\,f_t \cdot f_s}{d}", "K g_up g_down"),
    _closed(residual.residual_second_moment, r"q_{l+1}", "q_l v_l alpha beta"),
    # Attention
    _closed(attention.incoherent_average, r"p^\top C p'", "c Y"),
    _closed(attention.value_key_coupling, r"\delta(p^\top C p)", "c P D d"),
    _stated(
        softmax.softmax_participation,
        r"\mathbb{E} \sum_j p_j^2",
        r"T \int_0^\infty t\, \mathbb{E}\bigl[e^{2sz - t e^{sz}}\bigr]\, \mathbb{E}\bigl[e^{-t e^{sz}}\bigr]^{T-1} dt",
    ),
    _stated(
        softmax.softmax_overlap,
        r"\mathbb{E} \sum_j p_{tj} p_{sj}",
        r"T \int_0^\infty\!\!\int_0^\infty \mathbb{E}\bigl[e^{x + y - t e^x - t' e^y}\bigr]\,"
        r" \mathbb{E}\bigl[e^{-t e^x - t' e^y}\bigr]^{T-1} dt\, dt', \quad \mathrm{corr}(x, y) = c",
    ),
    _closed(patterns.window_uniform_participation, r"\frac{1}{T} \sum_t \sum_j p_{tj}^2", "T w"),
    _closed(patterns.causal_uniform_participation, r"\frac{1}{T} \sum_t \sum_j p_{tj}^2", "T"),
    _closed(patterns.qk_norm_logit_variance, r"s^2", "m_q m_k epsilon d_h alpha"),
    _closed(patterns.sink_uniform_form, r"p^\top C p", "F n"),
    _closed(key_mask.kept_inverse, r"\mathbb{E}\,\frac{1}{n}", "N rho"),
    _closed(key_mask.masked_output_form, r"\mathbb{E}\,p^\top C p", "F S y_t r_t rho"),
    _closed(closure.equivalent_keys, r"(n, v, w)", "v_C v_S H"),
    _closed(closure.iid_third_order, r"J_3", "n w"),
    _closed(closure.pair_factor, r"k_{\mathrm{eff}}", "k L z sigma2"),
    # Grouped-query attention
    _closed(gqa.head_covariance, r"\frac{\mathbb{E}\,o_h \cdot o_{h'}}{d_h}", "c X sigma2"),
    _closed(gqa.head_cosine, r"\kappa", "c X Y"),
    _closed(gqa.aligned_mean_factor, r"\frac{v(\eta)}{v(0)}", "g eta kappa"),
    _closed(gqa.attention_relative_variance, r"\frac{\mathrm{Var}\,|o|^2}{(\mathbb{E}\,|o|^2)^2}", "n_h d_h g kappa d"),
    _closed(gqa.xavier_value_gain, r"\sigma_V^2", "d n_kv d_h"),
    # Mixtures of experts
    _stated(
        gates.gate_second_moment,
        r"S_2 = \mathbb{E} \sum_i g_i^2",
        r"\mathbb{E}_t \int_0^\infty u\, k\, M_2(u) M_0(u)^{k-1} R(u)\, du, \quad"
        r" M_a = \mathbb{E}\bigl[f(z)^a e^{-u f(z)} \mid z > t\bigr], \quad \Phi(t) \sim \mathrm{Beta}(E - k, k + 1),"
        r" \quad R = 1 \text{ (normalised) or } e^{-u f(t)} \mathbb{E}\bigl[e^{-u f(z)} \mid z < t\bigr]^{E-k-1}",
    ),
    _closed(moe.mix_shared, r"v", "v_R v_S k", mixing="mean"),
    # Stream over depth
    _closed(stream.stream_step, r"q_{l+1}", "q_l v_l r a"),
    _closed(stream.triangle_bound, r"\max q_L", "q_0 s"),
    _closed(stream.stationary_second_moment, r"q_*", "v r a"),
    _closed(stream.aligned_asymptote, r"q_l", "l V A r q_0"),
    _closed(scaling.predecessor_step, r"q_{l+1}", "q_l l"),
    _closed(coherent.coherent_second_moment, r"q_l", "l a b q_0 f g"),
    _closed(coherent.coherent_share, r"U_l", "l a b q_0 f g"),
    _closed(coherent.coherent_correlation, r"r_l", "l a b q_0"),
    _closed(coherent.masked_noise_factor, r"f(\rho)", "rho w a"),
    _closed(coherent.optimal_density, r"\rho^*", "l a b q_0 w"),
    _closed(coherent.mitigation_onset, r"l^*", "a b q_0"),
    _closed(coherent.break_even_density, r"\rho_0", "l a b q_0"),
    _closed(coherent.break_even_common_factor, r"g_0", "l a b q_0 f"),
    _closed(coherent.critical_correlation, r"r_0", "l v q_0"),
    _closed(coherent.log_share, r"\Lambda_l", "q_l q_m q_0 q_L"),
    # Token correlation over depth
    _closed(collapse.correlation_step, r"(q', c')", "q c p k"),
    _closed(collapse.correlation_drift, r"D(c)", "c a v kappa Y X"),
    _closed(collapse.approach_exponent, r"\gamma", "c a v kappa_1"),
    _closed(collapse.rank_collapse, r"c_L", "c_0 E T"),
    # Weight decay
    _closed(decay.weight_equilibrium, r"\mathbb{E}\,w^2", "eta lambda beta_1"),
    _closed(decay.equilibrium_steps, r"\tau", "eta lambda"),
    _closed(decay.normalizer_factor, r"F", "beta_1 beta_2"),
    _closed(decay.weight_second_moment, r"\mathbb{E}\,w_n^2", "n w2 eta lambda"),
    # Jacobians and gradients
    _closed(branch_jacobian.norm_jacobian, r"\frac{\mathrm{tr}\, N_t N_s^\top}{d}", "q c epsilon d z"),
    _closed(branch_jacobian.plain_jacobian, r"\frac{\mathbb{E}\,\mathrm{tr}\, F_t F_s^\top}{d}", "K g_in g_out"),
    _closed(
        branch_jacobian.gated_jacobian, r"\frac{\mathbb{E}\,\mathrm{tr}\, F_t F_s^\top}{d}", "C J K g_gate g_up g_down"
    ),
    _closed(branch_jacobian.gated_sum_jacobian, r"\frac{\mathbb{E}\,\|J\|^2}{d}", "O J G g_r v"),
    _closed(
        softmax_jacobian.softmax_sources,
        r"\frac{\mathbb{E}\,\|\partial o / \partial u\|^2}{d}",
        "Y B K S sigma2 c c_l d",
    ),
    _closed(softmax_jacobian.centred_overlap, r"\mathrm{tr}\, P_n P_m", "k n m"),
    _closed(jacobian.identity_deviation, r"\frac{\mathbb{E}\,\|J - I\|^2}{d}", "e t"),
    _closed(jacobian.product_excess, r"e_{21}", "e_1 t_1 e_2 t_2"),
    _closed(backward.jacobian_product, r"\prod_l \Bigl(1 + \frac{v_J}{q_l}\Bigr)", "q_0 v v_J L"),
    _closed(backward.gradient_growth, r"\frac{\mathbb{E}\,g_0^2}{\mathbb{E}\,g_L^2}", "x v v_J"),
    _closed(backward.weight_gradient_second_moment, r"\mathbb{E}\,(\partial L / \partial W)^2", "q g T c_h c_g"),
    # Fluctuation across networks
    _closed(fluctuation.gaussian_relative_variance, r"\frac{\mathrm{Var}\,\hat q}{q^2}", "c T n"),
    _closed(fluctuation.gaussian_covariance, r"\mathrm{Cov}(\hat q, \hat s)", "q c T n"),
    _closed(
        fluctuation.feed_forward_relative_variance,
        r"\frac{\mathrm{Var}\,\hat q_f}{q_f^2}",
        "c kappa_4 kappa_22 T d d_ff",
    ),
    _closed(fluctuation.averaged_attention_variance, r"\frac{\mathrm{Var}\,\hat q_a}{q_a^2}", "c z T d n_h d_h g"),
    _closed(branch_noise.mean_covariance, r"(\mathrm{Var}\,q,\ \mathrm{Cov}(q, s),\ \mathrm{Var}\,s)", "k_:7 T"),
)
FORMULAS: dict[str, Formula] = {entry.function.__name__: entry for entry in _ALL}


def names() -> tuple[str, ...]:
    """Names of all formulas, those of the functions, in the order of the theory.

    >>> "relu_kernel" in names()
    True
    """
    return tuple(FORMULAS)


def get(name: str) -> Formula:
    """The formula called `name` (dashes or underscores); an unknown name raises `ArgumentError` with the nearest one.

    >>> get("cosine-variance").source
    'derived in proofs/prove_norm.py'
    """
    key = str(name).lower().replace("-", "_")
    if key not in FORMULAS:
        close = difflib.get_close_matches(key, FORMULAS, n=1)
        hint = f"{close[0]!r}?" if close else "one of " + ", ".join(FORMULAS)
        raise ArgumentError(f"formula={name!r} is unknown; expected {hint}")
    return FORMULAS[key]


def latex(name: str) -> str:
    """LaTeX "left side = right side" of a formula; the right side is what its function returns for symbols.

    Raises `ArgumentError` for an unknown name.

    >>> latex("cosine_variance")
    '\\\\mathrm{Var}\\\\,C_{ts} = \\\\frac{\\\\left(1 - c^{2}\\\\right)^{2}}{d}'
    """
    formula = get(name)
    return f"{formula.left} = {formula.right or _written(right_side(formula))}"


def right_side(formula: Formula) -> Any:
    """What the function returns for the formula's symbols: a sympy expression, or a tuple or array of them."""
    parameters = inspect.signature(formula.function).parameters
    free = [p for p in parameters if p != "xp" and p not in formula.fixed]
    values = [_symbol(text) for text in formula.symbols.split()]
    arguments = dict(zip(free, values, strict=True)) | dict(formula.fixed)
    if "xp" in parameters:
        arguments["xp"] = sympy
    return formula.function(**arguments)


def _symbol(text: str) -> Any:
    """A positive symbol, or a tuple of them for a range such as "k_:7"; "g2" is g squared."""
    if ":" in text:
        return sympy.symbols(text, positive=True)
    squared = re.fullmatch(r"([a-z]+)2", text)
    return sympy.Symbol(squared.group(1), positive=True) ** 2 if squared else sympy.Symbol(text, positive=True)


def _written(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim == 2:
        return sympy.latex(sympy.Matrix(value))
    if isinstance(value, (tuple, list, np.ndarray)):
        return r"\left( " + r",\ ".join(sympy.latex(x) for x in value) + r" \right)"
    return sympy.latex(value)
