"""`sample`: the statistics of networks with random weights, one row per network."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import track

from varprop import results
from varprop.errors import ArgumentError, require
from varprop.simulate.explicit import explicit_block, networks_per_block
from varprop.simulate.inputs import positive_integer, read_inputs
from varprop.spec import ModelSpec

METHODS = ("explicit",)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def sample(
    spec: ModelSpec,
    *,
    n_networks: int,
    n_tokens: int | None = None,
    token_correlation: float = 0.0,
    inputs: Any = None,
    seed: int = 0,
    method: str = "explicit",
    device: str = "cpu",
    draw_device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> xr.Dataset:
    """Moments of `n_networks` freshly drawn networks at every layer and site.

    Variables `second_moment`, `variance`, `token_correlation` over (network, layer, site) and `branch_correlation`
    over (network, layer, branch): the stream that a branch is added to, against the branch.

    n_tokens: Gaussian tokens with the second moment (embedding std * embedding_scale)^2 and correlation
    `token_correlation` between tokens, fresh for each network. inputs, instead: an array (n_tokens, d_model) used as
    the embedding output of every network, or token ids (n_tokens,), of which each network draws its own embedding rows.
    seed: network i is bitwise the same for every n_networks and number of threads, on one device; to rounding across
    devices. dtype: type of the matrices, multiplied in full (no TF32); statistics accumulate in float64.
    draw_device: where the weights are drawn. The CPU's generator is slow (about 1e8 normal numbers a second) and its
    numbers are the same for every `device`; those of an accelerator are fast and others: the same law, from the same
    seeds, but other networks. progress: a bar on standard error.
    Exact up to rounding: each network is a real one. Raises `ArgumentError` for arguments outside their domain.

    >>> from varprop import presets
    >>> dataset = sample(presets.tiny(), n_networks=2, n_tokens=4)
    >>> dict(dataset.sizes)
    {'network': 2, 'layer': 9, 'site': 5, 'branch': 2}
    """
    require(method in METHODS, ArgumentError, "method", method, "unknown", "one of " + ", ".join(METHODS))
    require(dtype in DTYPES, ArgumentError, "dtype", dtype, "unknown", "one of " + ", ".join(DTYPES))
    check_device(device)
    check_device(draw_device, "draw_device")
    n_networks, seed = positive_integer("n_networks", n_networks), positive_integer("seed", seed, minimum=0)
    source = read_inputs(spec, n_tokens, token_correlation, inputs)
    block_size = networks_per_block(spec, source.n_tokens)
    blocks = track(
        range(-(-n_networks // block_size)),
        description="sampling networks",
        console=Console(stderr=True),
        disable=not (progress and sys.stderr.isatty()),
        transient=True,
    )
    entropy = (seed, int(spec.spec_id, 16))
    with _reproducible():
        pieces = [explicit_block(spec, source, entropy, block, device, DTYPES[dtype], draw_device) for block in blocks]
    dims = {"branch_correlation": ("network", "layer", "branch")}
    return results.new(
        {
            name: (
                dims.get(name, ("network", "layer", "site")),
                np.concatenate([piece[name] for piece in pieces])[:n_networks],
            )
            for name in pieces[0]
        },
        source="simulation",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=source.n_tokens,
        seed_entropy=str(seed),
        dtype=dtype,
        device=device,
        attributes={
            "method": method,
            "seed": str(seed),
            "n_networks": n_networks,
            "token_correlation": source.token_correlation,
            "inputs": source.label,
            "draw_device": draw_device,
            "torch_version": str(torch.__version__),
        },
    )


def check_device(device: str, name: str = "device") -> None:
    """`ArgumentError` unless torch can put a tensor there."""
    try:
        torch.zeros(1, device=torch.device(device)).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):  # unknown name, or no such accelerator
        raise ArgumentError(f"{name}={device!r} is not available; expected cpu or an accelerator of torch") from None


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Torch on one CPU thread (another number may round differently) and with full float32 products, no TF32."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
