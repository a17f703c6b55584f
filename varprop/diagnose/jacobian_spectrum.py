"""The spectral norm of a layer's mean Jacobian, from products with it and with its transpose.

Shape suffixes: `B` sequences, `T` tokens, `D` d_model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from varprop.diagnose.layers import from_1
from varprop.diagnose.limits import GIBIBYTE
from varprop.diagnose.replay import Captured, Replay
from varprop.diagnose.session import Session, Variables
from varprop.errors import LeftOutWarning
from varprop.measure import random_signs
from varprop.nn import Transformer

Product = Callable[[Tensor], Tensor]
SPECTRAL_TOKENS = 1024
"""Tokens whose graph is held at a time."""
MAPS = 5
"""T x T maps of every head that the graph of attention's plain formula holds."""
ROUNDING = 1e-10


def mean_jacobian(replay: Replay, captured: Captured, layer: int) -> tuple[Product, Product]:
    """Products with J = sum_bts J_bts / (B T), and with its transpose, of vectors (D) float64; exact to rounding.

    u^T J is linear in u, so that its derivative by u, along v, is J v: two backward passes, no forward-mode derivative,
    which many kernels lack, and no difference of two outputs, which sees tokens change their expert. Attention is
    computed by its plain formula, whose derivative has a derivative; it holds T x T weights for each head.
    Checked by: tests/diagnose/test_jacobian.py, torch.autograd.functional.jacobian.
    """
    x = captured.streams[layer].clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        y = replay.layer(layer, x[None], captured)[0]
        zero = torch.zeros_like(y, requires_grad=True)
        pulled = torch.autograd.grad(y, x, zero, create_graph=True)[0]

    def product(end: Tensor, source: Tensor, vector: Tensor) -> Tensor:
        found = torch.autograd.grad(end, source, vector.to(end.dtype).expand_as(end), retain_graph=True)[0]
        return found.flatten(0, -2).mean(dim=0, dtype=torch.float64)

    return lambda v: product(pulled, zero, v), lambda u: product(y, x, u)


def largest_singular_value(forward: Product, transposed: Product, start: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """Largest singular value after `n_steps` of Lanczos bidiagonalisation, and its residual; scalars.

    forward, transposed: products with the matrix and its transpose. start: vector (n). The value is at most the largest
    singular value; some singular value is within the residual of it. Two products a step, every vector made
    orthogonal to all before it.
    Source: Golub and Kahan (1965). Checked by: tests/diagnose/test_jacobian.py, numpy.

    >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    >>> start = torch.ones(3, dtype=torch.float64)
    >>> value, residual = largest_singular_value(lambda v: matrix @ v, lambda u: matrix.T @ u, start, 3)
    >>> round(float(value), 12), float(residual) < 1e-12
    (3.0, True)
    """
    n_steps = min(n_steps, len(start))
    left, right = start.new_zeros(len(start), n_steps), start.new_zeros(len(start), n_steps + 1)
    bidiagonal = start.new_zeros(n_steps, n_steps + 1)
    right[:, 0] = start / start.norm()
    for step in range(n_steps):
        left[:, step], bidiagonal[step, step] = _orthogonal(forward(right[:, step]), left[:, :step])
        found = _orthogonal(transposed(left[:, step]), right[:, : step + 1])
        right[:, step + 1], bidiagonal[step, step + 1] = found
    vectors, values, _ = torch.linalg.svd(bidiagonal[:, :-1])
    return values[0], bidiagonal[-1, -1] * vectors[-1, 0].abs()


def _orthogonal(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Direction and length of the part orthogonal to the columns of the basis; zeros where it is but rounding."""
    rest = vector
    for _ in range(2):  # the second time takes away what rounding left
        rest = rest - basis @ (basis.T @ rest)
    length = torch.where(rest.norm() > ROUNDING * vector.norm(), rest.norm(), 0.0)
    return torch.where(length > 0, rest / length, 0.0), length


def spectral_norms(session: Session, matrices: Sequence[np.ndarray] | None) -> Variables:
    """jacobian_spectral_norm (layer): the largest singular value of the Jacobian J of token_mean, and its residual.

    matrices: J - I of every layer where they are known exactly, on all sequences; the residual is 0 then. None: after
    `jacobian_spectral_steps` steps of `largest_singular_value`, from a random start, on the first sequences of
    about 1,024 tokens: at most the largest, and some singular value is within jacobian_spectral_norm_residual of it.
    No variables for 0 steps, and, with a warning, where attention of T x T numbers needs more memory than is stated.
    """
    device, steps = session.replay.device, session.option("jacobian_spectral_steps")
    if matrices is not None:
        eye = torch.eye(session.replay.d_model, dtype=torch.float64, device=device)
        norms = [torch.linalg.matrix_norm(torch.as_tensor(m).to(eye) + eye, 2) for m in matrices]
        found = {"value": torch.stack(norms).cpu().numpy(), "residual": np.zeros(len(matrices))}
    elif steps and _fits(session):
        estimate = lambda: session.replay.limits.retried(lambda: _estimated(session, steps))  # noqa: E731
        found = session.once("jacobian-spectrum", estimate)
    else:
        return {}
    return {
        name: (("layer",), from_1(found[key]))
        for name, key in (("jacobian_spectral_norm", "value"), ("jacobian_spectral_norm_residual", "residual"))
    }


def _sequences(session: Session) -> slice:
    return session.first_sequences(min(SPECTRAL_TOKENS, session.option("jacobian_tokens")), fewest=1)


def _fits(session: Session) -> bool:
    """Whether the plain formula's T x T numbers of every head fit in the memory; a warning where they do not."""
    replay, sequences = session.replay, _sequences(session)
    of_number = max(4, torch.finfo(replay.dtype).bits // 8)
    n_rows = _n_heads(replay) * (sequences.stop - sequences.start) * session.n_tokens
    needed = MAPS * of_number * n_rows * session.n_tokens
    if needed <= replay.limits.memory:
        return True
    gib, given = needed / GIBIBYTE, replay.limits.memory / GIBIBYTE
    message = f"jacobian_spectral_norm is left out: it needs about {gib:.3g} GiB, more than memory={given:.3g} GiB"
    warnings.warn(f"{message}; shorter sequences need less", LeftOutWarning, stacklevel=2)
    return False


def _n_heads(replay: Replay) -> int:
    """Of a layer's attention; 0 without it."""
    if isinstance(replay.model, Transformer):
        return 0 if replay.model.spec.attention is None else replay.model.spec.n_heads
    found = getattr(getattr(replay.model, "config", None), "num_attention_heads", None)
    return found if isinstance(found, int) else max(1, replay.d_model // 64)


def _estimated(session: Session, n_steps: int) -> dict[str, Tensor]:
    captured = session.capture(_sequences(session))
    start = random_signs((session.replay.d_model,), session.rng("jacobian spectrum")).double().to(session.replay.device)
    values, residuals = [], []
    for layer in range(session.replay.n_layers):
        products = mean_jacobian(session.replay, captured, layer)
        value, residual = largest_singular_value(*products, start, n_steps)
        values.append(value)
        residuals.append(residual)
        del products  # the graph
    return {"value": torch.stack(values), "residual": torch.stack(residuals)}
