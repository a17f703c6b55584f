"""Stand-in until the kernels of activation.py arrive."""

from __future__ import annotations

import numpy as np
import scipy.special

from varprop.theory.quadrature import hermite_basis

_SQ = 256


def _phi(a, h):
    return {
        "identity": lambda: h,
        "relu": lambda: np.maximum(h, 0),
        "relu2": lambda: np.maximum(h, 0) ** 2,
        "gelu": lambda: h * scipy.special.ndtr(h),
        "gelu_tanh": lambda: h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
        "silu": lambda: h * scipy.special.expit(h),
        "sigmoid": lambda: scipy.special.expit(h),
    }[a]()


def _dphi(a, h):
    sg = scipy.special.expit(h)
    t = np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))
    return {
        "identity": lambda: np.ones_like(h),
        "relu": lambda: (h > 0) * 1.0,
        "relu2": lambda: 2 * np.maximum(h, 0),
        "gelu": lambda: scipy.special.ndtr(h) + h * np.exp(-(h**2) / 2) / np.sqrt(2 * np.pi),
        "gelu_tanh": lambda: (1 + t) / 2
        + h / 2 * (1 - t**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * h**2),
        "silu": lambda: sg * (1 + h * (1 - sg)),
        "sigmoid": lambda: sg * (1 - sg),
    }[a]()


def _series(f, a, variance, correlation):
    nodes, basis = hermite_basis(_SQ)
    v, c = np.broadcast_arrays(np.asarray(variance, float), np.asarray(correlation, float))
    values = f(a, np.sqrt(v)[..., None] * nodes) * basis[0]
    coefficients = values @ basis[: _SQ // 2].T
    return np.sum(coefficients**2 * c[..., None] ** np.arange(_SQ // 2), axis=-1)


def activation_derivative_second_moment(activation, variance):
    nodes, basis = hermite_basis(_SQ)
    return _dphi(activation, np.sqrt(np.asarray(variance, float))[..., None] * nodes) ** 2 @ basis[0] ** 2


def activation_derivative_kernel(activation, variance, correlation, other_variance=None):
    if activation == "relu":
        return (np.pi - np.arccos(np.clip(correlation, -1, 1))) / (2 * np.pi)
    return _series(_dphi, activation, variance, correlation)


def activation_kernel(activation, variance, correlation, other_variance=None):
    return _series(_phi, activation, variance, correlation)
