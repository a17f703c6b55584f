"""The kernels against plain torch in float32: on a GPU, elsewhere by the interpreter of Triton where that is installed.

`python -m tests.nn.test_kernels` runs the comparison, which the interpreter does in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from varprop.nn import kernels
from varprop.nn.attention import rotate
from varprop.nn.init import make_generator

ROOT = Path(__file__).parents[2]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WIDTHS = (16, 48, 768, 1536, 2816)
HEADS = ((2, 2, 16), (4, 2, 16), (6, 1, 64), (8, 8, 128), (3, 1, 256))
"""Query heads, key/value heads, head_dim."""


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed)).to(device, dtype)


def turns(n_tokens: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angles = torch.arange(n_tokens)[:, None] * frequencies
    return angles.cos().to(device), angles.sin().to(device)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """bfloat16 rounds the result by 2^-9 of itself, half a unit of its last place; float32 by some 1e-7 of a sum."""
    assert found.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=1e-5)


def check_swiglu(n_sequences: int, n_tokens: int, width: int, dtype: torch.dtype, device: str) -> None:
    packed = draw((n_sequences, n_tokens, 2 * width), dtype, device).requires_grad_()
    out = kernels.swiglu(packed)
    wide = packed.detach().float().requires_grad_()
    gate, up = wide.split(width, dim=-1)
    expected = functional.silu(gate) * up
    close(out, expected.detach(), dtype)
    direction = draw(tuple(out.shape), dtype, device, 1)
    (ours,) = torch.autograd.grad(out, packed, direction)
    (theirs,) = torch.autograd.grad(expected, wide, direction.float())
    close(ours, theirs, dtype)


def check_rotation(
    n_sequences: int, n_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    n_heads, n_kv_heads, head_dim = heads
    packed = draw((n_sequences, n_tokens, (n_heads + n_kv_heads) * head_dim), dtype, device).requires_grad_()
    cos, sin = turns(n_tokens, head_dim, device)
    found = kernels.split_and_rotate(packed, cos, sin, n_heads)
    wide = packed.detach().float().requires_grad_()
    parts = wide.unflatten(-1, (-1, head_dim)).split((n_heads, n_kv_heads), dim=-2)
    expected = [rotate(part.transpose(1, 2), cos, sin).transpose(1, 2) for part in parts]
    directions = [draw(tuple(part.shape), dtype, device, seed) for seed, part in enumerate(found, 1)]
    for one, other in zip(found, expected, strict=True):
        close(one, other.detach(), dtype)
    # As attention gives them: with tokens and heads exchanged in memory.
    strided = [d.transpose(1, 2).contiguous().transpose(1, 2) for d in directions]
    (ours,) = torch.autograd.grad(found, packed, strided)
    (theirs,) = torch.autograd.grad(expected, wide, [direction.float() for direction in directions])
    close(ours, theirs, dtype)


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("n_sequences, n_tokens", [(1, 1), (3, 37), (2, 1024)])
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(width: int, n_sequences: int, n_tokens: int) -> None:
    check_swiglu(n_sequences, n_tokens, width, torch.bfloat16, "cuda")


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("n_sequences, n_tokens", [(1, 1), (3, 37), (2, 1024)])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_split_and_rotate(heads: tuple[int, int, int], n_sequences: int, n_tokens: int) -> None:
    check_rotation(n_sequences, n_tokens, heads, torch.bfloat16, "cuda")


@pytest.mark.gpu
@CUDA
def test_rows_beyond_32_bits() -> None:
    """The last row of a tensor with more than 2^31 numbers."""
    packed = torch.zeros(2**20 + 1, 2048, dtype=torch.bfloat16, device="cuda")
    packed[-1] = draw((2048,), torch.bfloat16, "cuda")
    gate, up = packed[-1].float().split(1024)
    close(kernels.swiglu(packed)[-1], functional.silu(gate) * up, torch.bfloat16)


@pytest.mark.gpu
@CUDA
def test_compiled() -> None:
    """Within a compiled function, without a break, and with the same bits."""
    packed = draw((2, 5, 64), torch.bfloat16, "cuda").requires_grad_()
    cos, sin = turns(5, 16, "cuda")

    def both(packed: Tensor) -> tuple[Tensor, ...]:
        return kernels.swiglu(packed), *kernels.split_and_rotate(packed, cos, sin, 3)

    compiled = torch.compile(both, fullgraph=True, dynamic=False)
    for one, other in zip(compiled(packed), both(packed), strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad([y.sum() for y in f(packed)], packed)[0] for f in (compiled, both)]
    torch.testing.assert_close(*gradients, rtol=2**-7, atol=2**-7)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_interpreted() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.nn.test_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "6 comparisons\n"


def test_who_is_served() -> None:
    """On a CPU, in float32 and for widths that the tiles do not divide plain torch is used."""
    x, weight = draw((2, 3, 16), torch.bfloat16, "cpu"), draw((16, 16), torch.bfloat16, "cpu")
    assert not kernels.serves(x, weight)


@pytest.mark.gpu
@CUDA
def test_who_is_served_on_a_gpu() -> None:
    x, weight = draw((2, 3, 16), torch.bfloat16, "cuda"), draw((16, 16), torch.bfloat16, "cuda")
    assert kernels.serves(x, weight)
    for one, other in ((x.float(), weight), (x, weight[:12]), (x, weight.expand(2, 16, 16)), (x, object())):
        assert not kernels.serves(one, other)


def main() -> None:
    """The comparison of both kernels in float32, which is what the interpreter computes in."""
    count = 0
    for n_sequences, n_tokens, width in ((1, 1, 16), (3, 40, 48), (2, 7, 1536)):
        check_swiglu(n_sequences, n_tokens, width, torch.float32, "cpu")
        count += 1
    for n_sequences, n_tokens, heads in ((1, 1, (2, 2, 16)), (3, 40, (4, 2, 16)), (2, 7, (3, 1, 64))):
        check_rotation(n_sequences, n_tokens, heads, torch.float32, "cpu")
        count += 1
    print(f"{count} comparisons")


if __name__ == "__main__":
    main()
