"""`method="gram"`: the same law as networks with matrices, and as reproducible.

Law: 400 + 400 networks, fixed seeds; every recorded number by Kolmogorov-Smirnov with Holm's correction, and all of
them jointly by the energy distance. Each of the two fails a correct method with probability 0.001. What they would
see is shown by wrong methods: 3 % in the standard deviation of one matrix of seven is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from varprop import results
from varprop.nn.init import make_generator
from varprop.simulate import gram, sample, sampling
from varprop.simulate.block import MAX_NETWORKS, Run
from varprop.simulate.gram import GaussianMap, gram_layer, gram_numbers, gram_root
from varprop.spec import ModelSpec

from ..reference.specs import SPECS
from .two_sample import joint_p_value, marginal_p_value, network_vectors

LEVEL = 0.001
WIDE = {"d_model": 32}
SHORT: dict[str, Any] = {"n_tokens": 12}
CASES: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "dense": (SPECS["base"].with_fields(WIDE), SHORT),
    "correlated_tokens": (SPECS["base"].with_fields(WIDE), {**SHORT, "token_correlation": 0.5}),
    "repeated_tokens": (SPECS["base"].with_fields(WIDE), {"inputs": [0, 1, 0, 2, 2, 0, 3, 1, 0, 0]}),
    "more_tokens_than_width": (SPECS["base"], {"n_tokens": 40}),
    "one_token": (SPECS["moe"], {"n_tokens": 1}),
    "gqa_qk_norm_parallel": (
        SPECS["parallel"].with_fields(WIDE, n_kv_heads=2, qk_norm="head", qkv_bias=True, output_bias=True),
        SHORT,
    ),
    "mqa_layer_norm_relu": (
        SPECS["mqa"].with_fields({**WIDE, "norm.kind": "layer"}, activation="relu", gated=False),
        SHORT,
    ),
    "moe": (SPECS["moe"].with_fields(WIDE), SHORT),
    "moe_normalised": (SPECS["moe_normalised"].with_fields(WIDE, placement="peri"), SHORT),
    "moe_shared": (SPECS["moe_shared"].with_fields(WIDE), {**SHORT, "token_correlation": 0.5}),
    "moe_expert_choice": (SPECS["moe_expert_choice"].with_fields(WIDE), SHORT),
    "post": (SPECS["placement_post"].with_fields(WIDE), SHORT),
    "reordered_key_mask": (SPECS["key_mask_before"].with_fields(WIDE, placement="reordered"), SHORT),
}


def rows(spec: ModelSpec, arguments: dict[str, Any], n_networks: int, method: str) -> np.ndarray:
    """Statistics of networks; those of the two methods have different seeds."""
    seed = list(sampling.METHODS).index(method)
    return network_vectors(sample(spec, n_networks=n_networks, seed=seed, method=method, **arguments))


@functools.cache
def explicit_rows(name: str) -> np.ndarray:
    return rows(*CASES[name], 400, "explicit")


@pytest.mark.parametrize("name", CASES)
def test_same_law_as_explicit_networks(name: str) -> None:
    explicit, drawn = explicit_rows(name), rows(*CASES[name], 400, "gram")
    assert marginal_p_value(explicit, drawn) > LEVEL
    assert joint_p_value(explicit, drawn) > LEVEL


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if not spec.masks.any])
def test_same_law_for_every_field_of_a_spec(name: str) -> None:
    """1,000 + 1,000 networks of each spec. False-fail rate 1e-4 a test, 1 % for all."""
    arguments = {"n_tokens": 10, "token_correlation": 0.2}
    explicit, drawn = (rows(SPECS[name], arguments, 1000, method) for method in ("explicit", "gram"))
    assert marginal_p_value(explicit, drawn) > LEVEL / 10
    assert joint_p_value(explicit, drawn, n_permutations=19999) > LEVEL / 10


class _Independent:
    """A wrong factor: tokens drawn as if their outputs were independent."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diag_embed(x.norm(dim=-1))


class _SharedExperts(GaussianMap):
    """A wrong draw: all experts have the numbers of the first."""

    def _normal(self, n_rows: int) -> torch.Tensor:
        normal = super()._normal(n_rows)
        return normal[:, :1].expand_as(normal)


def _forget_correlation(weights: dict[str, Any]) -> None:
    weights["attention.v"].roots = _Independent()


def _larger_values(weights: dict[str, Any]) -> None:
    weights["attention.v"].std *= 1.03


def _larger(weights: dict[str, Any]) -> None:
    for weight in weights.values():
        if isinstance(weight, GaussianMap):
            weight.std *= 1.03


def _same_seed(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        seed = weights[first].generator.initial_seed()
        weights[second].generator = torch.Generator().manual_seed(seed)

    return change


def _share_experts(weights: dict[str, Any]) -> None:
    for name in ("moe.experts.gate", "moe.experts.up", "moe.experts.down"):
        own = weights[name]
        weights[name] = _SharedExperts(own.std, own.shape, own.generator, own.keep, own.roots)


@pytest.mark.parametrize(
    "change, name",
    [
        (_forget_correlation, "dense"),
        (_forget_correlation, "gqa_qk_norm_parallel"),
        (_larger, "moe"),
        (_larger_values, "dense"),
        (_same_seed("attention.q", "attention.k"), "dense"),
        (_same_seed("mlp.up", "mlp.gate"), "dense"),
        (_share_experts, "moe"),
    ],
    ids=["correlation", "correlation_gqa", "all_3_percent", "values_3_percent", "q_k", "up_gate", "experts"],
)
def test_wrong_methods_are_found(change: Callable[..., None], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint test finds each of them; the marginal ones alone miss the 3 % of one matrix."""

    def wrong(*arguments: Any) -> Any:
        weights = gram_layer(*arguments)
        change(weights)  # type: ignore[arg-type]
        return weights

    monkeypatch.setitem(sampling.METHODS, "gram", (wrong, gram_numbers))
    assert joint_p_value(explicit_rows(name), rows(*CASES[name], 400, "gram")) <= LEVEL


@pytest.mark.parametrize("n_tokens, d_model", [(6, 16), (16, 6), (1, 8)])
def test_a_map_has_the_covariance_of_its_tokens(n_tokens: int, d_model: int) -> None:
    """Two maps of one layer on given tokens, 4,000 networks: outputs of q and k are N(0, s^2 H H^T) and independent.

    All variances and covariances of both maps within 5 standard errors (1,024 numbers at most: false-fail rate 6e-4),
    and the lengths of the columns follow a chi-square law (Kolmogorov-Smirnov at 1e-4).
    """
    spec = SPECS["base"].with_fields(d_model=d_model, n_heads=1, n_layers=1, rope_theta=None)
    tokens = torch.randn(n_tokens, d_model, generator=make_generator(1), dtype=torch.float64)
    n_networks = 4000
    x = tokens.expand(n_networks, -1, -1)
    weights = gram_layer(spec, 1, make_generator(2), (n_networks,), dtype=torch.float64)
    first, second = (weights[f"attention.{name}"].apply(x)[..., 0].numpy() for name in "qk")
    covariance = (tokens @ tokens.T).numpy() / d_model
    joint = np.concatenate([first, second], axis=1)
    expected = np.kron(np.eye(2), covariance)
    variances = np.outer(expected.diagonal(), expected.diagonal())
    stderr = np.sqrt((variances + expected**2) / n_networks)
    assert (np.abs(joint.T @ joint / n_networks - expected) < 5 * stderr).all()
    inverse, rank = np.linalg.pinv(covariance, hermitian=True), min(n_tokens, d_model)
    length = np.einsum("bs,st,bt->b", first, inverse, first)
    assert scipy.stats.kstest(length, scipy.stats.chi2(rank).cdf).pvalue > 1e-4


@pytest.mark.parametrize("n_tokens, width", [(5, 12), (12, 5), (1, 4), (7, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_root_of_deficient_tokens(n_tokens: int, width: int, dtype: torch.dtype) -> None:
    """Repeated tokens, zero tokens, tokens of very different length; errors relative to the lengths of the two tokens.

    Entries come from a float64 eigenvalue problem: 1e-15 in the Gram matrix, its square root in the rows of F.
    """
    x = torch.randn(3, n_tokens, width, generator=make_generator(3)).to(dtype)
    x[0, 0] *= 1e-6
    x[1, -1] = x[1, 0]
    x[2, n_tokens // 2 :] = 0
    root = gram_root(x)
    norm = x.double().norm(dim=-1)
    difference = (root.double() @ root.double().mT - x.double() @ x.double().mT).abs()
    assert (difference <= 1e-6 * norm.unsqueeze(-1) * norm.unsqueeze(-2)).all()
    assert bool((root[2, n_tokens // 2 :] == 0).all())
    assert (root[1, -1] - root[1, 0]).norm() <= 2e-7 * norm[1, 0]
    assert root.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("n_tokens", [4, 30])
def test_rounding_moves_the_root_by_rounding(n_tokens: int) -> None:
    """Lipschitz with factor sqrt(2) for tokens of length 1, also dependent ones; 3 allows for changes of length."""
    x = torch.randn(n_tokens, 10, generator=make_generator(4), dtype=torch.float64).clamp(min=0)
    x[-1] = x[0]
    x = torch.nn.functional.normalize(x, dim=-1)
    change = 1e-6 * torch.randn(x.shape, generator=make_generator(5), dtype=torch.float64)
    assert (gram_root(x + change) - gram_root(x)).norm() <= 3 * change.norm()


def test_equal_tokens_stay_equal() -> None:
    """Without positions and with full attention equal tokens are equal at every layer, to rounding."""
    spec = SPECS["full"].with_fields(rope_theta=None)
    last = sample(spec, n_networks=20, inputs=[3, 3, 3], method="gram").sel(site="resid_post")
    np.testing.assert_allclose(last.token_correlation, 1.0, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "moe_shared", "mask_moe", "key_mask_before"])
def test_a_network_does_not_depend_on_how_many_there_are(name: str) -> None:
    size = MAX_NETWORKS["cpu"]
    arguments: dict[str, Any] = {"n_tokens": 20, "method": "gram"}
    many = sample(SPECS[name], n_networks=2 * size + 3, **arguments)
    for first, n_networks in ((0, 1), (0, size + 1), (5, size), (size, 3)):
        few = sample(SPECS[name], n_networks=n_networks, first_network=first, **arguments)
        assert few.equals(many.isel(network=slice(first, first + n_networks)))
    last = many.second_moment.sel(layer=3, site="resid_post").values
    assert len(set(last)) == len(last)


def test_number_of_threads_does_not_matter() -> None:
    before, runs = torch.get_num_threads(), []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        runs.append(sample(SPECS["moe"], n_networks=3, n_tokens=40, method="gram"))
    torch.set_num_threads(before)
    assert results.identical(*runs)


@pytest.mark.parametrize("name", ["base", "gqa", "moe", "moe_shared", "moe_expert_choice", "mask_moe"])
@pytest.mark.parametrize("n_tokens", [6, 40])
def test_a_block_in_pieces_has_the_same_networks(name: str, n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding (small batched products are summed in another order than large ones); other draws differ by 10 %.

    Also where the slots of the experts differ, as they follow the busiest expert of a piece.
    """
    whole = sample(SPECS[name], n_networks=8, n_tokens=n_tokens, method="gram")
    for parts in (2, 8):
        monkeypatch.setattr(Run, "parts", parts)
        pieces = sample(SPECS[name], n_networks=8, n_tokens=n_tokens, method="gram")
        for variable in whole:
            np.testing.assert_allclose(pieces[variable], whole[variable], rtol=1e-4, atol=1e-6)


def test_single_and_double_precision_are_the_same_networks() -> None:
    """More tokens than neurons, and repeated ones. Rounding errors of 1e-7 grow over three layers."""
    arguments: dict[str, Any] = {"inputs": [0, 1, 2, 0, 3] * 5, "method": "gram", "n_networks": 4}
    single, double = (sample(SPECS["base"], dtype=dtype, **arguments) for dtype in ("float32", "float64"))
    np.testing.assert_allclose(single.second_moment, double.second_moment, rtol=1e-4)


def test_a_map_is_applied_once() -> None:
    spec = SPECS["base"]
    weights = gram_layer(spec, 1, make_generator(0), (2,))
    x = torch.ones(2, 3, spec.d_model)
    weights["attention.q"].apply(x)
    with pytest.raises(RuntimeError, match="applied twice"):
        weights["attention.q"].apply(x)


def test_maps_that_read_the_same_tokens_share_a_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values; heads; gate and up; inner units."""
    calls = []
    monkeypatch.setattr(gram, "gram_root", lambda x: calls.append(x.shape) or gram_root(x))
    sample(SPECS["base"], n_networks=1, n_tokens=5, method="gram")
    assert len(calls) == 4 * SPECS["base"].n_layers


def test_claims_are_attributes(tmp_path) -> None:
    dense, masked = (sample(SPECS[name], n_networks=1, n_tokens=2, method="gram") for name in ("base", "mask_block"))
    explicit = sample(SPECS["mask_block"], n_networks=1, n_tokens=2)
    names = ("method", "exactness", "method_error", "method_spread_error")
    assert [dense.attrs[name] for name in names] == ["gram", "exact in law", 0.0, 0.0]
    assert [explicit.attrs[name] for name in names] == ["explicit", "exact", 0.0, 0.0]
    assert masked.attrs["exactness"] == "leading order in 1/(density * fan_in)"
    assert masked.attrs["method_error"] > 0
    assert results.identical(results.load(results.save(masked, tmp_path / "a.nc")), masked)
