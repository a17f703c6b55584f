"""||J - I||_F^2 / d of a block's Jacobian J, read off the autograd graph from its input x to its output y.

J has a D x D piece J_ts for each output token t and input token s. The three definitions are those of
`varprop.theory.jacobian`:

    all_sources  sum_ts |J_ts - I [t = s]|^2 / (T D)
    own_token    sum_t |J_tt - I|^2 / (T D)
    token_mean   |sum_ts J_ts / T - I|^2 / D

All three are the same for the transpose, so that products u^T J serve, which reuse one forward pass and need no
forward-mode derivatives. Shape suffixes: `T` tokens, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEFINITIONS = ("all_sources", "own_token", "token_mean")


def jacobian_deviation(y: Tensor, x: Tensor) -> Tensor:
    """||J - I||_F^2 / d in the order of `DEFINITIONS`, (*lead, 3), float64; exact to rounding, T D products.

    y: (*lead, T, D), computed from x of the same shape, which requires a gradient, each leading index from its own
    alone.
    Source: the definitions above. Checked by: tests/measure/test_jacobian.py, torch.autograd.functional.jacobian.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> jacobian_deviation(x + 0.5 * x.flip(0), x)  # J_ts = I / 2 for s != t
    tensor([0.2500, 0.0000, 0.2500], dtype=torch.float64)
    """
    n_tokens, d_model = x.shape[-2:]
    total = x.new_zeros(*x.shape[:-2], len(DEFINITIONS), dtype=torch.float64)
    for i in range(d_model):
        mean = x.new_zeros(*x.shape[:-2], d_model, dtype=torch.float64)
        for t in range(n_tokens):
            unit = torch.zeros_like(x)
            unit[..., t, i] = 1.0
            gap = _pulled(y, x, unit).double() - unit
            total[..., 0] += gap.square().sum(dim=(-2, -1)) / n_tokens
            total[..., 1] += gap[..., t, :].square().sum(dim=-1) / n_tokens
            mean += gap.sum(dim=-2) / n_tokens
        total[..., 2] += mean.square().sum(dim=-1)
    return total / d_model


def probe_jacobian_deviation(y: Tensor, x: Tensor, n_probes: int, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Estimate and standard error over probes of `jacobian_deviation`, both (*lead, 3), float64; 3 products a probe.

    draw: `draw(*shape)` gives independent random signs +1 and -1, (*lead, *shape), as x in type and device. Signs and
    not Gaussians: among independent probes of unit variance they have the least variance, that of a diagonal J being 0.
    n_probes: at least 2. With A = J - I, v random signs and s, s' two sign vectors over tokens:
    all_sources |A^T (s v)|^2 / (T D), averaged over s and s'; own_token sum_t s_t s'_t (A^T (s v))_t . (A^T (s' v))_t /
    (T D), in which only the own token's piece survives the mean over s and s'; token_mean one v for all output tokens,
    |sum_t (A^T v)_t / T|^2 / D. Unbiased; the one of own_token can be negative. The standard error is that of one
    network's value and says nothing of the spread between networks.
    Source: the definitions above. Checked by: tests/measure/test_jacobian.py, the mean over all sign vectors.

    >>> x = torch.ones(2, 3, requires_grad=True)
    >>> generator = torch.Generator().manual_seed(0)
    >>> draw = lambda *shape: random_signs(shape, generator)
    >>> probe_jacobian_deviation(x + 0.5 * x.flip(0), x, 4, draw)[0][[0, 2]]
    tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    n_tokens, d_model = x.shape[-2:]
    found = []
    for _ in range(n_probes):
        signs = [draw(n_tokens, 1) for _ in range(2)]
        direction, shared = draw(n_tokens, d_model), draw(1, d_model)
        first, second = (s * (_pulled(y, x, s * direction) - s * direction).double() for s in signs)
        square = (first.square() + second.square()).sum(dim=(-2, -1)) / 2
        product = (first * second).sum(dim=(-2, -1))
        mean = _pulled(y, x, shared.expand(x.shape)).double().sum(dim=-2) / n_tokens - shared.squeeze(-2)
        found.append(torch.stack([square / n_tokens, product / n_tokens, mean.square().sum(dim=-1)], dim=-1) / d_model)
    values = torch.stack(found)
    return values.mean(dim=0), values.std(dim=0) / n_probes**0.5


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """+1 and -1 with equal chances, float32, on the generator's device.

    >>> random_signs((4,), torch.Generator().manual_seed(0)).abs()
    tensor([1., 1., 1., 1.])
    """
    return 2.0 * torch.randint(2, shape, generator=generator, device=generator.device) - 1.0


def _pulled(y: Tensor, x: Tensor, cotangent: Tensor) -> Tensor:
    """J^T u, (*lead, T, D), of a cotangent u of y."""
    return torch.autograd.grad(y, x, cotangent, retain_graph=True)[0]
