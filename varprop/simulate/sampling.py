"""`sample`: the statistics of networks with random weights, one row per network."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from varprop import results
from varprop.errors import ArgumentError, require
from varprop.measure.jacobian import DEFINITIONS
from varprop.nn.init import draw_layer
from varprop.simulate.backward import MAX_EXACT, N_PROBES
from varprop.simulate.block import Draw, LayerNumbers, Run, block_statistics, layer_parameters, release_memory
from varprop.simulate.gram import gram_layer, gram_numbers
from varprop.simulate.gram_error import EXACT, gram_claims
from varprop.simulate.inputs import LARGEST_NETWORK, positive_integer, read_inputs
from varprop.spec import ModelSpec

METHODS: dict[str, tuple[Draw, LayerNumbers]] = {
    "explicit": (draw_layer, layer_parameters),
    "gram": (gram_layer, gram_numbers),
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}

LAST_DIMENSION = {
    "branch_correlation": "branch",
    "jacobian_deviation": "definition",
    "jacobian_deviation_stderr": "definition",
}
"""Of the variables with three dimensions; `site` for the others."""


def sample(
    spec: ModelSpec,
    *,
    n_networks: int,
    n_tokens: int | None = None,
    token_correlation: float | np.ndarray = 0.0,
    inputs: Any = None,
    seed: int = 0,
    method: str = "explicit",
    device: str = "cpu",
    draw_device: str | None = None,
    dtype: str = "float32",
    first_network: int = 0,
    backward: bool = False,
    n_probes: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Statistics of `n_networks` freshly drawn networks at every layer.

    Variables over (network, layer, site): `second_moment`, `variance`, `token_correlation`, `fourth_moment`; over
    (network, layer, branch) `branch_correlation`, of the stream that a branch is added to with the branch; over
    (network, layer), where the spec has attention, `attention_concentration` and `attention_entropy`, and where it has
    a mixture, `gate_second_moment` and `expert_load_concentration` (1 in layers without one).

    n_tokens: Gaussian tokens with the second moment (embedding std * embedding_scale)^2, fresh for each network.
    token_correlation: between them, a number in [0, 1] or a correlation matrix (n_tokens, n_tokens), as of `predict`.
    inputs, instead: embedding outputs ([n_sequences,] n_tokens, d_model), or token ids ([n_sequences,] n_tokens), of
    which each network draws its own embedding rows. Network i reads sequence i mod n_sequences: take a multiple of
    n_sequences; the spread over networks then holds that between the sequences, too.
    n_networks: they are computed in whole blocks, of which the last is cut: multiples of a block cost no more, 8 on a
    CPU, 256 drawn on an accelerator, fewer where layers are large (`block.networks_per_block`).
    seed: network i is bitwise the same for every n_networks, first_network and number of threads, on one device.
    first_network: number of the first one, so that a sample can be continued. method: `explicit` draws every matrix;
    `gram` (varprop.simulate.gram) draws what they make of the tokens, exact in law at a cost of T^2 in place of T d per
    unit: faster from a d_model of several n_tokens and some hundreds on, slower in narrower models, and without
    weights, so not for `backward`. It treats a weight mask to leading order in 1/(density fan_in): attributes
    `exactness`, `method_error` and `method_spread_error` say what this neglects in means and in variances over networks
    of the second moments of one layer (`gram_claims`; 0 if exact).
    dtype: type of the stream and of the matrices, multiplied in full (no TF32); statistics accumulate in float64.
    draw_device: where the weights are drawn, None = `device`. An accelerator draws a thousand times faster than the
    CPU, but other numbers from the same seeds: the same law, other networks. "cpu" gives the same networks, to
    rounding, on every device. progress: a bar on standard error.
    backward: add `grad_second_moment` (network, layer, site), the second moment of the gradient with respect to the
    tensor at a site, relative to that of the last stream, where it is Gaussian, independent for each token; and
    `jacobian_deviation` (network, layer, definition), ||J - I||_F^2 / d of each block in the definitions of
    `theory.jacobian`. n_probes: random products per network and layer that estimate the latter (unbiased), whose
    standard error over probes is then `jacobian_deviation_stderr`; None = none, the exact value, up to
    n_tokens * d_model = 512, 16 beyond. In this mode alone memory grows with depth: each layer's stream is kept,
    n_tokens * d_model numbers a network; it needs weights, hence method="explicit".
    `explicit` is exact up to rounding: each network is a real one. Where memory is too short for a block of networks,
    it is computed in pieces of the same random numbers, with a `ReducedBatchWarning`. Raises `ArgumentError` for
    arguments outside their domain.

    >>> from varprop import presets
    >>> dataset = sample(presets.tiny(), n_networks=2, n_tokens=4)
    >>> dict(dataset.sizes)
    {'network': 2, 'layer': 9, 'site': 5, 'branch': 2}
    """
    require(isinstance(spec, ModelSpec), ArgumentError, "spec", type(spec).__name__, "no model", "a ModelSpec")
    for name, value, known in (("method", method, METHODS), ("dtype", dtype, DTYPES)):
        good = isinstance(value, str) and value in known
        require(good, ArgumentError, name, value, "unknown", "one of " + ", ".join(known))
    check_device(device)
    draw_device = check_device(device if draw_device is None else draw_device, "draw_device")
    n_networks = positive_integer("n_networks", n_networks, maximum=LARGEST_NETWORK)
    seed = positive_integer("seed", seed, minimum=0)
    first = positive_integer("first_network", first_network, minimum=0, maximum=LARGEST_NETWORK)
    source = read_inputs(spec, n_tokens, token_correlation, inputs)
    probes = checked_probes(backward, n_probes, method, source.n_tokens * spec.d_model)
    entropy = (seed, int(spec.spec_id, 16))
    run = Run(spec, source, entropy, device, DTYPES[dtype], draw_device, *METHODS[method], backward, probes)
    blocks = range(first // run.block_size, -(-(first + n_networks) // run.block_size))
    with _reproducible(), _bar(len(blocks) * spec.n_layers * (1 + backward), progress) as run.advance:
        pieces = [block_statistics(run, block) for block in blocks]
        release_memory()  # processes may share an accelerator
    start = first - blocks.start * run.block_size
    shared = ("network", "layer")
    return results.new(
        {
            name: (
                shared if first_piece.ndim == 2 else (*shared, LAST_DIMENSION.get(name, "site")),
                np.concatenate([piece[name] for piece in pieces])[start : start + n_networks],
            )
            for name, first_piece in pieces[0].items()
        },
        coords={"network": np.arange(first, first + n_networks), "definition": list(DEFINITIONS)},
        source="simulation",
        spec_json=spec.to_json(),
        spec_id=spec.spec_id,
        n_tokens=source.n_tokens,
        seed_entropy=str(seed),
        dtype=dtype,
        device=device,
        attributes={
            "method": method,
            **(gram_claims(spec, source.n_tokens) if method == "gram" else EXACT),
            "seed": str(seed),
            "n_networks": n_networks,
            **source.attributes,
            "draw_device": draw_device,
            "torch_version": str(torch.__version__),
            **({"n_probes": probes} if backward else {}),
        },
    )


def checked_probes(backward: bool, n_probes: int | None, method: str, size: int) -> int:
    """Number of probes, 0 = exact; size: n_tokens * d_model."""
    require(isinstance(backward, bool), ArgumentError, "backward", backward, "no truth value", "True or False")
    wrong = "given without backward=True"
    require(backward or n_probes is None, ArgumentError, "n_probes", n_probes, wrong, "backward=True, or None")
    if backward and method != "explicit":
        raise ArgumentError("backward=True needs weights; expected method='explicit'")
    if n_probes is not None:
        return positive_integer("n_probes", n_probes, minimum=2)
    return N_PROBES if size > MAX_EXACT else 0


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[Callable[[], None]]:
    """Advances a bar of layers on standard error."""
    columns = TextColumn("sampling, layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = not (progress and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("layers", total=total)
        yield lambda: bar.advance(task)


def check_device(device: str, name: str = "device") -> str:
    """The device; `ArgumentError` unless torch can put a tensor there."""
    try:
        torch.zeros(1, device=torch.device(device)).cpu()
    except torch.OutOfMemoryError:  # other processes fill it: it is there
        pass
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):  # unknown name, or no such accelerator
        raise ArgumentError(f"{name}={device!r} is not available; expected cpu or an accelerator of torch") from None
    return device


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
