"""`method="gram"`: a layer of Gaussian weights applied to the tokens of a network without forming its matrices.

For tokens H (T, n) and a matrix W (out, n) of independent N(0, s^2) entries the columns of H W^T are independent
N(0, s^2 H H^T). With a root F F^T = H H^T they are drawn as s F Z, Z (T, out) of independent N(0, 1) entries. Every
matrix of a layer reads its tokens once, so that the whole forward pass has the law of a network with matrices, at cost
T^2 n + T^2 out in place of T n out, and T out random numbers in place of n out.
Legend: B networks, E experts, T tokens.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from varprop.nn.init import draw_tensor, make_generator
from varprop.nn.linear import LinearMap, Weights
from varprop.spec import ModelSpec, TensorRow, layer_table
from varprop.theory.linear import retained_variance


def gram_layer(
    spec: ModelSpec,
    layer: int,
    generator: torch.Generator,
    lead: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    keep: slice = slice(None),
) -> Weights:
    """The weights of a layer by their name in `layer_table`: vectors as tensors, matrices as maps, each applied once.

    lead: (B,) networks; keep: the part of them that is wanted, the numbers of all being drawn. A map has random numbers
    of its own, from the seed of `generator` and its place in the table. Exact in law for dense matrices; a mask enters
    by its retained variance.
    Source: derived in proofs/prove_gram.py. Checked by: tests/simulate/test_gram.py.

    >>> from varprop import presets
    >>> weights = gram_layer(presets.tiny(), 1, make_generator(0), (2,))
    >>> weights["attention.q"].apply(torch.ones(2, 5, 128)).shape
    torch.Size([2, 5, 128])
    """
    roots = _Roots()
    weights: dict[str, Tensor | LinearMap] = {}
    for index, (name, row) in enumerate(layer_table(spec, layer).items()):
        if len(row.shape) == 1:
            vector = draw_tensor(row, generator, lead)[0]
            weights[name] = (vector[keep] if lead else vector).to(device, dtype)
        else:
            seed = make_generator(generator.initial_seed(), index).initial_seed()
            own = torch.Generator(generator.device).manual_seed(seed)
            weights[name] = GaussianMap(_std(row), (*lead, *row.shape[:-1]), own, keep, roots)
    return weights


def gram_numbers(spec: ModelSpec, layer: int, n_tokens: int) -> int:
    """Random numbers of the largest map of a layer, experts having twice their average load."""
    rows = [row for row in layer_table(spec, layer).values() if len(row.shape) > 1]
    return max(round(n_tokens * math.prod(row.shape[:-1]) * min(1.0, 2 * row.active_fraction)) for row in rows)


def _std(row: TensorRow) -> float:
    """Standard deviation of the entries, masked ones included as zeros."""
    return row.init_std * math.sqrt(retained_variance(row.mask, row.fan_in * row.fan_out))


def gram_root(x: Tensor) -> Tensor:
    """F (*lead, T, T) with F F^T = x x^T for tokens x (*lead, T, n): token norms times the symmetric root of cosines.

    By eigenvalues in float64, returned in float32 or better. Any rank: equal tokens have equal rows to 1e-7, zero
    tokens zero rows. The symmetric root is unique and a Lipschitz function of the tokens (Araki and Yamagami, Commun.
    Math. Phys. 81), so that rounding changes no network; a triangular factor jumps where tokens are dependent.

    >>> F = gram_root(torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]]))
    >>> (F @ F.mT).round(decimals=4).tolist()
    [[25.0, 25.0, 0.0], [25.0, 25.0, 0.0], [0.0, 0.0, 0.0]]
    """
    wide = x.double()
    gram = wide @ wide.mT
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = torch.where(norm > 0, norm, 1.0)
    values, vectors = torch.linalg.eigh(gram / (unit.unsqueeze(-1) * unit.unsqueeze(-2)))
    root = (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT
    return (norm.unsqueeze(-1) * root).to(torch.promote_types(x.dtype, torch.float32))


class _Roots:
    """The root of each set of tokens that a layer reads: queries, keys and values share theirs."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], Tensor]] = []

    def of(self, x: Tensor) -> Tensor:
        for tokens, root in self._known:
            if tokens() is x:
                return root
        root = gram_root(x)
        self._known.append((weakref.ref(x), root))
        return root


@dataclass
class GaussianMap:
    """A matrix with N(0, std^2) entries that is never formed: its image of one set of tokens is drawn.

    shape: (B, out), or (B, E, out) for experts. Applied a second time it would be another matrix, so it refuses.
    """

    std: float
    shape: tuple[int, ...]
    generator: torch.Generator
    keep: slice
    roots: _Roots
    used: bool = field(default=False, init=False)

    def apply(self, x: Tensor) -> Tensor:
        """The image (*lead, T, out) of x (*lead, T, n). Raises `RuntimeError` when called again."""
        if self.used:
            raise RuntimeError("a GaussianMap was applied twice; its second image would be that of another matrix")
        self.used = True
        root = self.roots.of(x)
        normal = self._normal(x.shape[-2]).to(x.device, root.dtype)
        return ((root * self.std) @ normal).to(x.dtype)

    def _normal(self, n_rows: int) -> Tensor:
        """Standard normal numbers (*lead, T, out) of the networks kept.

        Experts are drawn row by row: how many rows they need depends on the load of the networks computed with them,
        and the first rows must not depend on it.
        """
        numbers = torch.empty((n_rows, *self.shape), device=self.generator.device)
        for part in numbers if len(self.shape) == 3 else (numbers,):
            part.normal_(generator=self.generator)
        return (numbers[:, self.keep] if len(self.shape) > 1 else numbers).movedim(0, -2)
