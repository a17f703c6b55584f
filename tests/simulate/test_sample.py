"""`sample`: reproducible network by network, equal to the loop-written network, and strict about its arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from varprop import presets, results
from varprop.errors import ArgumentError
from varprop.nn import draw_layer
from varprop.nn.init import make_generator
from varprop.simulate import sample
from varprop.simulate.block import MAX_NETWORKS, networks_per_block
from varprop.spec import ModelSpec

from ..reference.forward import block
from ..reference.specs import BASE, SPECS

SMALL = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48, density=0.5)


@pytest.mark.parametrize("spec", [SMALL, SPECS["mask_moe"], SPECS["key_mask_before"]], ids=["dense", "moe", "key_mask"])
def test_a_network_does_not_depend_on_how_many_there_are(spec: ModelSpec) -> None:
    """Counts on both sides of one and of two blocks of networks."""
    assert networks_per_block(spec, 6) == MAX_NETWORKS["cpu"]
    size = MAX_NETWORKS["cpu"]
    many = sample(spec, n_networks=2 * size + 3, n_tokens=6, token_correlation=0.25)
    for first, n_networks in ((0, 1), (0, size - 1), (0, size), (0, size + 1), (5, size), (size, 3)):
        few = sample(spec, n_networks=n_networks, first_network=first, n_tokens=6, token_correlation=0.25)
        assert few.equals(many.isel(network=slice(first, first + n_networks)))


def test_networks_and_seeds_differ_and_a_run_repeats() -> None:
    first, again = (sample(SMALL, n_networks=20, n_tokens=6, seed=1) for _ in range(2))
    other = sample(SMALL, n_networks=20, n_tokens=6, seed=2)
    assert results.identical(first, again)
    last = first.second_moment.sel(layer=2, site="resid_post").values
    assert len(set(last) | set(other.second_moment.sel(layer=2, site="resid_post").values)) == 40


def test_number_of_threads_does_not_matter() -> None:
    before = torch.get_num_threads()
    runs = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        runs.append(sample(SMALL, n_networks=3, n_tokens=40))
        assert torch.get_num_threads() == n_threads
    torch.set_num_threads(before)
    assert results.identical(*runs)


@pytest.mark.parametrize("name", ["base", "gqa", "parallel", "mask_moe", "placement_post", "attention_only"])
def test_statistics_equal_those_of_the_loop_written_network(name: str) -> None:
    """Float64 against loops: 1e-9 leaves five digits over rounding."""
    spec = SPECS[name].with_fields(vocab_size=50)
    x = np.random.default_rng(3).normal(size=(6, spec.d_model))
    n_networks = 2
    dataset = sample(spec, n_networks=n_networks, inputs=x, seed=4, dtype="float64")
    streams, sites = [x] * n_networks, [{(0, "resid_post"): x} for _ in range(n_networks)]
    for layer in range(1, spec.n_layers + 1):
        generator = make_generator((4, int(spec.spec_id, 16)), 0, layer)
        stack = draw_layer(spec, layer, generator, (networks_per_block(spec, 6),), dtype=torch.float64)
        for i in range(n_networks):
            own = {key: value[i].numpy() for key, value in stack.items()}
            streams[i] = block(streams[i], own, spec, layer, None, sites[i])
    for i in range(n_networks):
        for (layer, site), value in sites[i].items():
            cell = dataset.sel(network=i, layer=layer, site=site)
            assert cell.second_moment.item() == pytest.approx((value**2).mean(), rel=1e-9)
            assert cell.variance.item() == pytest.approx(value.var(axis=1).mean(), rel=1e-9)
            total = value.sum(axis=0)
            power = (value**2).sum()
            pairs = (total @ total - power) / (5 * power) if power else 0.0
            assert cell.token_correlation.item() == pytest.approx(pairs, abs=1e-9)
        for layer in range(1, spec.n_layers + 1):
            for branch, stream in (("attn", "resid_pre"), ("mlp", "resid_mid")):
                a, b = sites[i][layer, stream], sites[i][layer, branch + "_out"]
                expected = (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()) if b.any() else 0.0
                measured = dataset.branch_correlation.sel(network=i, layer=layer, branch=branch).item()
                assert measured == pytest.approx(expected, abs=1e-9)


def test_a_generator_made_on_a_device_has_the_seed_of_the_cpu() -> None:
    """ "cpu:0" takes the way of an accelerator; its numbers are known."""
    spec = SMALL.with_fields(key_mask_density=0.5)
    plain, made = (sample(spec, n_networks=3, n_tokens=6, seed=2**63, draw_device=name) for name in ("cpu", "cpu:0"))
    assert plain.equals(made)
    assert (plain.attrs["draw_device"], made.attrs["draw_device"]) == ("cpu", "cpu:0")


def test_single_and_double_precision_are_the_same_networks() -> None:
    """Equal to float32 rounding, 6e-8 per operation over two layers; networks themselves differ by tens of percent."""
    single, double = (sample(SMALL, n_networks=4, n_tokens=6, dtype=dtype) for dtype in ("float32", "float64"))
    np.testing.assert_allclose(single.second_moment, double.second_moment, rtol=1e-4)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 1.0])
def test_gaussian_tokens_have_the_moments_asked_for(correlation: float) -> None:
    """Five standard errors over 400 networks, false-fail rate 6e-7 for each number; seed fixed."""
    spec = BASE.with_fields(embedding_scale=3.0, embedding_std=0.5)
    start = sample(spec, n_networks=400, n_tokens=8, token_correlation=correlation).sel(layer=0, site="resid_post")
    q = start.second_moment.values
    pair = start.token_correlation.values * q  # the ratio is biased for few numbers, its numerator is not
    assert abs(q.mean() - 2.25) < 5 * q.std(ddof=1) / 20
    assert abs(pair.mean() - 2.25 * correlation) < 5 * pair.std(ddof=1) / 20 + 1e-6


def test_equal_token_ids_share_an_embedding_row() -> None:
    spec = BASE.with_fields(embedding_scale=2.0)
    same = sample(spec, n_networks=2, inputs=[5, 5, 5]).sel(layer=0, site="resid_post")
    np.testing.assert_allclose(same.token_correlation, 1.0, rtol=1e-12)
    mixed = sample(spec, n_networks=200, inputs=np.array([5, 1, 5, 1])).sel(layer=0, site="resid_post")
    pair = (mixed.token_correlation * mixed.second_moment).values  # of 6 pairs, 2 are equal
    assert abs(pair.mean() - 4.0 / 3) < 5 * pair.std(ddof=1) / 200**0.5  # false-fail rate 6e-7


def test_given_vectors_are_the_stream_of_every_network() -> None:
    x = np.arange(32.0).reshape(2, 16)
    x.flags.writeable = False
    start = sample(BASE, n_networks=3, inputs=x).sel(layer=0, site="resid_post")
    np.testing.assert_array_equal(start.second_moment, (x**2).mean())


def test_absence_and_attributes(tmp_path) -> None:
    dataset = sample(SMALL, n_networks=2, n_tokens=3, token_correlation=0.5, seed=2**70)
    assert bool(np.isnan(dataset.branch_correlation.sel(layer=0)).all())
    attributes = dataset.attrs
    assert attributes["seed_entropy"] == str(2**70)
    again = sample(
        ModelSpec.from_json(attributes["spec"]),
        n_networks=attributes["n_networks"],
        n_tokens=attributes["n_tokens"],
        token_correlation=attributes["token_correlation"],
        seed=int(attributes["seed"]),
        method=attributes["method"],
        device=attributes["device"],
        dtype=attributes["dtype"],
    )
    assert results.identical(dataset, again)
    assert results.identical(results.load(results.save(dataset, tmp_path / "a.nc")), dataset)
    labels = [sample(SMALL, n_networks=1, inputs=ids).attrs["inputs"] for ids in ([1, 2], [1, 2], [2, 1])]
    assert labels[0] == labels[1] != labels[2]
    assert labels[0].startswith("sha256:")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_networks": 0, "n_tokens": 2}, "n_networks=0 is outside"),
        ({"n_networks": 1.5, "n_tokens": 2}, "n_networks=1.5 is outside"),
        ({"n_networks": 1}, "n_tokens=None is missing"),
        ({"n_networks": 1, "n_tokens": True}, "n_tokens=True is outside"),
        ({"n_networks": 1, "n_tokens": 2, "inputs": [1]}, "n_tokens=2 is given with inputs"),
        ({"n_networks": 1, "inputs": [1], "token_correlation": 0.5}, "token_correlation=0.5 is given with inputs"),
        ({"n_networks": 1, "n_tokens": 2, "token_correlation": 1.1}, "token_correlation=1.1 is outside"),
        ({"n_networks": 1, "n_tokens": 2, "token_correlation": float("nan")}, "token_correlation=nan is outside"),
        ({"n_networks": 1, "n_tokens": 2, "token_correlation": "x"}, "token_correlation='x' is outside"),
        ({"n_networks": 1, "n_tokens": 2, "seed": -1}, "seed=-1 is outside"),
        ({"n_networks": 1, "n_tokens": 2, "method": "magic"}, "method='magic' is unknown"),
        ({"n_networks": 1, "n_tokens": 2, "device": "abacus"}, "device='abacus' is not available"),
        ({"n_networks": 1, "n_tokens": 2, "draw_device": "abacus"}, "draw_device='abacus' is not available"),
        ({"n_networks": 1, "n_tokens": 2, "first_network": -1}, "first_network=-1 is outside"),
        ({"n_networks": 1, "n_tokens": 2, "dtype": "int8"}, "dtype='int8' is unknown"),
        ({"n_networks": 1, "inputs": np.full((2, 16), np.inf)}, "inputs=array is not finite"),
        ({"n_networks": 1, "inputs": np.zeros((2, 15))}, r"inputs=array is an array of float64 with shape \(2, 15\)"),
        ({"n_networks": 1, "inputs": []}, "inputs=array is an array"),
        ({"n_networks": 1, "inputs": ["a"]}, "inputs=array is an array"),
        ({"n_networks": 1, "inputs": [[1], [2, 3]]}, "inputs=array is ragged"),
        ({"n_networks": 1, "inputs": [99]}, "inputs=array has ids outside the vocabulary"),
    ],
)
def test_bad_arguments_raise_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        sample(BASE, **arguments)
    assert "\n" not in str(caught.value)


def test_large_layers_are_sampled_in_smaller_blocks() -> None:
    assert networks_per_block(presets.paper_dense_1b(), 256) == 1
    assert networks_per_block(presets.tiny(), 64) == MAX_NETWORKS["cpu"]
    assert networks_per_block(presets.tiny(), 64, "cuda") == MAX_NETWORKS["accelerator"]
