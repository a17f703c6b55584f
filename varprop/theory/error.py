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
CORRELATION_BIAS of the site times (layer + 1) * `inverse_width`, times the attention's gain sigma_OV^2 where that is
above 1 (its fluctuations then make up more of what the feed-forward's convex kernel averages over).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from varprop.spec import ModelSpec, layer_table
from varprop.theory.activation import CLOSED_FORMS, kurtosis_sensitivity
from varprop.theory.attention import attention_gains
from varprop.theory.linear import effective_gain, gain_error, mask_excess_kurtosis
from varprop.theory.norm import eps_fluctuation

ATTENTION_BIAS = 0.1
"""This and the next: the largest |bias| - 2 stderr over all cases, widths and layers of experiments/theory_error.py, in
units of (layer + 1) * `inverse_width`, rounded up to a tenth (measured: 0.05; 0.15, 0.03, 0.01)."""
CORRELATION_BIAS = {"attn_out": 0.2, "mlp_out": 0.1, "stream": 0.1}
IRREGULAR_PASSED = 2
"""Error of the stream's token correlation per irregular error of an attention layer: 1.5 on a text of the demo's words
(experiments/LOG.md), and no more in deeper layers."""
GATE_VARIANCE = 1.5
"""Relative variance over tokens and networks of a mixture's power, which a norm after it feels: over the tokens of one
network 0.4 for 2 of 8 experts and 0.8 for 8 of 64 narrow ones. Set after 0.5 had failed in the validation grid, to
cover every point there (tests/experiments/test_theory_vs_simulation.py)."""
QUADRATURE_ERROR = 3e-6
MLP_MATRICES = ("gate", "up", "down", "router")
INPUT_POWER = 3
"""|f|^2 scales at most like |u|^(2 * 3): a gated relu2."""


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
    if mask is None or mask.kind != "block" or mask.density == 1:
        return width
    return max(1.0, width * mask.density / mask.block_size)


@dataclass(frozen=True)
class Claims:
    """Per layer and site, (n_layers, 5): relative error of the second moment, absolute error of the token correlation,
    and the kind of formula (one of `EXACTNESS`)."""

    relative: np.ndarray
    correlation: np.ndarray
    exactness: np.ndarray


def claims(
    spec: ModelSpec,
    n_tokens: int,
    second_moment: np.ndarray,
    token_correlation: np.ndarray,
    attention_error: np.ndarray | None = None,
) -> Claims:
    """Claimed errors of a predicted profile.

    second_moment, token_correlation: (n_layers, 5), at the sites of `results.SITES`. attention_error: (n_layers, 2),
    total and irregular error of the attention rule itself, where it is not exact in infinite width
    (`causal.closure_error`).
    """
    return _Budget(spec, n_tokens, second_moment, token_correlation, attention_error).run()


class _Budget:
    """Follows the errors of a profile down its layers."""

    def __init__(
        self,
        spec: ModelSpec,
        n_tokens: int,
        second_moment: np.ndarray,
        token_correlation: np.ndarray,
        attention_error: np.ndarray | None,
    ) -> None:
        self.spec, self.n_tokens, self.q = spec, n_tokens, second_moment
        self.inverse_width = inverse_width(spec)
        self.attention_error = np.zeros((spec.n_layers, 2)) if attention_error is None else attention_error
        self.attention_gain = 0.0 if spec.attention is None else attention_gains(spec, 1).value_output
        self.passed_on = self._passed_on(token_correlation)
        self.layers = np.arange(1, spec.n_layers + 1)
        self.relative = np.zeros_like(second_moment)
        self.quadrature = np.zeros(second_moment.shape, dtype=bool)

    def run(self) -> Claims:
        spec, q = self.spec, self.q.tolist()  # plain numbers: this loop is long for many specs
        mid = 0 if spec.block == "parallel" else 2
        present = (spec.attention is not None, spec.feed_forward is not None or spec.moe is not None)
        one_sum = spec.block == "parallel" and spec.attention is not None
        branches = []
        for exists, site, rule in zip(present, (1, 3), (self._attention, self._feed_forward), strict=True):
            if exists:
                error, by_quadrature = rule(self.q[:, 0 if site == 1 else mid])
                self.quadrature[:, site] = by_quadrature
                skip = 1.0 if one_sum and site == 3 else spec.skip_scale**2
                branches.append((site, skip, error.tolist(), by_quadrature.tolist()))
        absolute, relative, quadrature = 0.0, 0.0, False
        for i in range(spec.n_layers):
            placement = spec.norm_placement(i + 1)
            row, marks = [relative] * 5, [quadrature] * 5
            for site, skip, error, by_quadrature in branches:
                row[site] = self._branch(error[i], relative, placement, q[i][site], i, site)
                absolute = skip * absolute + row[site] * q[i][site]
                if placement == "post":  # the norm forgets the size of its input, but for eps
                    m = q[i][site + 1]
                    absolute = (1 - m) * (absolute + 2 * m * self.inverse_width)
                relative, quadrature = absolute / q[i][site + 1], quadrature or by_quadrature[i]
                for after in range(site + 1, 5, 2):
                    row[after], marks[after] = relative, quadrature
            self.relative[i] = row
            self.quadrature[i, ::2] = marks[::2]
        for exists, site in zip(present, (1, 3), strict=True):
            self.relative[:, site] *= exists
        return self._claims(present)

    def _branch(
        self, error: float, relative_input: float, placement: str, second_moment: float, index: int, site: int
    ) -> float:
        """Relative error of what a branch adds, after the norms around it."""
        spec = self.spec
        if placement in ("post", "reordered"):  # the branch reads the stream as it is
            fluctuation = INPUT_POWER * (INPUT_POWER - 1) * self.inverse_width
            error += INPUT_POWER * relative_input + (fluctuation if placement == "reordered" or index == 0 else 0.0)
        if placement in ("peri", "reordered"):  # its output has the second moment m of a normalised vector
            m = min(1.0, second_moment / spec.branch_scale**2)
            gates = GATE_VARIANCE if site == 3 and spec.is_moe(index + 1) else 0.0
            error = (1 - m) * (error + m * (2 * self.inverse_width + gates))
        return error

    def _passed_on(self, token_correlation: np.ndarray) -> np.ndarray:
        """Errors of the token correlation that the irregular part of the attention error leaves, (n_layers, 5).

        Sets `response`, the relative error of the attention output a (c + (1 - c) Y) that follows from one of c.
        """
        irregular = IRREGULAR_PASSED * np.maximum.accumulate(self.attention_error[:, 1])
        before = np.concatenate([[0.0], irregular[:-1]])
        self.response = np.zeros(self.spec.n_layers)
        if before.any():
            gain = self.spec.branch_scale**2 * self.attention_gain
            apart = np.maximum(1 - token_correlation[:, 0], 1e-3)
            self.response = before * np.maximum(gain / self.q[:, 1] - 1, 0.0) / apart
        return np.repeat(irregular[:, None], 5, axis=1)

    def _claims(self, present: tuple[bool, bool]) -> Claims:
        depth = (self.layers + 1) * self.inverse_width if self.n_tokens > 1 else np.zeros(len(self.layers))
        correlation = np.empty_like(self.q)
        for site, name in enumerate(("stream", "attn_out", "stream", "mlp_out", "stream")):
            correlation[:, site] = CORRELATION_BIAS[name] * depth * max(1.0, self.attention_gain)
        correlation += self.passed_on
        correlation[:, 0] = np.concatenate([[0.0], correlation[:-1, 4]])  # the embedding is exact
        for exists, site in zip(present, (1, 3), strict=True):
            if not exists:
                correlation[:, site] = 0.0
        names = np.where(self.relative > 0, "O(1/width)", np.where(self.quadrature, "quadrature", "exact"))
        return Claims(self.relative + QUADRATURE_ERROR * self.quadrature, correlation, names)

    def _norm(self, second_moment: np.ndarray) -> np.ndarray:
        return INPUT_POWER * eps_fluctuation(second_moment, self.spec.norm.eps, self.spec.d_model)

    def _attention(self, second_moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relative error of the attention output by layer, and whether a quadrature enters."""
        spec, n_layers = self.spec, self.spec.n_layers
        if spec.attention is None:
            return np.zeros(n_layers), np.zeros(n_layers, dtype=bool)
        rows = layer_table(spec, 1)
        error = self._norm(second_moment) + sum(gain_error(rows[f"attention.{name}"]) for name in "qkvo")
        if self.n_tokens == 1 and not spec.attention.sink_logit:  # one key takes all the weight
            return error, np.zeros(n_layers, dtype=bool)
        gains = [effective_gain(rows[f"attention.{name}"]) for name in "qk"]
        scale = spec.attention.logit_scale or spec.head_dim**-0.5
        logit_variance = scale**2 * spec.head_dim * gains[0] * gains[1]
        kurtosis = sum(mask_excess_kurtosis(rows[f"attention.{name}"].mask, spec.d_model) for name in "qk")
        # E sum p^2 = E e^{2g} / (T (E e^g)^2) to leading order in 1/T; a fourth cumulant adds (2^4 - 2) / 24 of itself.
        error = error + min(1.0, 7 / 12 * kurtosis * logit_variance**2) + self.attention_error[:, 0]
        error = error + self.response
        return error + ATTENTION_BIAS * (self.layers + 1) * self.inverse_width, np.ones(n_layers, dtype=bool)

    def _feed_forward(self, second_moment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relative error of the feed-forward output by layer, and whether a quadrature enters."""
        kinds = np.array([self.spec.is_moe(layer) for layer in self.layers.tolist()])
        error, quadrature = self._norm(second_moment), np.zeros(len(kinds), dtype=bool)
        for is_moe in set(kinds.tolist()):
            added, by_quadrature = self._one_feed_forward(int(self.layers[kinds == is_moe][0]))
            error = error + np.where(kinds == is_moe, added, 0.0)
            quadrature |= by_quadrature & (kinds == is_moe)
        return error, quadrature

    def _one_feed_forward(self, layer: int) -> tuple[float, bool]:
        spec = self.spec
        part = spec.moe if spec.is_moe(layer) else spec.feed_forward
        if part is None:
            return 0.0, False
        rows = layer_table(spec, layer)
        prefix = "moe.experts." if spec.is_moe(layer) else "mlp."
        inner = rows[prefix + ("gate" if part.gated else "up")]
        kurtosis = mask_excess_kurtosis(inner.mask, spec.d_model)
        error = sum(gain_error(row) for row in rows.values() if row.matrix in MLP_MATRICES)
        if kurtosis:
            error += kurtosis * kurtosis_sensitivity(part.activation, effective_gain(inner))
        quadrature = part.activation not in CLOSED_FORMS
        if spec.is_moe(layer):
            error += mask_excess_kurtosis(rows["moe.router"].mask, spec.d_model)
            quadrature = True
        return error, quadrature
