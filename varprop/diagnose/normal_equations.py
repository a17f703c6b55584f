"""Affine least squares over a stream of tokens, in one pass: centred normal equations, summed in float64.

The update u = y - x of a layer is fitted, not its output y: the solution is the same, the sums are better scaled.
Sums of parts merge exactly (Chan, Golub, LeVeque 1983), so batches, files and devices can be added in any order.

Shape suffixes: `N` tokens, `D` d_model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from varprop.errors import ArgumentError, require

MAX_CONDITION = 1e10
"""Of the correlation matrix of the inputs: above it eigenvalues below largest / MAX_CONDITION are left out."""
CONSTANT = 1e-12
"""A neuron whose standard deviation is at most this times its mean does not vary: that is rounding in float64."""


@dataclass
class NormalEquations:
    """Sums over tokens x, u (D): count, means, centred products sum x x^T and sum x u^T, and sum |u|^2; float64."""

    count: float
    mean_x: Tensor
    mean_u: Tensor
    gram: Tensor
    cross: Tensor
    power: Tensor

    @classmethod
    def empty(cls, d_model: int, device: torch.device | str = "cpu") -> NormalEquations:
        """Of no tokens."""
        zero = torch.zeros(d_model + 1, d_model, dtype=torch.float64, device=device)
        matrices = zero[:-1].clone(), zero[:-1].clone()
        return cls(0.0, zero[0].clone(), zero[0].clone(), *matrices, zero[0, 0].clone())

    def add(self, x: Tensor, u: Tensor) -> None:
        """Take in the tokens x and u, (N, D) each. Products are of float64 numbers, which bfloat16 and float32 are."""
        x, u = x.double(), u.double()
        mean_x, mean_u = x.mean(dim=0), u.mean(dim=0)
        x, u = x - mean_x, u - mean_u  # so that far means cost no digits
        self._shift(len(x), mean_x, mean_u)
        self.gram.addmm_(x.mT, x)
        self.cross.addmm_(x.mT, u)
        self.power += u.square().sum()

    def merge(self, other: NormalEquations) -> None:
        """Take in the tokens of `other`."""
        self._shift(other.count, other.mean_x, other.mean_u)
        self.gram += other.gram
        self.cross += other.cross
        self.power += other.power

    def _shift(self, count: float, mean_x: Tensor, mean_u: Tensor) -> None:
        """Means of all tokens, and the products of both parts' means about them."""
        total = self.count + count
        if count == 0:
            return
        gap_x, gap_u = mean_x - self.mean_x, mean_u - self.mean_u
        weight = self.count * count / total
        self.gram.addr_(gap_x, gap_x, alpha=weight)
        self.cross.addr_(gap_x, gap_u, alpha=weight)
        self.power += weight * gap_u.square().sum()
        self.mean_x += gap_x * (count / total)
        self.mean_u += gap_u * (count / total)
        self.count = total

    def solve(self) -> Fit:
        """The map x -> x W + b of least sum |u - x W - b|^2.

        Neurons are put in units of their standard deviation, so that a neuron of massive activations counts as any
        other. Their correlation matrix R is factored by Cholesky where its condition |R|_1 |R^-1|_1 is at most
        `MAX_CONDITION`; else, fewer tokens than neurons included, through its eigenvalues above largest /
        `MAX_CONDITION`, which gives, of all equally good W, the smallest in these units. No ridge. Rows of W are 0 for
        neurons that do not vary. Raises `ArgumentError` without tokens.
        Checked by: tests/diagnose/test_normal_equations.py, against `numpy.linalg.lstsq` on all tokens.

        >>> sums = NormalEquations.empty(1)
        >>> sums.add(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[3.0], [5.0], [7.0]]))
        >>> fit = sums.solve()
        >>> round(fit.matrix.item(), 9), round(fit.shift.item(), 9), round(fit.r_squared, 9)
        (2.0, 1.0, 1.0)
        """
        require(self.count > 0, ArgumentError, "tokens", 0, "too few to fit a map to", "at least one")
        variance = self.gram.diagonal()
        varies = variance > self.count * (CONSTANT * self.mean_x).square()
        scale = torch.where(varies, variance, 1.0).rsqrt() * varies
        correlation = self.gram * scale[:, None] * scale
        right = self.cross * scale[:, None]
        factor, failed = torch.linalg.cholesky_ex(correlation)
        condition = torch.inf
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            condition = float(torch.linalg.matrix_norm(correlation, 1) * torch.linalg.matrix_norm(inverse, 1))
        if condition <= MAX_CONDITION:
            weights = torch.cholesky_solve(right, factor)
        else:
            values, vectors = torch.linalg.eigh(correlation)
            kept = values > values[-1].clamp(min=0) / MAX_CONDITION
            inverses = torch.where(kept, 1 / values.where(kept, 1.0), 0.0)
            weights = vectors @ (inverses[:, None] * (vectors.mT @ right))
        matrix = scale[:, None] * weights
        fitted = matrix.mT @ self.cross  # sum over tokens of (x W)^T u, which is that of (x W)^T (x W)
        explained = float(fitted.trace())
        power = float(self.power)
        square = float(fitted.square().sum())
        return Fit(
            matrix,
            self.mean_u - self.mean_x @ matrix,
            explained / power if power > 0 else 1.0,
            explained**2 / square if square > 0 else 0.0,
            condition,
        )


@dataclass(frozen=True, eq=False)
class Fit:
    """u = x @ matrix + shift, float64. r_squared: share of the variance of u that it gives, 1 where u does not vary.

    rank: (sum of e)^2 / sum of e^2 over the eigenvalues e of the covariance of x @ matrix: how many directions the
    fitted update has. condition: of the correlation matrix of x; infinite where it is singular.
    """

    matrix: Tensor
    shift: Tensor
    r_squared: float
    rank: float
    condition: float
