"""What a prediction claims about its own error, site by site.

Second moments. A feed-forward output is exact given |u|^2 = d: dense Gaussian weights make its pre-activations exactly
Gaussian. Neglected terms, each with its size:

- attention: fluctuations of the token Gram matrix beyond those of one layer (attention.py) add up over layers:
  ATTENTION_BIAS * (layer + 1) * `inverse_width` of the branch, measured in experiments/theory_error.py;
- magnitude masks that keep few entries: 1 / kept;
- masked pre-activations are not Gaussian: excess kurtosis (`mask_excess_kurtosis`, O((1 - density) / (density d)))
  times the sensitivity of the branch (first term of the Gram-Charlier series);
- eps of the norm: 2 eps q / ((q + eps)^2 d), times the power of |u| in the branch;
- quadrature: QUADRATURE_ERROR.

The stream adds its branches' errors in absolute size. Token correlations (ratios of means over networks):
CORRELATION_BIAS of the site times (layer + 1) * `inverse_width`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from varprop.spec import ModelSpec, layer_table
from varprop.theory.activation import CLOSED_FORMS, kurtosis_sensitivity
from varprop.theory.linear import effective_gain, gain_error, mask_excess_kurtosis
from varprop.theory.norm import eps_fluctuation

ATTENTION_BIAS = 0.1
"""This and the next: the largest |bias| - 2 stderr over all cases, widths and layers of experiments/theory_error.py, in
units of (layer + 1) * `inverse_width`, rounded up to a tenth (measured: 0.05; 0.15, 0.03, 0.01)."""
CORRELATION_BIAS = {"attn_out": 0.2, "mlp_out": 0.1, "stream": 0.1}
QUADRATURE_ERROR = 1e-6
MLP_MATRICES = ("gate", "up", "down", "router")
INPUT_POWER = 3
"""|f|^2 scales at most like |u|^(2 * 3): a gated relu2."""
EXACTNESS = ("exact", "quadrature", "O(1/width)")


def inverse_width(spec: ModelSpec) -> float:
    """1 / d_model + 1 / (n_kv_heads head_dim) + 1 / (active feed-forward width): the size of one layer's fluctuations.

    A branch's Gram matrix fluctuates like a Wishart matrix of as many degrees of freedom as the branch has inner units.

    >>> from varprop import presets
    >>> round(128 * inverse_width(presets.tiny()), 3)
    2.333
    """
    total = 1 / spec.d_model
    if spec.attention is not None:
        total += 1 / min(
            _inner(spec, "v", spec.n_kv_heads * spec.head_dim), _inner(spec, "o", spec.n_heads * spec.head_dim)
        )
    widths = [] if spec.feed_forward is None else [spec.feed_forward.d_ff]
    if spec.moe is not None:
        widths.append((spec.moe.top_k + spec.moe.n_shared_experts) * spec.moe.d_expert)
    return total + (1 / min(_inner(spec, "down", width) for width in widths) if widths else 0.0)


def _inner(spec: ModelSpec, matrix: str, width: int) -> float:
    """Inner units, or blocks of them that a block mask keeps: these come and go together."""
    mask = spec.masks.of(matrix)
    return max(1.0, width * mask.density / mask.block_size) if mask is not None and mask.kind == "block" else width


@dataclass(frozen=True)
class Claim:
    """Relative error of the second moment, absolute error of the token correlation, and the kind of formula."""

    relative: float = 0.0
    correlation: float = 0.0
    exactness: str = "exact"


class ErrorBudget:
    """Follows the claimed errors down the layers of a spec."""

    def __init__(self, spec: ModelSpec, n_tokens: int) -> None:
        self.spec, self.n_tokens = spec, n_tokens
        self._inverse_width = inverse_width(spec)
        self._absolute = 0.0
        self._quadrature = False
        self._correlation = 0.0

    def embedding(self) -> Claim:
        """The embedding is exact."""
        return Claim()

    def advance(self, layer: int, second_moments: Mapping[str, float]) -> dict[str, Claim]:
        """Claims at every site of `layer` (1, 2, ...), given its predicted second moments."""
        q = second_moments
        claims = {"resid_pre": self._stream(q["resid_pre"])}
        attention, attention_quadrature = self._attention(layer, q["resid_pre"])
        middle_input = q["resid_pre" if self.spec.block == "parallel" else "resid_mid"]
        mlp, mlp_quadrature = self._mlp(layer, middle_input)
        depth = (layer + 1) * self._inverse_width if self.n_tokens > 1 else 0.0
        claims["attn_out"] = self._branch(q["attn_out"], attention, attention_quadrature, "attn_out", depth)
        self._correlation = CORRELATION_BIAS["stream"] * depth
        skip = self.spec.skip_scale**2 if self.spec.attention is not None else 1.0
        self._absolute = skip * self._absolute + attention * q["attn_out"]
        self._quadrature |= attention_quadrature
        claims["resid_mid"] = self._stream(q["resid_mid"])
        claims["mlp_out"] = self._branch(q["mlp_out"], mlp, mlp_quadrature, "mlp_out", depth)
        one_sum = self.spec.block == "parallel" and self.spec.attention is not None
        skip = self.spec.skip_scale**2 if q["mlp_out"] > 0 and not one_sum else 1.0
        self._absolute = skip * self._absolute + mlp * q["mlp_out"]
        self._quadrature |= mlp_quadrature
        claims["resid_post"] = self._stream(q["resid_post"])
        return claims

    def _stream(self, second_moment: float) -> Claim:
        return _claim(self._absolute / second_moment, self._quadrature, self._correlation)

    def _branch(self, second_moment: float, relative: float, quadrature: bool, site: str, depth: float) -> Claim:
        if second_moment == 0:
            return Claim()
        return _claim(relative, quadrature, CORRELATION_BIAS[site] * depth)

    def _norm(self, second_moment: float) -> float:
        return INPUT_POWER * eps_fluctuation(second_moment, self.spec.norm.eps, self.spec.d_model)

    def _attention(self, layer: int, second_moment: float) -> tuple[float, bool]:
        """Relative error of the attention output and whether a quadrature enters."""
        spec = self.spec
        if spec.attention is None:
            return 0.0, False
        rows = layer_table(spec, layer)
        error = self._norm(second_moment) + sum(gain_error(rows[f"attention.{name}"]) for name in "qkvo")
        if self.n_tokens == 1 and not spec.attention.sink_logit:  # one key takes all the weight
            return error, False
        gains = [effective_gain(rows[f"attention.{name}"]) for name in "qk"]
        scale = spec.attention.logit_scale or spec.head_dim**-0.5
        logit_variance = scale**2 * spec.head_dim * gains[0] * gains[1]
        kurtosis = sum(mask_excess_kurtosis(rows[f"attention.{name}"].mask, spec.d_model) for name in "qk")
        # E sum p^2 = E e^{2g} / (T (E e^g)^2) to leading order in 1/T; a fourth cumulant adds (2^4 - 2) / 24 of itself.
        error += min(1.0, 7 / 12 * kurtosis * logit_variance**2)
        return error + ATTENTION_BIAS * (layer + 1) * self._inverse_width, True

    def _mlp(self, layer: int, second_moment: float) -> tuple[float, bool]:
        """Relative error of the feed-forward output and whether a quadrature enters."""
        spec = self.spec
        part = spec.moe if spec.is_moe(layer) else spec.feed_forward
        if part is None:
            return 0.0, False
        rows = layer_table(spec, layer)
        prefix = "moe.experts." if spec.is_moe(layer) else "mlp."
        inner = rows[prefix + ("gate" if part.gated else "up")]
        kurtosis = mask_excess_kurtosis(inner.mask, spec.d_model)
        error = self._norm(second_moment) + sum(gain_error(row) for row in rows.values() if row.matrix in MLP_MATRICES)
        if kurtosis:
            error += kurtosis * kurtosis_sensitivity(part.activation, effective_gain(inner))
        quadrature = part.activation not in CLOSED_FORMS
        if spec.is_moe(layer):
            error += mask_excess_kurtosis(rows["moe.router"].mask, spec.d_model)
            quadrature = True
        return error, quadrature


def _claim(relative: float, quadrature: bool, correlation: float) -> Claim:
    kind = "O(1/width)" if relative > 0 else "quadrature" if quadrature else "exact"
    return Claim(relative + (QUADRATURE_ERROR if quadrature else 0.0), correlation, kind)
