"""Simulation on an accelerator: the same networks as on the CPU, to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varprop import presets, simulate


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny", "tiny_masked", "tiny_gqa", "tiny_moe"])
def test_cuda_draws_the_networks_of_the_cpu(name: str) -> None:
    """Weights are drawn on the CPU in both cases, so only float32 rounding (about 1e-7 a sum) differs.

    Top-k routing can flip for a token whose two logits are equal to rounding; one flip among 64 tokens of one layer
    moves a mean by less than 1e-3.
    """
    spec = presets.get(name)
    runs = [
        simulate.sample(spec, n_networks=8, n_tokens=64, seed=3, device=device, draw_device="cpu", progress=False)
        for device in ("cpu", "cuda")
    ]
    tolerance = 1e-3 if spec.moe is not None else 1e-5
    for variable in ("second_moment", "variance", "token_correlation"):
        cpu, cuda = (run[variable].fillna(0.0) for run in runs)
        assert float(abs(cpu - cuda).max()) < tolerance * max(1.0, float(abs(cpu).max()))
    assert runs[1].attrs["device"] == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny", "tiny_masked", "tiny_gqa", "tiny_moe"])
def test_weights_drawn_on_cuda_have_the_same_law(name: str) -> None:
    """Means of 256 networks within 5 standard errors of each other at every site: false-fail rate 1e-4 (160 numbers).

    The same run twice is bitwise the same, and a network does not depend on how many there are.
    """
    spec = presets.get(name)
    arguments = {"n_tokens": 32, "seed": 3, "device": "cuda", "progress": False}
    cpu = simulate.sample(spec, n_networks=256, draw_device="cpu", **arguments)
    cuda = simulate.sample(spec, n_networks=256, **arguments)
    few = simulate.sample(spec, n_networks=3, **arguments)
    assert few.equals(cuda.isel(network=slice(0, 3)))
    assert cuda.attrs["draw_device"] == "cuda"
    assert not cuda.equals(cpu)
    for variable in ("second_moment", "token_correlation"):
        a, b = (run[variable].fillna(0.0) for run in (cpu, cuda))
        stderr = np.hypot(a.std("network", ddof=1), b.std("network", ddof=1)) / 16
        assert (abs(a.mean("network") - b.mean("network")) <= 5 * stderr + 1e-12).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny_masked", "tiny_moe"])
def test_gram_and_backward_on_cuda_are_those_of_the_cpu(name: str) -> None:
    """The same random numbers on both devices: rounding of about 1e-6, one flipped route below 1e-3 as above."""
    spec = presets.get(name).with_fields(n_layers=3)
    for method, backward in (("gram", False), ("explicit", True)):
        options = {"n_networks": 3, "n_tokens": 8, "seed": 3, "method": method, "backward": backward}
        cpu, cuda = (
            simulate.sample(spec, device=device, draw_device="cpu", progress=False, **options)
            for device in ("cpu", "cuda")
        )
        for variable, values in cpu.data_vars.items():
            scale = max(1.0, float(abs(values.fillna(0.0)).max()))
            assert float(abs(values - cuda[variable]).max()) < 1e-3 * scale, (variable, method)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["tiny", "tiny_masked", "tiny_gqa"])
def test_cuda_draws_the_gram_networks_of_the_cpu(name: str) -> None:
    """The root of the Gram matrix is unique and continuous: eigenvalue solvers differ by rounding only."""
    arguments = {"n_networks": 8, "n_tokens": 64, "seed": 3, "method": "gram", "draw_device": "cpu", "progress": False}
    runs = [simulate.sample(presets.get(name), device=device, **arguments) for device in ("cpu", "cuda")]
    for variable in ("second_moment", "variance", "token_correlation"):
        cpu, cuda = (run[variable].fillna(0.0) for run in runs)
        assert float(abs(cpu - cuda).max()) < 1e-4 * max(1.0, float(abs(cpu).max()))
