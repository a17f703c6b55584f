"""Statistics of weight matrices, masked entries included as zeros.

Every function takes w of shape (*lead, out, in) and gives one number for each matrix, (*lead), float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THRESHOLD = 0.1
"""In units of the rms of the matrix: of `effective_density_threshold_tenth_rms`."""
LANCZOS_STEPS = 20


def rms(w: Tensor) -> Tensor:
    """sqrt(mean w^2) over the entries, (*lead), float64; exact to rounding.

    >>> rms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).item()
    2.5
    """
    return w.double().square().mean(dim=(-2, -1)).sqrt()


def effective_density_participation(w: Tensor) -> Tensor:
    """3 (mean w^2)^2 / mean w^4 over the entries, (*lead): 1 for Gaussian ones, rho for those masked to density rho.

    The participation ratio over that of a Gaussian; 3 for entries of equal size. 0 for a zero matrix; exact to
    rounding (a Gaussian matrix of n entries has 1 +- sqrt(24 / n) / 3).

    >>> effective_density_participation(torch.tensor([[1.0, -1.0], [0.0, 0.0]])).item()
    1.5
    """
    square = w.double().square()
    second, fourth = square.mean(dim=(-2, -1)), square.square().mean(dim=(-2, -1))
    return torch.where(fourth > 0, 3 * second.square() / fourth, 0.0)


def effective_density_threshold_tenth_rms(w: Tensor) -> Tensor:
    """Share of the entries with |w| > 0.1 rms(w), (*lead); 0.9203 for a Gaussian matrix, 0 for a zero one; exact.

    >>> effective_density_threshold_tenth_rms(torch.tensor([[1.0, -1.0], [0.01, 0.0]])).item()
    0.5
    """
    return share_above(w, THRESHOLD * rms(w))


def share_above(w: Tensor, threshold: Tensor | float) -> Tensor:
    """Share of the entries with |w| > threshold, (*lead), float64; exact. threshold: one, or (*lead) float64.

    With threshold 0 one minus it is the share of exact zeros.

    >>> share_above(torch.tensor([[1.0, -1.0], [0.01, 0.0]]), 0.0).item()
    0.75
    """
    limit = torch.as_tensor(threshold, dtype=torch.float64, device=w.device).expand(w.shape[:-2])
    above = w.abs() > limit[..., None, None]  # compared in float64, entry by entry: without a copy in it
    return torch.count_nonzero(above.flatten(-2), dim=-1).double() / (w.shape[-2] * w.shape[-1])


def magnitude_mask_retained_variance(w: Tensor, densities: Sequence[float]) -> Tensor:
    """Share of sum w^2 that the largest entries keep, (*lead, densities), float64; 0 for a zero matrix.

    What is left of a matrix whose entries are masked by magnitude to each density: its round(density n) largest of n
    entries, at least one. For a Gaussian matrix 0.9287 at density 0.5, 0.7833 at 0.3 and 0.4393 at 0.1.
    densities: falling, in (0, 1]. Exact to rounding in float32.
    Checked by: tests/measure/test_weights.py, sorting.

    >>> magnitude_mask_retained_variance(torch.tensor([[2.0, -1.0], [1.0, 0.0]]), (0.5, 0.25)).tolist()
    [0.8333333333333334, 0.6666666666666666]
    """
    square = w.flatten(-2).to(torch.promote_types(w.dtype, torch.float32)).square()
    n_entries, total = square.shape[-1], square.sum(dim=-1, dtype=torch.float64)
    found = []
    for density in densities:
        square = square.topk(max(1, round(density * n_entries)), dim=-1, sorted=False).values
        kept = square.sum(dim=-1, dtype=torch.float64)
        found.append(torch.where(total > 0, kept / total, 0.0))
    return torch.stack(found, dim=-1)


def spectral_norm(w: Tensor, n_steps: int = LANCZOS_STEPS) -> Tensor:
    """Largest singular value of each matrix, (*lead), float64, by `n_steps` Lanczos steps on w^T w from a fixed vector.

    Too large by rounding in float32 at most. Too small by a factor that falls with the steps: measured at 20 steps,
    under 1 % for Gaussian matrices of 256 to 2,048 columns (the hardest case, a spectrum without a gap) and under 1e-6
    where the largest singular value stands apart by a factor of 1.5; exact when n_steps reaches the smaller side.
    Source: Golub and Van Loan, Matrix Computations, section 10.1. Checked by: tests/measure/test_weights.py, SVD.

    >>> round(spectral_norm(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).item(), 5)
    4.0
    """
    if w.shape[-2] < w.shape[-1]:
        w = w.mT
    w = w.detach().float() if w.dtype != torch.float64 else w.detach()
    scale = w.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    w = w / scale  # whose squares neither overflow nor vanish
    n_columns = w.shape[-1]
    start = torch.randn(n_columns, 1, generator=torch.Generator().manual_seed(0), dtype=w.dtype).to(w.device)
    v = start.expand(*w.shape[:-2], n_columns, 1)
    basis = w.new_zeros(*w.shape[:-2], n_columns, 0)
    for _ in range(min(n_steps, n_columns)):
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            v = v - basis @ (basis.mT @ v)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        basis = torch.cat([basis, v], dim=-1)
        v = w.mT @ (w @ v)
    image = (
        w @ torch.linalg.qr(basis).Q
    ).double()  # orthogonal where steps beyond the rank left noise in the basis too
    return torch.linalg.eigvalsh(image.mT @ image)[..., -1].clamp(min=0).sqrt() * scale[..., 0, 0]


def stable_rank(w: Tensor, n_steps: int = LANCZOS_STEPS) -> Tensor:
    """|w|_F^2 / |w|_2^2 of each matrix, (*lead), float64; 0 for a zero matrix.

    Too large by as much as the square of `spectral_norm` is too small.

    >>> round(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))).item(), 5)
    1.5
    """
    square = w.double().square().sum(dim=(-2, -1))
    largest = spectral_norm(w, n_steps).square()
    return torch.where(largest > 0, square / largest, 0.0)
