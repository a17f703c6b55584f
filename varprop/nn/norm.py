"""RMS and layer normalisation over the last axis, in float32 or better whatever the stream's type."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from varprop.nn.linear import Weights, per_token
from varprop.spec import ModelSpec


def norm(x: Tensor, weights: Weights, spec: ModelSpec, name: str) -> Tensor:
    """The norm called `name`: rms x / sqrt(mean x^2 + eps), layer (x - mean) / sqrt(var + eps); then gain and bias."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalise = functional.rms_norm if spec.norm.kind == "rms" else functional.layer_norm
    y = normalise(wide, wide.shape[-1:], eps=spec.norm.eps)
    if f"{name}.gain" in weights:
        y = y * per_token(weights[f"{name}.gain"])
    if f"{name}.bias" in weights:
        y = y + per_token(weights[f"{name}.bias"])
    return y.to(x.dtype)


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * gain; `gain` broadcasts against x."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (functional.rms_norm(wide, wide.shape[-1:], eps=eps) * gain).to(x.dtype)
