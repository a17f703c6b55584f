"""Gradients with positions resolved: autograd on explicit networks, the exchangeable limit, domains.

Networks are the replicate: 48 of width 128 on 8 tokens for each case, at 5 standard errors (48 networks, 14 x 16
numbers: false-fail rate below 1 %) beyond the claimed error `jacobian_error`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.theory.test_backward import model
from varprop import presets
from varprop.errors import AssumptionError
from varprop.nn.block import block_forward
from varprop.nn.init import draw_layer, make_generator
from varprop.spec import ModelSpec
from varprop.theory.backward import gradient_second_moment
from varprop.theory.depth import predict
from varprop.theory.jacobian import jacobian_error
from varprop.theory.patterns import allowed_keys
from varprop.theory.position_gradient import _moved, block_gradient, gradient_by_position
from varprop.theory.softmax_jacobian import query_averages, softmax_averages

N_NETWORKS, N_TOKENS, D_MODEL = 48, 8, 128


def drawn(gram: np.ndarray, generator: torch.Generator) -> torch.Tensor:
    """Gaussian tokens with this Gram matrix in expectation."""
    root = torch.from_numpy(np.linalg.cholesky(gram))
    return root @ torch.randn(len(gram), D_MODEL, generator=generator, dtype=torch.float64)


def equicorrelated(second_moments: np.ndarray, correlation: float) -> np.ndarray:
    root = np.sqrt(second_moments)
    return np.outer(root, root) * ((1 - correlation) * np.eye(len(root)) + correlation)


CASES: dict[str, ModelSpec] = {
    "causal": model(pattern="causal", feed_forward=None),
    "causal_sharp": model(pattern="causal", feed_forward=None, n_kv_heads=1, logit_scale=None),
    "window": model(pattern="window", window=3, feed_forward=None),
    "rotary": model(pattern="causal", rope_theta=10_000.0, feed_forward=None),
    "qk_norm": model(pattern="causal", qk_norm="head", feed_forward=None),
    "scaled": model(pattern="causal", branch_multiplier=0.7, skip_multiplier=0.9),
    "parallel": model(pattern="causal", block="parallel", skip_multiplier=0.9),
    "post": model(pattern="causal", placement="post"),
    "peri": model(pattern="causal", placement="peri"),
    "reordered": model(pattern="causal", placement="reordered"),
    "lns": model(pattern="causal", placement="lns", n_layers=3),
}


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_one_block_against_autograd(case: str, correlated: bool) -> None:
    """Every position, and the mean over pairs, of the gradient before one block; early tokens have larger streams and,
    where correlated, early gradients are larger and correlate by 0.5."""
    spec, generator = CASES[case], make_generator(7, list(CASES).index(case))
    stream = equicorrelated(np.linspace(2.5, 1.0, N_TOKENS), 0.3)
    start = equicorrelated(np.linspace(3.0, 0.5, N_TOKENS), 0.5) if correlated else np.eye(N_TOKENS)
    found, middle, before = [], [], []
    for _ in range(N_NETWORKS):
        x = drawn(stream, generator).requires_grad_()
        sites: dict[str, torch.Tensor] = {}
        weights = draw_layer(spec, spec.n_layers, generator, (), dtype=torch.float64)
        y = block_forward(
            x, weights, spec, spec.n_layers, lambda _, site, value, sites=sites: sites.__setitem__(site, value)
        )
        (gradient,) = torch.autograd.grad(y, x, drawn(start, generator))
        grams = [(z.detach() @ z.detach().T / D_MODEL).numpy() for z in (gradient, sites["resid_mid"], x)]
        for total, gram in zip((found, middle, before), grams, strict=True):
            total.append(gram)
    predicted = block_gradient(spec, spec.n_layers, np.mean(before, 0), np.mean(middle, 0), start)
    values = np.array([[*np.diagonal(gram), _pair_mean(gram)] for gram in found])
    expected = np.array([*np.diagonal(predicted), _pair_mean(predicted)])
    scale = np.maximum(expected, np.diagonal(predicted).mean())
    stderr = values.std(axis=0, ddof=1) / N_NETWORKS**0.5
    gap = (values.mean(axis=0) - expected) / scale
    np.testing.assert_array_less(abs(gap), jacobian_error(spec, spec.n_layers) + 5 * stderr / scale)


def _pair_mean(gram: np.ndarray) -> float:
    n = len(gram)
    return float(gram.sum() - np.trace(gram)) / (n * (n - 1))


@pytest.mark.parametrize("spec", [model(n_layers=3), model(n_layers=2, placement="post"), model(block="parallel")])
def test_full_attention_is_exchangeable(spec: ModelSpec) -> None:
    """Equal tokens in full attention: every position has the second moment of the two-number recursion."""
    q, c = np.linspace(1.0, 2.0, spec.n_layers), np.full(spec.n_layers, 0.3)
    moments = {"second_moment": q, "token_correlation": c, "middle_second_moment": q, "middle_token_correlation": c}
    expected = gradient_second_moment(spec, n_tokens=6, **moments).second_moment
    grams = [equicorrelated(np.full(6, x), 0.3) for x in q]
    found = gradient_by_position(spec, list(zip(grams, grams, strict=True)))
    np.testing.assert_allclose(found, np.tile(expected[:, None], 6), rtol=1e-3)


def test_products_equal_the_sum_that_they_stand_for() -> None:
    rng = np.random.default_rng(0)
    gradient, centred = rng.standard_normal((2, 5, 5))
    allowed = allowed_keys(model(pattern="window", window=3), 1, 5).astype(float)
    centring = [np.diag(row) - np.outer(row, row) / row.sum() for row in allowed]
    mean = allowed / allowed.sum(axis=1, keepdims=True)
    pairs = [centred[t, u] * centring[t] @ centring[u] for t in range(5) for u in range(5)]
    expected = mean.T @ gradient @ mean + np.sum(pairs, axis=0)
    gradient, centred = ((x + x.T) / 2 for x in (gradient, centred))
    np.testing.assert_allclose(_moved(gradient, centred, allowed), (expected + expected.T) / 2, atol=1e-12)


def test_uniform_causal_attention_by_hand() -> None:
    """No logits and uncorrelated gradients: one branch adds sum over the queries t >= s of 1 / n_t^2."""
    spec = model(pattern="causal", feed_forward=None, logit_scale=1e-9, d_model=2**20, n_heads=2**15)
    counts = np.arange(1, 7)
    found = gradient_by_position(spec, [(np.eye(6), np.eye(6))])[0]
    gain = float(predict(spec, n_tokens=1).second_moment.sel(layer=1, site="attn_out"))
    np.testing.assert_allclose(found, 1 + gain * np.cumsum((1 / counts**2)[::-1])[::-1], rtol=1e-5)


def test_documents_do_not_exchange_gradients() -> None:
    spec = presets.tiny().with_fields(n_layers=2, rope_theta=None)
    grams = [(np.eye(6), np.eye(6))] * 2
    both = gradient_by_position(spec, grams, documents=np.array([0, 0, 0, 1, 1, 1]))
    alone = gradient_by_position(spec, [(np.eye(3), np.eye(3))] * 2)
    np.testing.assert_allclose(both, np.tile(alone, 2), rtol=1e-12)
    assert not np.allclose(both, gradient_by_position(spec, grams))


def test_query_averages_between_their_nodes() -> None:
    spec, std = model(pattern="causal"), np.array([0.7])
    for n_tokens in (20, 300):
        found = query_averages(spec, np.arange(1.0, n_tokens + 1), np.full(n_tokens, 0.7))
        expected = softmax_averages(spec, 1, n_tokens, std, np.zeros(1))
        for name in ("participation", "square", "key_square", "spread"):
            assert getattr(found, name).mean() == pytest.approx(getattr(expected, name)[0], rel=1e-3)


def test_windows_longer_than_the_text_are_causal() -> None:
    arguments: dict[str, Any] = {"n_tokens": 12, "backward": True}
    causal, window = (
        predict(model(n_layers=3, **changes), **arguments).grad_second_moment
        for changes in ({"pattern": "causal"}, {"pattern": "window", "window": 12})
    )
    np.testing.assert_allclose(causal, window, rtol=1e-12)


def test_domain() -> None:
    spec = model(n_layers=2)
    with pytest.raises(AssumptionError, match="grams=1 is of wrong length; expected 2"):
        gradient_by_position(spec, [(np.eye(2), np.eye(2))])
    with pytest.raises(AssumptionError, match="n_tokens=4096 is too many for position-resolved gradients; expected at"):
        predict(model(pattern="causal", n_layers=32), n_tokens=4096, backward=True)
